"""The steps of the first hour. Each takes a plan and returns figures; what cannot run here raises."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.conditions import conditions
from benchmarks.gpu.callers import OpenStreams, greedy, plain_clip, served
from benchmarks.gpu.journal import SkippedError, attempt, short
from benchmarks.gpu.machine import PeakMemory, gpus, has_vllm_omni, query, used_mib, versions
from benchmarks.gpu.parity import dollars_per_audio_hour, table
from benchmarks.gpu.systems import Omni, Reference, Service
from benchmarks.load.checks import BadAnswerError
from benchmarks.load.clips import alike, make
from benchmarks.program import CAPTIONER, CLIPS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.compare.systems import Server
    from benchmarks.gpu.plan import Plan

FILES = CLIPS / "first-hour"
_STOP_S = 180


def doctor(plan: Plan) -> dict[str, Any]:
    """Return what `captioner doctor` finds, the GPUs, and the versions. An error of the doctor is no failure here."""
    flags = [f"--model={plan.model}", *plan.flags()]
    command = [str(CAPTIONER), "doctor", "--json", "--part=engine", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"doctor: status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}") from None
    topology = _output(["nvidia-smi", "topo", "-m"]) if plan.gpus else ""
    return {"report": report, "gpus": gpus(), "topology": topology, "versions": versions(), "conditions": conditions()}


def parity(plan: Plan) -> dict[str, Any]:
    """Compare greedy captions of this service, twice, with those of `vllm serve`."""
    systems: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("vllm serve", partial(_captions, plan, lambda: Reference(plan, **plan.long_steps), named="audio_url")),
        ("captioner", partial(_captions, plan, lambda: Service(plan), repeats=2)),
    ]
    return _compared(attempt(systems), "vllm serve")


def runners(plan: Plan) -> dict[str, Any]:
    """Compare Model Runner V2 with V1: captions and audio-seconds per second."""
    variants: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (name, partial(_captions, plan, partial(Service, plan, {"VLLM_USE_V2_MODEL_RUNNER": value}), speed=True))
        for name, value in (("V2", "1"), ("V1", "0"))
    ]
    return _compared(attempt(variants), "V1")


def fp8(plan: Plan) -> dict[str, Any]:
    """Compare FP8 without and with the routers, and BF16. With the routers: `vllm serve`, which quantizes them."""
    quantization = plan.profile.get("quantization") or "fp8_per_channel"
    variants: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("unquantized", partial(_captions, plan, partial(Service, plan, None, quantization=None), speed=True)),
        (
            f"{quantization}, routers as they are",
            partial(_captions, plan, partial(Service, plan, None, quantization=quantization), speed=True),
        ),
        (
            f"{quantization}, routers too (vllm serve)",
            partial(
                _captions,
                plan,
                partial(Reference, plan, quantization=quantization, **plan.long_steps),
                named="audio_url",
            ),
        ),
    ]
    return _compared(attempt(variants), "unquantized")


def memory(plan: Plan) -> dict[str, Any]:
    """Return the peak of memory in a burst of requests: clips of 30 s, and every eighth one of the longest length."""
    short, long = plain_clip(FILES, 30), plain_clip(FILES, max(plan.lengths_s))
    with served(FILES) as address, Service(plan) as service:
        clips = [f"{address}/{(long if number % 8 == 0 else short).path.name}" for number in range(plan.burst)]
        with PeakMemory(service.family) as peak:
            found = asyncio.run(OpenStreams(service.url, clips, plan.tokens, 0).run())
        return {"burst": plan.burst, **found, **peak.as_json()}


def tensor_parallel(plan: Plan) -> dict[str, Any]:
    """Compare one GPU per engine with two: captions, audio-seconds per second, and memory."""
    if plan.gpus == 1:
        raise SkippedError("this machine has one GPU")
    variants: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (
            f"{count} per engine",
            partial(_captions, plan, partial(Service, plan, None, tensor_parallel=count), speed=True, count=count),
        )
        for count in (1, 2)
    ]
    return _compared(attempt(variants), "1 per engine")


def drain(plan: Plan) -> dict[str, Any]:
    """Stop the service while streams run and connections are idle: no stream is cut, and nothing is left behind."""
    clip = plain_clip(FILES, 30)
    before = _gpu_memory()
    with served(FILES) as address, Service(plan, None, shutdown_grace_s=_STOP_S) as service:
        members = service.family.members()
        streams = OpenStreams(service.url, [f"{address}/{clip.path.name}"] * min(16, plan.burst), plan.tokens * 4, 4)
        found = asyncio.run(_drained(service, streams))
        found["exit_status"] = service.process.wait(timeout=_STOP_S)
        _, alive = psutil.wait_procs(members, timeout=30)
        found["processes_left"] = [" ".join(each.cmdline())[:100] for each in alive]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found["port_can_be_bound"] = probe.connect_ex(("127.0.0.1", int(service.url.rpartition(":")[2]))) != 0
    return found | {"gpu_memory_before_mib": before, "gpu_memory_after_mib": _gpu_memory()}


async def _drained(service: Service, streams: OpenStreams) -> dict[str, Any]:
    running = asyncio.create_task(streams.run())
    await asyncio.wait_for(streams.started.wait(), _STOP_S)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    refused_s = None
    while not running.done():
        with socket.socket() as probe:
            probe.settimeout(1)
            refused = await asyncio.to_thread(probe.connect_ex, ("127.0.0.1", int(service.url.rpartition(":")[2])))
        if refused and refused_s is None:
            refused_s = round(time.monotonic() - began, 2)
        await asyncio.sleep(0.1)
    return {**running.result(), "refuses_after_s": refused_s, "streams_end_after_s": round(time.monotonic() - began, 2)}


def start(plan: Plan) -> dict[str, Any]:
    """Return the seconds of each phase of a start with empty caches, of one with kept caches, and first captions."""
    clip = plain_clip(FILES, 5)
    with tempfile.TemporaryDirectory(prefix="first-hour-cache-") as cache, served(FILES) as address:

        def started() -> dict[str, Any]:
            with Service(plan, {"VLLM_CACHE_ROOT": cache}) as service:
                ready = service.events("engine start times")
                captions = [greedy(service.url, f"{address}/{clip.path.name}", 2).e2e_s for _ in range(3)]
                return {
                    "ready_s": round(service.start_s, 1),
                    "engine": {key: value for each in ready for key, value in each.items() if key.endswith("_s")},
                    "first_captions_s": [round(each, 3) for each in captions],
                }

        found = attempt([("empty caches", started), ("kept caches", started)])
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return {**found, "cache_mib": round(size / 2**20, 1)}


def throughput(plan: Plan) -> dict[str, Any]:
    """Return audio-seconds per second, and dollars per hour of audio, of each system."""
    systems: list[tuple[str, Callable[[], Server]]] = [
        ("captioner", lambda: Service(plan)),
        ("vllm serve", lambda: Reference(plan)),
    ]
    if has_vllm_omni():
        systems.append(("vllm-omni", lambda: Omni(plan)))
    found = attempt([(name, partial(_speed, plan, kind)) for name, kind in systems])
    return {**found, "vllm-omni": found.get("vllm-omni", {"not measured": "not installed"})}


STEPS: Mapping[str, Callable[[Plan], dict[str, Any]]] = {
    of.__name__: of for of in (doctor, parity, runners, fp8, memory, tensor_parallel, drain, start, throughput)
}
"""In the order in which they run."""


def _captions(
    plan: Plan,
    kind: Callable[[], Server],
    *,
    named: str = "input_audio",
    repeats: int = 1,
    speed: bool = False,
    count: int = 0,
) -> dict[str, Any]:
    """Return a system's greedy captions by clip, and with `speed` its figures under load.

    `count` is the number of GPUs, if it is not the plan's.
    """
    clips = [plain_clip(FILES, seconds) for seconds in plan.lengths_s]
    with served(FILES) as address, kind() as system:
        found: dict[str, Any] = {"start_s": round(system.start_s, 1), "captions": {}, "seconds": {}, "input_tokens": {}}
        for clip in clips:
            url = f"{address}/{clip.path.name}"
            name = f"{clip.duration_s} s"
            try:
                answers = [greedy(system.url, url, plan.tokens, named=named) for _ in range(repeats)]
            except (BadAnswerError, OSError) as failure:
                found.setdefault("failed_clips", {})[name] = short(failure)
                continue
            found["captions"][name] = answers[0].text
            found["seconds"][name] = round(answers[-1].e2e_s, 2)
            found["input_tokens"][name] = answers[0].input_tokens
            if repeats > 1:
                found.setdefault("repeats_itself", {})[name] = len({answer.text for answer in answers}) == 1
        if not found["captions"]:
            raise RuntimeError(f"no caption: {found['failed_clips']}")
        found["memory_mib"] = {part: round(mib) for part, mib in used_mib(system.family).items()}
        if speed:
            found["load"] = _rounds(plan, system, count or plan.tensor_parallel)
    return found


def _compared(found: dict[str, dict[str, Any]], reference: str) -> dict[str, Any]:
    captions = {name: of["captions"] for name, of in found.items() if "captions" in of}
    return {"systems": found, "reference": reference, "agreement": table(captions, reference)}


def _speed(plan: Plan, kind: Callable[[], Server]) -> dict[str, Any]:
    with kind() as system:
        found = {"start_s": round(system.start_s, 1), **_rounds(plan, system, plan.tensor_parallel)}
        found["memory_mib"] = {part: round(mib) for part, mib in used_mib(system.family).items()}
    return found


def _rounds(plan: Plan, system: Server, count: int) -> dict[str, Any]:
    """Return the figures of rounds of 30 s clips, after one that is not measured. Raises `BadAnswerError`."""
    clips = alike(CLIPS / "30s", plan.requests * (plan.rounds + 1), 30)
    make(clips)
    batches = [clips[first : first + plan.requests] for first in range(0, len(clips), plan.requests)]
    system.measure(batches[0], plan.concurrency)
    rounds = [system.measure(batch, plan.concurrency) for batch in batches[1:]]
    per_s = [of.audio_s / of.wall_s for of in rounds]
    ttft = [answer.ttft_s for of in rounds for answer in of.answers if answer.ttft_s is not None]
    return {
        "requests": plan.requests,
        "concurrency": plan.concurrency,
        "tokens": plan.tokens,
        "audio_s_per_s": [round(each, 1) for each in per_s],
        "output_tokens_per_s": [round(of.requests * plan.tokens / of.wall_s, 1) for of in rounds],
        "ttft_p50_s": round(median(ttft), 3) if ttft else None,
        "dollars_per_audio_hour": dollars_per_audio_hour(
            median(per_s), count if plan.gpus else 0, plan.dollars_per_gpu_hour
        ),
    }


def _gpu_memory() -> dict[str, float]:
    return {of["index"]: float(of["memory.used"]) for of in query(("index", "memory.used"))}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout[-4000:]
    except (OSError, subprocess.TimeoutExpired) as failure:
        return f"{type(failure).__name__} ({os.fspath(command[0])})"
