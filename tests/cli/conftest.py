"""The doctor on a machine that a test has prepared."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from serving.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of this machine alone: state and caches in a directory of the test, no GPU, no hub's variables."""
    for name in [name for name in os.environ if name.startswith(("CAPTIONER_", "HF_", "VLLM_", "MODELSCOPE_"))]:
        monkeypatch.delenv(name)
    for name in ("CUDA_VISIBLE_DEVICES", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CAPTIONER_PORT", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def doctor(
    machine: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, list[tuple[str, str, str]]]]]:
    """Run the doctor; return its status, and level, message and remedy of the findings by probe."""

    def run(*flags: str) -> tuple[int, dict[str, list[tuple[str, str, str]]]]:
        status = main(["doctor", "--json", *flags])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (status == 0)
        found: dict[str, list[tuple[str, str, str]]] = {}
        for each in report["findings"]:
            assert bool(each["remedy"]) == (each["level"] != "ok")
            found.setdefault(each["probe"], []).append((each["level"], each["message"], each["remedy"]))
        return status, found

    return run


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program `nvidia-smi` with this shell script first on PATH."""

    def install(script: str) -> None:
        home = tmp_path / "bin"
        home.mkdir(exist_ok=True)
        (home / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (home / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")

    return install
