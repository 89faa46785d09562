"""Progress of an engine's start: the phase, its seconds, and an estimate by an earlier start with the same caches."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from serving.config import Settings
from serving.engine.vllm import engine as module
from serving.engine.vllm import start_progress
from serving.engine.vllm.engine import VllmEngine, _environment
from serving.engine.vllm.start_progress import PHASES, StartProgress, cache_root, mark
from serving.errors import EngineFailed, NotReady


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def time(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """The clock of this module, with caches in a directory of the test."""
    clock = Clock()
    monkeypatch.setattr(start_progress, "time", clock)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "caches"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return clock


def one_start(clock: Clock, scratch: Path, settings: Settings) -> StartProgress:
    """Return the progress after a start: processes, weights, compilation, graphs, captions."""
    (scratch / "start-progress").unlink(missing_ok=True)
    progress = StartProgress(settings, scratch)
    for seconds, phase in ((5, "weights"), (40, "compile"), (30, "graphs"), (10, "captions")):
        clock.now += seconds
        if phase == "captions":
            progress.mark(phase)
        else:
            mark(phase)
    clock.now += 2
    return progress


def test_the_seconds_of_each_phase(clock: Clock, tmp_path: Path) -> None:
    """Phases of vLLM's process and of the service are one sequence; a phase that did not occur is absent."""
    progress = one_start(clock, tmp_path, Settings())
    assert progress.seconds() == {"process": 5.0, "weights": 40.0, "compile": 30.0, "graphs": 10.0, "captions": 2.0}
    assert progress.phase == "captions"
    assert progress.describe() == (
        "warming up with captions of silence for 2 s, 87 s in total; no earlier start with these caches to compare with"
    )


def test_an_estimate_by_the_last_start(clock: Clock, tmp_path: Path) -> None:
    """The rest of this phase and the later phases of the last start; none for another model, or past its time."""
    one_start(clock, tmp_path, Settings()).keep()
    (tmp_path / "start-progress").unlink()
    progress = StartProgress(Settings(), tmp_path)
    clock.now += 5
    mark("weights")
    clock.now += 10
    assert progress.remaining_s() == 30 + 30 + 10 + 2
    assert progress.describe() == "loading the weights for 10 s, 15 s in total; about 72 s left, by the last start"
    clock.now += 50
    assert progress.remaining_s() is None
    expected = "loading the weights for 60 s, 65 s in total; longer than the last start, which took 87 s"
    assert progress.describe() == expected
    assert StartProgress(Settings(max_num_seqs=8), tmp_path).remaining_s() is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"weights": "many"}}'])
def test_a_damaged_record_is_no_estimate(clock: Clock, tmp_path: Path, text: str) -> None:
    """The start goes on without an estimate, and replaces the record."""
    file = tmp_path / "caches" / "captioner-start-seconds.json"
    file.parent.mkdir()
    file.write_text(text)
    progress = one_start(clock, tmp_path, Settings())
    assert progress.remaining_s() is None
    progress.keep()
    assert [each["weights"] for each in json.loads(file.read_text()).values()] == [40.0]


def test_records_are_bounded(clock: Clock, tmp_path: Path) -> None:
    """At most 32 starts are kept, the latest ones."""
    for count in range(1, 40):
        one_start(clock, tmp_path, Settings(max_num_seqs=count)).keep()
    assert len(json.loads((tmp_path / "caches" / "captioner-start-seconds.json").read_text())) == 32
    (tmp_path / "start-progress").unlink()
    assert StartProgress(Settings(max_num_seqs=39), tmp_path).remaining_s() == 87
    assert StartProgress(Settings(max_num_seqs=1), tmp_path).remaining_s() is None


def test_caches_that_cannot_be_written(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the record nor the progress is a condition of a start."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/proc/version/caches")
    progress = one_start(clock, tmp_path, Settings())
    assert progress.keep()["weights"] == 40
    monkeypatch.setenv("TMPDIR", "/proc/version")
    mark("graphs")
    monkeypatch.delenv("TMPDIR")
    mark("graphs")


def test_caches_are_below_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels outlive the engine's directory for temporary files; the operator's own variables win."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "caches"))
    monkeypatch.setenv("CUDA_CACHE_PATH", "/elsewhere")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.delenv(name, raising=False)
    with _environment(Settings(), tmp_path):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "caches" / "triton")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "caches" / "inductor")
        assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "caches" / "flashinfer")
        assert os.environ["CUDA_CACHE_PATH"] == "/elsewhere"
        assert os.environ["TMPDIR"] == str(tmp_path)
    assert "TRITON_CACHE_DIR" not in os.environ


def test_the_default_directory_is_vllms(tmp_path: Path) -> None:
    """Without a variable the caches are where vLLM has them."""
    assert str(cache_root({"XDG_CACHE_HOME": "/x"})) == "/x/vllm"
    assert cache_root({}).parts[-2:] == (".cache", "vllm")
    assert str(cache_root({"VLLM_CACHE_ROOT": "/y", "XDG_CACHE_HOME": "/x"})) == "/y"


async def test_a_start_reports_its_phases(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Each phase is a log line, `check_health` says how far the start is, and callers get no word of it."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    caplog.set_level("INFO")
    engine = VllmEngine(Settings())
    with pytest.raises(NotReady) as before:
        await engine.check_health()
    assert before.value.progress == ""

    def load() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", engine._scratch.name)
            for phase in ("weights", "compile"):
                mark(phase)
                time.sleep(0.2)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(engine, "_load", load)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.1)
    with pytest.raises(NotReady) as during:
        await engine.check_health()
    assert during.value.progress.startswith("loading the weights for 0 s")
    assert str(during.value) == "Model is unavailable, please try again later."
    with pytest.raises(EngineFailed):
        await starting
    phases = [vars(record)["phase"] for record in caplog.records if record.message == "engine start"]
    assert phases[-2:] == ["weights", "compile"]
    await engine.stop()
    with pytest.raises(NotReady) as after:
        await engine.check_health()
    assert after.value.progress == ""


def test_phases_are_named_by_the_executor() -> None:
    """Every phase that the executor marks has a description."""
    source = (Path(start_progress.__file__).parent / "executor.py").read_text()
    marked = {line.split('"')[1] for line in source.splitlines() if line.strip().startswith("mark(")}
    assert marked == {"weights", "compile", "cache", "graphs"}
    assert marked | {"process", "captions"} == PHASES.keys()
