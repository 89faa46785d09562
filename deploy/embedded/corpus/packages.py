"""Download of Debian and npm packages, whose contents are read without installing them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WANTED = ("*.wav", "*.gsm", "*.ogg", "*.flac", "*.mp3", "*copyright", "*/fortunes/*", "*/help/*.html")


def unpack(sounds: Path, packages: Iterable[str]) -> None:
    """Unpack audio, texts and licences of each Debian package into a folder of its name; skip existing folders."""
    sounds.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if (sounds / package).exists():
            continue
        part = sounds / f"{package}.part"
        part.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=part, check=True)
        deb = next(part.glob("*.deb"))
        with subprocess.Popen(["dpkg", "--fsys-tarfile", deb.name], cwd=part, stdout=subprocess.PIPE) as contents:
            # tar fails on patterns that match nothing in this package.
            command = ["tar", "-x", "--wildcards", *WANTED]
            subprocess.run(command, cwd=part, stdin=contents.stdout, stderr=subprocess.DEVNULL, check=False)
        deb.unlink()
        part.rename(sounds / package)
        print(f"unpacked {package}", flush=True)


def unpack_npm(sounds: Path, packages: Iterable[str]) -> None:
    """Unpack each npm package `name@version` into a folder named without scope and version; skip existing folders."""
    sounds.mkdir(parents=True, exist_ok=True)
    for package in packages:
        name = package.rpartition("@")[0].rpartition("/")[2]
        if (sounds / name).exists():
            continue
        part = sounds / f"{name}.part"
        part.mkdir(exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=part, check=True, stdout=subprocess.DEVNULL)
        packed = next(part.glob("*.tgz"))
        subprocess.run(["tar", "-xzf", packed.name], cwd=part, check=True)
        packed.unlink()
        part.rename(sounds / name)
        print(f"unpacked {name}", flush=True)
