"""A directory that no other user of the machine can read, replace or prepare for us."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def make_private(directory: Path, setting: str) -> None:
    """Create a directory for this user alone, or adopt it if it is one.

    Raises `PermissionError` if it belongs to another user or is a link, and `NotADirectoryError`. `setting` names the
    setting that the error asks to change.
    """
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    remedy = f"remove it, or set {setting} to a directory that only this user can write"
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except PermissionError:
        raise PermissionError(f"{setting}: {directory} belongs to another user: {remedy}") from None
    except OSError:
        kind = "a link" if directory.is_symlink() else "not a directory"
        raise NotADirectoryError(f"{setting}: {directory} is {kind}: {remedy}") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{setting}: {directory} belongs to another user: {remedy}")
        if stat.S_IMODE(found.st_mode) != 0o700:  # noqa: PLR2004 - a mode
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
