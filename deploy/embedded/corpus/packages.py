"""Debian packages whose contents are read without installing them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WANTED = ("*.wav", "*.ogg", "*.flac", "*.mp3", "*copyright", "*/fortunes/*", "*/fr/*.html")


def unpack(sounds: Path, packages: Iterable[str]) -> None:
    """Unpack the audio, texts and licences of each package into a folder of its name; skip those already there."""
    sounds.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if (sounds / package).exists():
            continue
        part = sounds / f"{package}.part"
        part.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=part, check=True)
        deb = next(part.glob("*.deb"))
        with subprocess.Popen(["dpkg", "--fsys-tarfile", deb.name], cwd=part, stdout=subprocess.PIPE) as contents:
            # tar complains about patterns that match nothing in this package.
            subprocess.run(["tar", "-x", "--wildcards", *WANTED], cwd=part, stdin=contents.stdout, check=False)
        deb.unlink()
        part.rename(sounds / package)
        print(f"unpacked {package}", flush=True)
