"""Dialects: all code that knows a wire format."""
