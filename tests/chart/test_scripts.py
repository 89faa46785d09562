"""Scripts that pods run: checksums of the checkpoint, creation of tenants, and the test that sends audio."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.chart.rendering import CHART

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.service import RunningService

FILES = CHART / "files"


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the chart's scripts."""
    command = [sys.executable, str(FILES / script), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Directory of two files; its parent directory has the sums of both."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"w" * 1000)
    sums = [f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in directory.iterdir()]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    return directory


def verify(checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """Verify as the init container of an engine does."""
    return run("model.py", "verify", checkpoint, CAPTIONER_MODEL_SUMS=str(checkpoint.parent / "SHA256SUMS"))


def test_a_complete_checkpoint_passes(checkpoint: Path) -> None:
    """It passes if every sum matches, and without sums if there is a configuration."""
    assert verify(checkpoint).returncode == 0
    (checkpoint.parent / "SHA256SUMS").write_text("")
    assert verify(checkpoint).returncode == 0


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "no config"])
def test_a_damaged_checkpoint_is_rejected(checkpoint: Path, damage: str) -> None:
    """The error names the file with a flipped bit, the truncated file, or the missing file."""
    weights = checkpoint / "model.safetensors"
    match damage:
        case "flipped bit":
            weights.write_bytes(b"v" + b"w" * 999)
        case "truncated":
            weights.write_bytes(b"w" * 999)
        case "missing":
            weights.unlink()
        case _:
            (checkpoint / "config.json").unlink()
    done = verify(checkpoint)
    assert done.returncode == 1
    assert ("config.json" if damage == "no config" else "model.safetensors") in done.stderr


HUB = """
import pathlib, types
def snapshot_download(name, revision, local_dir):
    directory = pathlib.Path(local_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(pathlib.Path(__file__).with_name("weights").read_bytes())
class HfApi:
    def model_info(self, name, revision, files_metadata):
        lfs = types.SimpleNamespace(sha256=pathlib.Path(__file__).with_name("sum").read_text())
        large = types.SimpleNamespace(rfilename="model.safetensors", lfs=lfs)
        return types.SimpleNamespace(siblings=[large, types.SimpleNamespace(rfilename="config.json", lfs=None)])
"""


def test_a_download_is_marked_only_when_its_sums_are_right(tmp_path: Path) -> None:
    """It is verified against the hub's sum, and a bad file is deleted for the next attempt; then engines may start."""
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / "sum").write_text(hashlib.sha256(b"right").hexdigest())
    directory = tmp_path / "models" / "m"
    environment = {"PYTHONPATH": str(tmp_path), "CAPTIONER_MODEL_SUMS": str(tmp_path / "SHA256SUMS")}
    (tmp_path / "weights").write_bytes(b"wrong")
    done = run("model.py", "fetch", directory, "org/m", "main", **environment)
    assert done.returncode == 1
    assert not (directory / "model.safetensors").exists()
    (tmp_path / "weights").write_bytes(b"right")
    assert run("model.py", "fetch", directory, "org/m", "main", **environment).returncode == 0
    assert run("model.py", "wait", directory, **environment).returncode == 0
    assert "already complete" in run("model.py", "fetch", directory, "org/m", "main", **environment).stdout
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  config.json\n")
    assert run("model.py", "fetch", directory, "org/m", "main", **environment).returncode == 1


def test_pods_of_one_node_download_once(tmp_path: Path) -> None:
    """The second of two pods with one directory waits for the first and finds the copy complete."""
    slow = "import time\n" + HUB.replace("    directory =", "    time.sleep(2)\n    directory =", 1)
    (tmp_path / "huggingface_hub.py").write_text(slow)
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / "weights").write_bytes(b"right")
    (tmp_path / "sum").write_text(hashlib.sha256(b"right").hexdigest())
    environment = {"PYTHONPATH": str(tmp_path), "CAPTIONER_MODEL_SUMS": str(tmp_path / "SHA256SUMS")}

    def fetch(_: int) -> str:
        done = run("model.py", "fetch", tmp_path / "m", "org/m", "main", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(fetch, range(2)))
    assert sorted("already complete" in output for output in outputs) == [False, True]


MODELSCOPE = """
import pathlib, types
def snapshot_download(model_id, revision, local_dir):
    directory = pathlib.Path(local_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(f"{model_id} {revision}")
    (directory / "model.safetensors").write_bytes(pathlib.Path(__file__).with_name("weights").read_bytes())
class HubApi:
    def list_repo_files(self, model_id, kind, revision):
        sums = pathlib.Path(__file__).with_name("sums").read_text().split()
        return [types.SimpleNamespace(path="model.safetensors", sha256=sum) for sum in sums]
"""


def test_a_download_from_modelscope_is_verified(tmp_path: Path) -> None:
    """The default branch is `master`; a wrong file is deleted, and a hub without sums fails the download."""
    for module in ("modelscope", "modelscope_hub"):
        (tmp_path / f"{module}.py").write_text(MODELSCOPE)
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / "sums").write_text(hashlib.sha256(b"right").hexdigest())
    (tmp_path / "weights").write_bytes(b"wrong")
    directory = tmp_path / "models" / "m"
    environment = {
        "PYTHONPATH": str(tmp_path),
        "CAPTIONER_MODEL_SUMS": str(tmp_path / "SHA256SUMS"),
        "VLLM_USE_MODELSCOPE": "True",
    }
    done = run("model.py", "fetch", directory, "org/m", "main", **environment)
    assert done.returncode == 1
    assert not (directory / "model.safetensors").exists()
    (tmp_path / "weights").write_bytes(b"right")
    done = run("model.py", "fetch", directory, "org/m", "main", **environment)
    assert done.returncode == 0, done.stderr
    assert (directory / "config.json").read_text() == "org/m master"
    assert run("model.py", "wait", directory, **environment).returncode == 0
    assert "already complete" in run("model.py", "fetch", directory, "org/m", "main", **environment).stdout
    (tmp_path / "sums").write_text("")
    done = run("model.py", "fetch", directory, "org/m", "v1.0", **environment)
    assert (done.returncode, done.stderr) == (1, "ModelScope has no sums for the files; set model.checksums\n")
    assert (directory / "config.json").read_text() == "org/m v1.0"


def test_a_download_from_modelscope_needs_its_package(tmp_path: Path) -> None:
    """The error names the package and the image that has it."""
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / "modelscope.py").write_text("raise ModuleNotFoundError(name='modelscope')")
    environment = {"PYTHONPATH": str(tmp_path), "CAPTIONER_MODEL_SUMS": str(tmp_path / "SHA256SUMS")}
    done = run("model.py", "fetch", tmp_path / "m", "org/m", "main", VLLM_USE_MODELSCOPE="1", **environment)
    expected = "the package modelscope is not in this image; use an image of the cuda variant\n"
    assert (done.returncode, done.stderr) == (1, expected)


CAPTIONER = """#!/bin/sh
echo "$@" >> calls
case "$1 $2 $3" in "tenants show old") exit 0;; "tenants show "*) exit 1;; esac
"""


def test_tenants_are_created_once(tmp_path: Path) -> None:
    """Existing tenants stay unchanged; missing ones are created with their plan and region."""
    (tmp_path / "captioner").write_text(CAPTIONER)
    (tmp_path / "captioner").chmod(0o755)
    script = tmp_path / "tenants.py"
    script.write_text((FILES / "tenants.py").read_text())
    tenants = [{"name": "old"}, {"name": "new", "plan": "standard", "region": "singapore"}]
    (tmp_path / "tenants.json").write_text(json.dumps(tenants))
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run([sys.executable, script], cwd=tmp_path, env=path, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["tenants show old", "tenants show new", "tenants create new --plan=standard --region=singapore"]


def test_the_release_test_accepts_good_captions(fake_service: RunningService) -> None:
    """It requests captions in both dialects, streamed and not streamed."""
    done = run("caption.py", fake_service.url, 30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_release_test_rejects_a_wrong_caption_and_a_refused_connection(fake_service: RunningService) -> None:
    """It fails for the fake engine, whose caption lacks the voice, and for a port where nothing listens."""
    done = run("caption.py", fake_service.url, 30, "embedded")
    assert done.returncode == 1
    assert "the voice is missing" in done.stderr
    done = run("caption.py", "http://127.0.0.1:9", 1)
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_the_release_test_requires_a_url() -> None:
    """For a release without a Service the error names the missing value at once."""
    done = run("caption.py", "", 300)
    assert done.returncode == 1
    assert "test.url is required" in done.stderr
