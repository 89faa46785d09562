"""Prometheus and Alertmanager, as Debian packages them: installed if they are missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
}


def program(name: str) -> str:
    """The path of a program, which is installed if need be. Raises `RuntimeError` if that cannot be done."""
    if found := shutil.which(name):
        return found
    package = _PACKAGES[name]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(f"{name} is missing; install it (Debian: apt-get install {package})")
    with Path("/var/lock/captioner-tests-apt").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", package]):
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=280, check=False
            )
            if done.returncode and command[0] == "install":
                raise RuntimeError(f"{package} could not be installed:\n{done.stdout}{done.stderr}")
    if not (found := shutil.which(name)):
        raise RuntimeError(f"{package} was installed, but has no {name}")
    return found
