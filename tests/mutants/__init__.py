"""Mutation testing: one fault at a time in a copy of the tree, and the tests of that module. See `__main__.py`."""
