"""A time in which the ledger's disk is full or failing."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Fault:
    """A time in which the journal cannot record new requests."""

    error: OSError
    since_s: float = field(default_factory=time.monotonic)
    logged_s: float = field(default_factory=time.monotonic)
    kept_before: int = 0
    """Records that had been kept in memory before."""
    refused: int = 0
    """Requests that were refused."""
    skipped: int = 0
    """Reports of progress that were not recorded."""
    tried_bytes: int | None = None
    """Size of the journal with an entry that was appended to find out if the fault has passed."""

    @property
    def reason(self) -> str:
        """The error's name and the system's words for it."""
        return f"{errno.errorcode.get(self.error.errno or 0, 'OSError')}: {self.error.strerror or self.error}"
