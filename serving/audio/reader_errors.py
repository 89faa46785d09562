"""Errors of the readers of `decode.py`, within the package. The samples decoded before an error are kept."""

from __future__ import annotations


class ReaderError(Exception):
    """A reader failed, for the reason in the message."""


class DamagedError(ReaderError):
    """The file is damaged, or of a kind that the reader does not know: the two look alike."""
