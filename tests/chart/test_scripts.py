"""The scripts that pods run: the checkpoint's sums, the bootstrap of tenants, and the test that sends audio."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.chart.rendering import CHART

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.service import RunningService

FILES = CHART / "files"


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One of the chart's scripts."""
    command = [sys.executable, str(FILES / script), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files, and beside the directory the sums of both."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"w" * 1000)
    sums = [f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in directory.iterdir()]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    return directory


def verify(checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """As before an engine."""
    return run("model.py", "verify", checkpoint, CAPTIONER_MODEL_SUMS=str(checkpoint.parent / "SHA256SUMS"))


def test_a_whole_checkpoint_passes(checkpoint: Path) -> None:
    """Every sum is right; without sums, that there is one."""
    assert verify(checkpoint).returncode == 0
    (checkpoint.parent / "SHA256SUMS").write_text("")
    assert verify(checkpoint).returncode == 0


@pytest.mark.parametrize("damage", ["a bit", "cut", "gone", "no config"])
def test_a_damaged_checkpoint_is_refused_and_told(checkpoint: Path, damage: str) -> None:
    """A flipped bit, a file that was cut, and one that is missing."""
    weights = checkpoint / "model.safetensors"
    match damage:
        case "a bit":
            weights.write_bytes(b"v" + b"w" * 999)
        case "cut":
            weights.write_bytes(b"w" * 999)
        case "gone":
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
    """Against the hub's sum; a bad file is thrown away, so that the next try gets it anew; then engines may start."""
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
    assert "whole already" in run("model.py", "fetch", directory, "org/m", "main", **environment).stdout
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  config.json\n")
    assert run("model.py", "fetch", directory, "org/m", "main", **environment).returncode == 1


CAPTIONER = """#!/bin/sh
echo "$@" >> calls
case "$1 $2 $3" in "tenants show old") exit 0;; "tenants show "*) exit 1;; esac
"""


def test_tenants_are_made_once(tmp_path: Path) -> None:
    """What is there is left as it is; what is missing is created with its plan and region."""
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


def test_the_release_test_finds_good_captions(fake_service: RunningService) -> None:
    """Asked in both dialects, whole and streamed."""
    done = run("caption.py", fake_service.url, 30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_release_test_finds_a_caption_that_is_none(fake_service: RunningService) -> None:
    """The fake engine did not hear the voice, and a server that is not there does not answer."""
    done = run("caption.py", fake_service.url, 30, "embedded")
    assert done.returncode == 1
    assert "the voice was not heard" in done.stderr
    done = run("caption.py", "http://127.0.0.1:9", 1)
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_the_release_test_wants_to_know_where_to_ask() -> None:
    """A release that has no Service for callers says which value names the place, instead of waiting."""
    done = run("caption.py", "", 300)
    assert done.returncode == 1
    assert "test.url is not set" in done.stderr
