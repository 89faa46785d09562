"""Comparisons of whole systems, and of one system with itself under another setting."""
