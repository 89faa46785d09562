"""Programs and files of Debian packages that tests need, installed if missing."""

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
    "chromium": "chromium",
    "java": "default-jdk-headless",
}
_SOUND_FONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")


def program(name: str) -> str:
    """Return the path of a program, installing it if missing. Raises `RuntimeError` if that fails."""
    if found := shutil.which(name):
        return found
    _install(_PACKAGES[name])
    if not (found := shutil.which(name)):
        raise RuntimeError(f"the package {_PACKAGES[name]} was installed but has no program {name}")
    return found


def sound_font() -> Path:
    """Return the path of a small General MIDI sound font; install it and its player if missing.

    Raises `RuntimeError` if the installation fails.
    """
    if not _SOUND_FONT.exists() or not find_library("fluidsynth"):
        _install("timgm6mb-soundfont", "libfluidsynth3")
    return _SOUND_FONT


def _install(*packages: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(f"install the missing packages (on Debian: apt-get install {' '.join(packages)})")
    with Path("/var/lock/captioner-tests-apt").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=280, check=False
            )
            if done.returncode and command[0] == "install":
                raise RuntimeError(f"cannot install {' '.join(packages)}:\n{done.stdout}{done.stderr}")
