"""Programs and files of Debian packages that tests need: installed if they are missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from ctypes.util import find_library
from pathlib import Path

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "espeak-ng": "espeak-ng",
    "nginx": "nginx-light",
    "java": "default-jdk-headless",
}
_SOUND_FONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")


def program(name: str) -> str:
    """The path of a program, which is installed if need be. Raises `RuntimeError` if that cannot be done."""
    if found := shutil.which(name):
        return found
    _install(_PACKAGES[name])
    if not (found := shutil.which(name)):
        raise RuntimeError(f"{_PACKAGES[name]} was installed, but has no {name}")
    return found


def sound_font() -> Path:
    """A small General MIDI sound font, and the library that plays it. Raises `RuntimeError` as `program` does."""
    if not _SOUND_FONT.exists() or not find_library("fluidsynth"):
        _install("timgm6mb-soundfont", "libfluidsynth3")
    return _SOUND_FONT


def _install(*packages: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(f"something is missing; install it (Debian: apt-get install {' '.join(packages)})")
    with Path("/var/lock/captioner-tests-apt").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=280, check=False
            )
            if done.returncode and command[0] == "install":
                raise RuntimeError(f"{' '.join(packages)} could not be installed:\n{done.stdout}{done.stderr}")
