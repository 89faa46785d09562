"""The audio path, and long files."""
