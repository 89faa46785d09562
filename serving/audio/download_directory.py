"""The directory of the downloads under way: private, bounded, shared between tenants, and swept after a kill."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
import uuid
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import Overloaded
from serving.scheduling.shared_capacity import SharedCapacity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import BinaryIO

    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

_PREFIX = "captioner-downloads-"
_BUFFER_BYTES = 256 * 1024

log = logging.getLogger(__name__)


class DownloadDirectory:
    """A private directory for the downloads under way, and the bound on their total size.

    The directory is locked. A killed process leaves its directory but not its lock, so the next process recognises the
    directory as abandoned and removes it.
    """

    def __init__(self, parent: Path, max_bytes: int) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # its owner is running, or is another user
                os.close(_lock(other))
                shutil.rmtree(other)
        # Locked before it gets a name that other services sweep.
        new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = _lock(new)
        self._directory = new.rename(parent / new.name.removeprefix("."))
        self._capacity = SharedCapacity(max_bytes, reason="downloads")

    @property
    def used_bytes(self) -> int:
        """Disk used by downloads, in bytes."""
        return self._capacity.used

    @asynccontextmanager
    async def file(self, scheduling_class: SchedulingClass) -> AsyncIterator[DownloadFile]:
        """Create a file that is removed when the context is left. Raises `Overloaded` if it cannot be created."""
        path = self._directory / uuid.uuid4().hex
        try:
            file = DownloadFile(self._capacity.permit(scheduling_class), path)
        except OSError:
            log.exception("cannot create a download file")
            raise Overloaded(reason="downloads") from None
        try:
            yield file
        finally:
            with suppress(OSError):
                file.close()
            try:
                # A write is not worth a thread (8 ms at worst for 256 KiB), but removing a GiB takes the disk 100 ms.
                await asyncio.shield(asyncio.to_thread(path.unlink))
            finally:
                file.permit.release()

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


class DownloadFile:
    """A download on its way to disk."""

    def __init__(self, permit: Permit, path: Path) -> None:
        self.path = path
        self.permit = permit
        self._file: BinaryIO = path.open("xb", buffering=_BUFFER_BYTES)

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises `Overloaded` if downloads use all the disk they may, `OSError` if the disk is full."""
        self.permit.grow(len(chunk))
        self._file.write(chunk)

    def restart(self) -> None:
        """Discard what was written, for a second attempt. Raises `OSError`."""
        self._file.seek(0)
        self._file.truncate()
        self.permit.release()

    def close(self) -> None:
        """Flush and close the file. Raises `OSError`."""
        self._file.close()


def _lock(directory: Path) -> int:
    """Lock a directory of ours until the returned descriptor is closed.

    Raises `OSError` if the directory is locked already, or belongs to another user.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{directory} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
