"""Locust against a server with planted faults: a run with one wrong answer fails."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest

from benchmarks.load.clips import BANK_FILES
from tests.benchmarks.locust_runs import TIMEOUT_S, command, read, run, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.benchmarks.faulty_server import FaultyServer


def test_an_honest_server_passes_in_all_ways(url: str, clips: Path, tmp_path: Path) -> None:
    """Both dialects, streamed and not, have separate entries, with every figure of the way."""
    ways = "openai,openai-stream,dashscope,dashscope-stream"
    status, entries, printed = run(f"{url}/honest", clips, tmp_path / "journal", f"--ways={ways}")
    assert status == 0, printed
    assert {one["way"] for one in entries} == set(ways.split(","))
    assert {one["outcome"] for one in entries} == {"right"}
    assert all(("ttft_s" in one) == one["way"].endswith("-stream") for one in entries)
    for entry in ("E2E", "TTFT", "audio"):
        assert f"\n{entry} " in printed


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("empty", "empty"),
        ("same", "repeated"),
        ("doubled", "repeated"),
        ("truncates", "cut"),
        ("breaks-off", "cut"),
        ("no-done", "cut"),
        ("cached", "cached"),
        ("x-cache", "cached"),
        ("cached-tokens", "cached"),
        ("bills-more", "usage"),
        ("bad-sum", "usage"),
        ("few-tokens", "usage"),
        ("same-id", "id"),
        ("changing-id", "id"),
        ("no-id", "id"),
        ("error-200", "failed"),
    ],
)
def test_a_planted_fault_makes_the_run_fail(url: str, clips: Path, tmp_path: Path, fault: str, kind: str) -> None:
    """The exit status marks the run as wrong, and the journal names the wrong answers and the reasons."""
    # Only OpenAI's dialect reports cached tokens, and has an end marker.
    ways = "openai-stream" if fault in ("cached-tokens", "no-done") else "openai-stream,dashscope-stream"
    flags = (f"--ways={ways}", f"--probe-share={int(fault == 'cached')}", "--seconds=1")
    status, entries, printed = run(f"{url}/{fault}", clips, tmp_path / "journal", *flags)
    assert status == 3, printed
    wrong = [one for one in entries if one["outcome"] != "right"]
    assert {one["outcome"] for one in wrong} == {kind}
    assert all(one["detail"] for one in wrong)
    # Of answers that are wrong only in relation to another one, the first is right.
    if fault not in ("same", "same-id", "cached"):
        assert {one["way"] for one in wrong} == set(ways.split(",")) == {one["way"] for one in entries}


def test_a_run_without_a_right_answer_fails(url: str, clips: Path, tmp_path: Path) -> None:
    """An overloaded server may refuse some requests, but not all."""
    status, entries, printed = run(f"{url}/refused", clips, tmp_path / "journal")
    assert status == 4, printed
    assert {one["outcome"] for one in entries} == {"refused"}


def test_clips_can_be_sent_again(faulty: FaultyServer, url: str, clips: Path, tmp_path: Path) -> None:
    """With a fixed set of clips the same audio is sent repeatedly, and another caption for it is a wrong answer."""
    flags = (
        "--clips-per-length=1",
        "--mix=2,1",
        "--usage-rule=any",
        "--seconds=1",
        "--max-pause-s=0.1",
        "--probe-share=0",
    )
    status, entries, printed = run(f"{url}/by-clip", clips, tmp_path / "right", *flags)
    assert status == 0, printed
    assert len(entries) > len({str(body["messages"]) for _, _, body in faulty.requests}) == 2
    status, entries, printed = run(f"{url}/honest", clips, tmp_path / "wrong", *flags)
    assert status == 3, printed
    assert {entry["outcome"] for entry in entries} == {"right", "changed"}


def test_latency_counts_from_when_a_request_was_due(url: str, clips: Path, tmp_path: Path) -> None:
    """An open loop keeps its rate while a server is slow, and waiting for the server counts."""
    flags = ("--arrivals=even", "--load=4", "--user-rate=1", "--seconds=3")
    status, entries, printed = run(f"{url}/slow", clips, tmp_path / "journal", *flags)
    assert status == 0, printed
    assert len(entries) >= 9
    assert all(one["e2e_s"] == pytest.approx(one["ended"] - one["due"], abs=0.2) for one in entries)
    # The server takes 0.7 s for each request, one at a time, and gets one every quarter second.
    assert max(one["e2e_s"] for one in entries) > 2.5
    assert max(one["due"] for one in entries) - min(one["due"] for one in entries) < 4


def test_workers_share_no_clip(faulty: FaultyServer, url: str, clips: Path, tmp_path: Path) -> None:
    """Each worker process has its own clips; all workers are one run with one journal."""
    flags = ("--processes=2", "--probe-share=0", "--load=4")
    status, entries, printed = run(f"{url}/honest", clips, tmp_path / "journal", *flags)
    assert status == 0, printed
    sent = [str(body["messages"]) for _, _, body in faulty.requests]
    assert len(sent) == len(set(sent)) == len(entries) == len({one["clip"] for one in entries})
    assert len({one["clip"] // 1_000_000 for one in entries}) == 2


def test_worker_processes_encode_their_sounds(url: str, tmp_path: Path) -> None:
    """The first run in a directory ends, too: a fork of a Locust process, with its sockets, would encode for ever."""
    status, entries, printed = run(f"{url}/honest", tmp_path, tmp_path / "journal", "--processes=2", "--codecs=amr")
    assert status == 0, printed
    assert len({one["clip"] // 1_000_000 for one in entries}) == 2
    assert len(list(tmp_path.glob("*.amr"))) == BANK_FILES


def test_no_process_outlives_a_run(url: str, clips: Path, tmp_path: Path) -> None:
    """A run that is given up ends with its worker processes, even if its master was killed."""
    own = command(f"{url}/honest", clips, tmp_path / "journal", "--processes=2", "--seconds=60")
    with running(own, clips, tmp_path / "log") as process:
        deadline = time.monotonic() + 60
        while not read(tmp_path / "journal") and time.monotonic() < deadline:
            time.sleep(0.1)
        group = {one.pid: one for one in psutil.Process(process.pid).children(recursive=True)}
        process.kill()
    assert len(group) == 2
    _, alive = psutil.wait_procs(group.values(), timeout=10)
    assert not alive


def test_repeats_over_workers_are_noticed(url: str, clips: Path, tmp_path: Path) -> None:
    """The master finds repeats that no single worker can see, and the run fails."""
    flags = ("--processes=2", "--probe-share=0", "--seconds=2")
    status, entries, printed = run(f"{url}/same-on-each-connection", clips, tmp_path / "journal", *flags)
    assert status == 3, printed
    wrong = [one for one in entries if one["outcome"] != "right"]
    assert {(one["outcome"], one["way"]) for one in wrong} == {("repeated", "all workers")}


def test_configuration_reaches_the_wire(faulty: FaultyServer, url: str, clips: Path, tmp_path: Path) -> None:
    """Keys, the model's name, and the base of each dialect, even on another host, reach the server."""
    flags = (
        "--ways=openai-stream,dashscope",
        "--model=another-captioner",
        f"--openai-base-url={url}/honest/openai/v9",
        "--dashscope-base-url=/native/v9",
    )
    status, entries, printed = run(f"{url}/honest/else", clips, tmp_path / "journal", *flags, keys="sk-a=3,sk-b")
    assert status == 0, printed
    paths = {
        "/honest/openai/v9/chat/completions",
        "/honest/else/native/v9/services/aigc/multimodal-generation/generation",
    }
    assert {path for path, _, _ in faulty.requests} == paths
    assert {key for _, key, _ in faulty.requests} == {"Bearer sk-a", "Bearer sk-b"}
    assert {body["model"] for _, _, body in faulty.requests} == {"another-captioner"}
    tenants = [one["tenant"] for one in entries]
    assert tenants.count(0) > tenants.count(1) > 0


CURVE_S = 10
BEFORE_AND_AFTER = {
    "constant": ("poisson", (0.1, 0.5), (0.5, 0.9), 0.5, 1.7),
    "ramp": ("even", (0.0, 0.4), (0.6, 1.0), 0, 0.6),
    "steps": ("poisson", (0.0, 0.4), (0.6, 1.0), 0, 0.6),
    "spike": ("even", (0.0, 0.3), (0.5, 0.6), 0, 0.5),
    "bursts": ("even", (0.65, 0.8), (0.45, 0.6), 0, 0.6),
    "diurnal": ("even", (0.0, 0.2), (0.4, 0.6), 0, 0.6),
}
"""By curve: arrivals, two parts of the run, and bounds of the ratio of their rates."""


def test_load_follows_its_curve(url: str, clips: Path, tmp_path: Path) -> None:
    """Requests are due at the rate of the curve, with even and with random arrivals."""
    flags = ("--load=12", "--user-rate=2", f"--seconds={CURVE_S}", "--levels=4,16", "--burst-s=2")
    began = {}
    with ExitStack() as stack:
        for curve, (arrivals, *_) in BEFORE_AND_AFTER.items():
            shape = (f"--curve={curve}", f"--arrivals={arrivals}")
            own = command(f"{url}/honest", clips, tmp_path / curve, *flags, *shape)
            began[curve] = stack.enter_context(running(own, clips, tmp_path / f"{curve}.log"))
        for curve, process in began.items():
            assert process.wait(TIMEOUT_S) == 0, (tmp_path / f"{curve}.log").read_text()
    for curve, (_, first, second, low, high) in BEFORE_AND_AFTER.items():
        due = [one["due"] for one in read(tmp_path / curve)]
        at = [(moment - min(due)) / CURVE_S for moment in due]
        rates = [sum(start <= of < end for of in at) / (end - start) for start, end in (first, second)]
        assert low <= rates[0] / rates[1] <= high, curve
