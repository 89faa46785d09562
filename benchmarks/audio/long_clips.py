"""Do long files make short clips wait? `python -m benchmarks.long_beside_short [--out FILE.json] [--before CHECKOUT]`.

A real service with the embedded checkpoint. Clips of 5 s arrive at a steady rate, by turns without and with files of
40 minutes beside them, so many of which are under way all the time. Told is the time to the first text of the short
ones, and per round the ratio of its 95th percentile with long files to that without. With `--before` the same is done
with the code of another checkout, by turns with this one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime as dt
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # the other modules are written to be started by their path

from systems import MODEL_NAME, Captioner, Setup
from wire import SAMPLING

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKOUT = Path(__file__).parents[1]
SHORT_S, LONG_S = 5, 2400
SAMPLE_RATE = 16_000
WARM_UP = 5
"""Requests that are sent first and not counted."""


@dataclass(slots=True)
class Phase:
    """What was seen of one stretch of time."""

    ttft_s: list[float] = field(default_factory=list)
    """Of the short clips."""
    long_ttft_s: list[float] = field(default_factory=list)
    longs_ended: int = 0
    machine_load: float = field(default_factory=lambda: os.getloadavg()[0])

    def percentile(self, share: int) -> float:
        """Of the short clips' times to first text."""
        return float(np.percentile(self.ttft_s, share))


class Checkout(Captioner):
    """The service as the code of one checkout has it."""

    def __init__(self, setup: Setup, root: Path) -> None:
        super().__init__(setup)
        self._root = root

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": str(self._root)}


def make_clip(path: Path, seed: int, duration_s: int) -> None:
    """Write noise that swells and fades, mono Opus of 16 kbit/s: 40 minutes fit into a request."""
    random = np.random.default_rng(seed)
    with av.open(path, "w", format="ogg") as file:
        stream = file.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", bit_rate=16_000)
        for start_s in range(0, duration_s, 5):
            swell = np.sin(np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE * random.uniform(1, 6)) ** 2
            samples = (swell * random.normal(0, 0.1, 5 * SAMPLE_RATE)).clip(-1, 1).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start_s * SAMPLE_RATE
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def body(clip: bytes, max_tokens: int) -> bytes:
    """One request."""
    audio = {"data": base64.b64encode(clip).decode(), "format": "ogg"}
    content = [{"type": "input_audio", "input_audio": audio}]
    messages = [{"role": "user", "content": content}]
    options = {"stream": True, "max_tokens": max_tokens, "ignore_eos": True, **SAMPLING}
    return json.dumps({"model": MODEL_NAME, "messages": messages, **options}).encode()


async def ttft_s(session: aiohttp.ClientSession, url: str, request: bytes) -> float:
    """Send one request and read it to its end. Raises unless it is answered with text."""
    began, first = time.perf_counter(), None
    headers = {"content-type": "application/json"}
    async with session.post(url, data=aiohttp.BytesPayload(request), headers=headers) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(f"in-stream error: {event}")
                if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                    first = time.perf_counter() - began
    if first is None:
        raise RuntimeError("an answer without text")
    return first


async def run_phase(url: str, shorts: Sequence[bytes], longs: Sequence[bytes], per_s: float) -> Phase:
    """Send each short one at its time, the long ones over and over beside them."""
    phase = Phase()
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def repeat(request: bytes) -> None:
            while True:
                phase.long_ttft_s.append(await ttft_s(session, url, request))
                phase.longs_ended += 1

        async def one(request: bytes, delay_s: float) -> float:
            await asyncio.sleep(delay_s)
            return await ttft_s(session, url, request)

        beside = [asyncio.create_task(repeat(request)) for request in longs]
        sent = [asyncio.create_task(one(request, i / per_s)) for i, request in enumerate(shorts)]
        # A long one that fails ends the phase: what it would show is not what it is about.
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*sent), *beside]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in beside:
            task.cancel()
        for end in done:
            end.result()
        phase.ttft_s = [task.result() for task in sent[WARM_UP:]]
        await asyncio.gather(*beside, return_exceptions=True)
    return phase


def report(rounds: dict[str, list[tuple[Phase, Phase]]], given: argparse.Namespace) -> str:
    """The figures as Markdown."""
    load = (
        f"{given.shorts} clips of {SHORT_S} s per phase, {given.per_s:g}/s; {given.longs} files of {LONG_S // 60} "
        "minutes under way"
    )
    lines = [
        "# Short clips beside long files",
        "",
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}. {load}. Times to first text in milliseconds.",
        "",
        "| Code | Round | p50 without | p50 with | p95 without | p95 with | p95 ratio | long: first text | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, pairs in rounds.items():
        for number, (alone, beside) in enumerate(pairs, 1):
            times = [alone.percentile(50), beside.percentile(50), alone.percentile(95), beside.percentile(95)]
            long = f"{np.median(beside.long_ttft_s):.0f} s" if beside.long_ttft_s else "none yet"
            cells = [name, number, *(f"{1000 * t:.0f}" for t in times), f"{times[3] / times[2]:.2f}", long]
            lines.append(f"| {' | '.join(map(str, cells))} | {alone.machine_load:.1f}, {beside.machine_load:.1f} |")
        ratios = [beside.percentile(95) / alone.percentile(95) for alone, beside in pairs]
        lines += [
            f"| **{name}** | median | | | | | **{np.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f}) | | |"
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--shorts", type=int, default=100, help="short clips per phase")
    arguments.add_argument("--per-s", type=float, default=1.0, help="short clips per second")
    arguments.add_argument("--longs", type=int, default=2, help="long files under way")
    arguments.add_argument("--max-tokens", type=int, default=64)
    arguments.add_argument("--model", type=Path, default=CHECKOUT / "serving" / "embedded" / "checkpoint")
    arguments.add_argument("--before", type=Path, help="a checkout to compare with")
    arguments.add_argument("--out", type=Path, help="where to write JSON, and the table beside it")
    given = arguments.parse_args()

    checkouts = {"now": CHECKOUT} | ({"before": given.before.resolve()} if given.before else {})
    rounds: dict[str, list[tuple[Phase, Phase]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="captioner-clips-") as directory:
        clips = [Path(directory, f"{seed}.ogg") for seed in range(given.shorts + WARM_UP + given.longs)]
        for seed, path in enumerate(clips):
            make_clip(path, seed, LONG_S if seed < given.longs else SHORT_S)
        requests = [body(path.read_bytes(), given.max_tokens) for path in clips]
    longs, shorts = requests[: given.longs], requests[given.longs :]
    setup = Setup(model=given.model, max_tokens=given.max_tokens, max_num_seqs=64)
    for number in range(given.rounds):
        for name, root in checkouts.items():
            with Checkout(setup, root) as service:
                url = f"{service.url}/v1/chat/completions"
                alone = asyncio.run(run_phase(url, shorts, (), given.per_s))
                rounds[name].append((alone, asyncio.run(run_phase(url, shorts, longs, given.per_s))))
        print(f"round {number + 1}", report(rounds, given), sep="\n", flush=True)
        if given.out:
            figures: dict[str, Any] = {
                name: [[asdict(phase) for phase in pair] for pair in pairs] for name, pairs in rounds.items()
            }
            given.out.write_text(json.dumps(figures) + "\n")
            given.out.with_suffix(".md").write_text(report(rounds, given))


if __name__ == "__main__":
    main()
