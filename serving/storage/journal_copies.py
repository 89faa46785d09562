"""Copies of the ledger's journals in the bucket, as small objects below `ledger/`.

Blocking: for threads of the ledger. An object has the checksum of its bytes, which each read checks. An object that is
written again under its name has the same bytes first, and may have more.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import obstore

from serving.storage.objects import FAULTS, PAGE, fault_reason, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.config import Settings

_FOLDER = "ledger/"


class JournalCopies:
    """A `CopyStore` of the ledger. Each method raises `OSError` if the bucket cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self._store = open_store(settings)

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        attributes = {"sha256": hashlib.sha256(data).hexdigest()}
        try:
            obstore.put(self._store, _FOLDER + name, data, attributes=attributes, use_multipart=False)
        except FAULTS as error:
            raise OSError(fault_reason(error)) from None

    def names(self) -> list[str]:
        """Return the names of all objects, in their order."""
        try:
            pages = obstore.list(self._store, _FOLDER, chunk_size=PAGE)
            return sorted(meta["path"].removeprefix(_FOLDER) for page in pages for meta in page)
        except FAULTS as error:
            raise OSError(fault_reason(error)) from None

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes; `None` if another process has deleted it."""
        try:
            result = obstore.get(self._store, _FOLDER + name)
            data = bytes(result.bytes())
        except FileNotFoundError:
            return None
        except FAULTS as error:
            raise OSError(fault_reason(error)) from None
        if hashlib.sha256(data).hexdigest() != result.attributes.get("sha256"):
            raise OSError(f"checksum mismatch of {name}")
        return data

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, some of which another process may have deleted."""
        for name in names:
            try:
                obstore.delete(self._store, _FOLDER + name)
            except FileNotFoundError:
                continue
            except FAULTS as error:
                raise OSError(fault_reason(error)) from None
