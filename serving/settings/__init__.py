"""Declarations of every setting, in the groups of `--help`, and the types of their values."""
