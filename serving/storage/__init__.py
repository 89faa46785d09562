"""Storage of uploaded files."""
