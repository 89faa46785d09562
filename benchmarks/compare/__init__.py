"""Comparisons of complete systems, and of one system with itself under another setting."""
