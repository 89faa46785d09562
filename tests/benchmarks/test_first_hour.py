"""The first hour on a GPU: a run can be resumed, no failure ends it, and its report says what is still unknown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gpu import first
from benchmarks.gpu.journal import FAILED, OK, PARTIAL, SKIPPED, Journal, SkippedError, attempt, short
from benchmarks.gpu.machine import query
from benchmarks.gpu.parity import agreement, dollars_per_audio_hour, table
from benchmarks.gpu.plan import Plan, plan_of
from benchmarks.gpu.report import UNKNOWN, markdown
from benchmarks.gpu.steps import STEPS
from benchmarks.gpu.systems import Omni, Reference, Service
from benchmarks.program import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.compare.systems import Server

H100 = ROOT / "deploy" / "profiles" / "1xh100-80g.toml"
FP8 = ROOT / "deploy" / "profiles" / "1xh100-80g-fp8.toml"


def raising(failure: Exception) -> Callable[[], dict[str, Any]]:
    """Return a step that fails."""

    def step() -> dict[str, Any]:
        raise failure

    return step


def test_a_run_is_resumed(tmp_path: Path) -> None:
    """A step that has succeeded is not repeated, unless asked for; a failed one is, and one whose file was cut."""
    calls: list[str] = []

    def step() -> dict[str, Any]:
        calls.append("good")
        return {"figure": 1}

    journal = Journal(tmp_path, 60)
    assert journal.run("bad", raising(RuntimeError("CUDA error: no kernel image")))["status"] == FAILED
    assert journal.run("good", step)["status"] == OK
    again = Journal(tmp_path, 60)
    assert again.run("good", step)["result"] == {"figure": 1}
    assert calls == ["good"]
    assert again.run("bad", step)["status"] == OK
    assert again.run("good", step, again=True)["status"] == OK
    assert calls == ["good", "good", "good"]
    (tmp_path / "steps" / "good.json").write_text('{"status": "o')
    assert Journal(tmp_path, 60).run("good", step)["status"] == OK
    assert len(calls) == 4


def test_failures_are_recorded(tmp_path: Path) -> None:
    """A step has the reason and the traceback of its failure; one that does not apply is skipped with its reason."""
    journal = Journal(tmp_path, 60)
    record = journal.run("bad", raising(ExceptionGroup("several", [OSError("one"), ValueError("two")])))
    assert record["reason"] == "ExceptionGroup: OSError: one; ValueError: two"
    assert "Traceback" in record["traceback"]
    skipped = journal.run("other", raising(SkippedError("this machine has one GPU")))
    assert (skipped["status"], skipped["reason"]) == (SKIPPED, "this machine has one GPU")
    assert len(short(RuntimeError("x" * 100_000))) < 4100


def test_a_step_that_hangs_ends(tmp_path: Path) -> None:
    """A step has a deadline, after which the next one can run."""
    journal = Journal(tmp_path, 1)
    began = time.monotonic()

    def step() -> dict[str, Any]:
        time.sleep(60)
        return {}

    record = journal.run("slow", step)
    assert time.monotonic() - began < 20
    assert (record["status"], record["reason"]) == (FAILED, "TimeoutError: not finished within 1 s")


def test_an_interrupt_leaves_no_record(tmp_path: Path) -> None:
    """Ctrl-C ends the run at once; the step is repeated by the next one."""

    def step() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path, 60).run("stopped", step)
    assert Journal(tmp_path, 60).read("stopped") is None


def test_a_variant_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    """A step with one result of two is partial; without any it has failed; its deadline is not a variant's failure."""
    good: tuple[str, Callable[[], dict[str, Any]]] = ("V2", lambda: {"x": 1})
    bad = ("V1", raising(RuntimeError("no")))
    assert attempt([bad, good]) == {"V1": {"failed": "RuntimeError: no"}, "V2": {"x": 1}}
    assert Journal(tmp_path, 60).run("mixed", lambda: {"systems": attempt([bad, good])})["status"] == PARTIAL
    with pytest.raises(RuntimeError, match="V1: RuntimeError: no"):
        attempt([bad])
    with pytest.raises(TimeoutError):
        attempt([good, ("late", raising(TimeoutError("late")))])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("A dog barks.", "A dog barks.", {"equal": True, "shared_words": 3, "words": [3, 3]}),
        ("A dog barks twice.", "A dog barks.", {"equal": False, "shared_words": 2, "words": [4, 3]}),
        ("A dog barks.", "", {"equal": False, "shared_words": 0, "words": [3, 0]}),
    ],
)
def test_agreement_counts_words_before_the_first_difference(one: str, other: str, expected: dict[str, Any]) -> None:
    """Equal texts are equal; else the common start counts."""
    assert agreement(one, other) == expected


def test_agreement_is_of_what_both_have() -> None:
    """A system without a caption of a clip, or a reference that has failed, has no agreement."""
    captions = {"vllm serve": {"5 s": "a b"}, "captioner": {"5 s": "a c", "30 s": "x"}}
    assert table(captions, "vllm serve") == {"captioner": {"5 s": {"equal": False, "shared_words": 1, "words": [2, 2]}}}
    assert table(captions, "another") == {}


def test_the_cost_of_an_hour_of_audio() -> None:
    """100 audio-seconds per second on two GPUs of 3.60 dollars an hour: 7.2 cents for an hour of audio."""
    assert dollars_per_audio_hour(100, 2, 3.6) == 0.072
    assert dollars_per_audio_hour(100, 0, 3.6) is None
    assert dollars_per_audio_hour(100, 2, None) is None
    assert dollars_per_audio_hour(0, 2, 3.6) is None


def test_nvidia_smi_is_read() -> None:
    """Each GPU is a row of the fields that were asked for."""
    rows = query(("index", "memory.used"), "0, 71234\n1, 12\n\n")
    assert rows == [{"index": "0", "memory.used": "71234"}, {"index": "1", "memory.used": "12"}]


def plan(tmp_path: Path, *flags: str) -> Plan:
    """Return the plan of a command line."""
    return plan_of([*flags, f"--out={tmp_path}"], list(STEPS), "")[0]


def command_of(system: Server) -> str:
    """Return the command line of a system that is not started."""
    system._temporary.cleanup()
    return " ".join(system.command)


def test_a_profile_is_measured_with_its_settings(tmp_path: Path) -> None:
    """Service and `vllm serve` get the same limits, memory and quantization, from the profile's file."""
    of = plan(tmp_path, f"--profile={FP8}", "--load-format=dummy")
    service, reference = Service(of), Reference(of)
    common = {"--dtype=bfloat16", "--max-num-seqs=", "--max-num-batched-tokens=8192", "--max-model-len=65536"}
    for system in (service, reference):
        command = command_of(system)
        assert all(flag in command for flag in common), command
        assert "Qwen/Qwen3-Omni-30B-A3B-Captioner" in command
    assert "--gpu-memory-utilization=0.92" in service.command
    assert "--gpu-memory-utilization=0.92" in reference.command
    assert "--load-format=dummy" in reference.command
    assert json.loads(service.environment["CAPTIONER_ENGINE_ARGS"]) == {"load_format": "dummy"}
    quantized = [
        {flag for flag in system.command if flag.startswith("--quantization=")} for system in (service, reference)
    ]
    assert quantized[0] == quantized[1] != set()
    plain = Service(plan(tmp_path, f"--profile={H100}"))
    assert "--max-num-seqs=96" in command_of(plain)
    assert "CAPTIONER_ENGINE_ARGS" not in plain.environment


def test_vllm_serve_admits_the_longest_clip(tmp_path: Path) -> None:
    """It encodes 40 minutes, 31,200 tokens, in one step; the service needs no such step."""
    of = plan(tmp_path, f"--profile={H100}")
    assert of.long_steps == {"max_num_batched_tokens": 32_768}
    command = command_of(Reference(of, **of.long_steps)).split()
    # The last of two equal options counts.
    assert [flag for flag in command if flag.startswith("--max-num-batched")][-1] == "--max-num-batched-tokens=32768"
    assert plan(tmp_path, f"--profile={H100}", "--lengths", "5").long_steps == {"max_num_batched_tokens": 8192}


def test_a_variant_overrides_the_profile(tmp_path: Path) -> None:
    """A step's own settings win, and None leaves one out."""
    of = plan(tmp_path, f"--profile={FP8}")
    assert "--quantization" not in command_of(Service(of, None, quantization=None))
    assert "--tensor-parallel=2" in command_of(Service(of, None, tensor_parallel=2))
    assert "--tensor-parallel-size=2" in command_of(Reference(of, tensor_parallel=2))
    assert "--omni" in command_of(Omni(of))
    v1 = Service(of, {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    assert "serve" in command_of(v1)
    assert v1.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_a_report_says_what_is_unknown() -> None:
    """Without a GPU everything is unknown; with one, what has not succeeded; each names an existing step."""
    steps: dict[str, Any] = {
        "parity": {
            "status": OK,
            "seconds": 9,
            "result": {
                "reference": "vllm serve",
                "systems": {"vllm serve": {"start_s": 1}, "captioner": {"repeats_itself": {"5 s": True}}},
                "agreement": {"captioner": {"30 s": agreement("a b", "a c"), "5 s": agreement("a", "a")}},
            },
        },
        "fp8": {"status": FAILED, "seconds": 1, "reason": "RuntimeError: a | b\nc"},
    }
    text = markdown({"model": "m", "gpus": 1, "load_format": "auto", "steps": steps})
    assert "| captioner | equal | 1 of 2 |" in text
    assert "| fp8 | failed | 1 | RuntimeError: a \\| b c |" in text
    assert [line for line in text.splitlines() if "(parity)" in line] == []
    assert "- captions under FP8 (fp8)" in text
    without = markdown({"model": "m", "gpus": 0, "load_format": "dummy", "steps": steps})
    assert all(f"- {unknown}" in without for unknown in UNKNOWN)
    assert "No GPU was used" in without
    assert "The weights are random" in without
    names = {unknown.rpartition("(")[2].rstrip(")") for unknown in UNKNOWN}
    assert names == STEPS.keys() - {"doctor"}


def test_another_plan_needs_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of different options are never mixed; a run without failures has status 0, with one 1."""
    monkeypatch.setattr(first, "STEPS", {"memory": lambda _: {"x": 1}, "drain": lambda _: {"y": 2}})
    out = f"--out={tmp_path}"
    assert first.main(["--small", out, "--only", "memory"]) == 0
    assert set(json.loads((tmp_path / "report.json").read_text())["steps"]) == {"memory"}
    assert first.main(["--small", out, "--tokens=5"]) == first.OTHER_PLAN
    monkeypatch.setattr(first, "STEPS", {"memory": lambda _: {"x": 1}, "drain": raising(OSError("no"))})
    assert first.main(["--small", out]) == 1
    assert "| drain | failed |" in (tmp_path / "report.md").read_text()


def test_the_cuda_environment_has_what_the_script_imports() -> None:
    """`make serve BUILD=cuda` installs every package that the steps need; nothing of the development lock is needed."""
    lock = (ROOT / "deploy" / "requirements" / "cuda.txt").read_text()
    locked = {line.split("==")[0].strip().lower() for line in lock.splitlines() if "==" in line}
    code = "import sys; import benchmarks.gpu.first; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert {"psutil", "aiohttp", "numpy", "scipy", "av"} <= {*loaded} & locked
    assert not {"locust", "jinja2", "httpx", "pytest", "gevent"} & {*loaded}


def test_the_script_states_what_is_untried() -> None:
    """The header of the script names what only a GPU can answer, and that vllm-omni was never run."""
    header = (ROOT / "benchmarks" / "gpu" / "first.sh").read_text().split("set -euo pipefail")[0]
    assert "Unknown until this has run on a GPU" in header
    assert re.search(r"vllm-omni, are untried", header)


@pytest.mark.timeout(400)
def test_a_run_with_a_fake_engine(tmp_path: Path) -> None:
    """The script runs as a user starts it: no stream is cut by a stop, and nothing is left behind."""
    command = [str(ROOT / "benchmarks" / "gpu" / "first.sh"), "--small", "--model=nobody/qwen3-omni-30b-a3b"]
    command += ["--lengths", "5", "30", "--burst=3", "--tokens=8", f"--out={tmp_path}", "--step-timeout=150"]
    fake = ["engine=fake", "fake-ttft-s=0.2", "fake-tpot-s=0.02", "fake-tokens=8"]
    command += ["--only", "doctor", "memory", "drain", "--service-flags", *fake]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=390)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert {name: of["status"] for name, of in steps.items()} == dict.fromkeys(("doctor", "memory", "drain"), OK)
    memory, drain = steps["memory"]["result"], steps["drain"]["result"]
    assert (memory["complete"], memory["failures"]) == (3, [])
    assert memory["peak_mib"].keys() >= {"frontend", "audio workers"}
    assert (drain["complete"], drain["idle_closed"], drain["exit_status"]) == (3, 4, 0)
    assert (drain["processes_left"], drain["port_can_be_bound"]) == ([], True)
    assert drain["refuses_after_s"] < drain["streams_end_after_s"]
