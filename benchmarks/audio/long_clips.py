"""Latency of short clips while long files are in progress.

    python -m benchmarks.audio.long_clips [--out FILE.json] [--before CHECKOUT]

A real service with the embedded checkpoint. Clips of 5 s arrive at a steady rate, in turns without long files and with
`--longs` files of 40 minutes in progress all the time. The figures are the times to first text of the short clips, and
per round the ratio of their 95th percentile with long files to that without. With `--before` the same is done with the
code of another checkout, in turns with this one. Prints a Markdown table after each round; `--out` writes the figures
(`FILE.json`) and the table (`FILE.md`).
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import av
import numpy as np

from benchmarks.compare.systems import Captioner, Setup
from benchmarks.load.wire import SAMPLING, chat_body
from benchmarks.program import CHECKPOINT, ROOT, option_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

SHORT_S, LONG_S = 5, 2400
SAMPLE_RATE = 16_000
WARM_UP = 5
"""Requests at the start that do not count."""


@dataclass(slots=True)
class Phase:
    """Latencies of one interval."""

    ttft_s: list[float] = field(default_factory=list)
    """Times to first text of the short clips."""
    long_ttft_s: list[float] = field(default_factory=list)
    longs_ended: int = 0
    machine_load: float = field(default_factory=lambda: os.getloadavg()[0])

    def percentile(self, share: int) -> float:
        """Return a percentile of the short clips' times to first text."""
        return float(np.percentile(self.ttft_s, share))


class Checkout(Captioner):
    """This service with the code of one checkout."""

    def __init__(self, setup: Setup, root: Path) -> None:
        super().__init__(setup)
        self._root = root

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, "PYTHONPATH": str(self._root)}


def make_clip(path: Path, seed: int, duration_s: int) -> None:
    """Write noise of varying loudness as mono Opus of 16 kbit/s, so that 40 minutes fit into a request."""
    random = np.random.default_rng(seed)
    with av.open(path, "w", format="ogg") as file:
        stream = file.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", bit_rate=16_000)
        for start_s in range(0, duration_s, 5):
            loudness = np.sin(np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE * random.uniform(1, 6)) ** 2
            samples = (loudness * random.normal(0, 0.1, 5 * SAMPLE_RATE)).clip(-1, 1).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start_s * SAMPLE_RATE
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def body(clip: bytes, max_tokens: int) -> bytes:
    """Return a request."""
    options = {"stream": True, "max_tokens": max_tokens, "ignore_eos": True, **SAMPLING}
    return json.dumps(chat_body(base64.b64encode(clip).decode(), "ogg", **options)).encode()


async def ttft_s(session: aiohttp.ClientSession, url: str, request: bytes) -> float:
    """Send a request and read its answer; return the time to first text. Raises unless there is text."""
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
    """Send each short request at its time, while the long ones are sent over and over."""
    phase = Phase()
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def repeat(request: bytes) -> None:
            while True:
                phase.long_ttft_s.append(await ttft_s(session, url, request))
                phase.longs_ended += 1

        async def send_at(request: bytes, delay_s: float) -> float:
            await asyncio.sleep(delay_s)
            return await ttft_s(session, url, request)

        repeated = [asyncio.create_task(repeat(request)) for request in longs]
        sent = [asyncio.create_task(send_at(request, i / per_s)) for i, request in enumerate(shorts)]
        # A failed long request ends the phase: without it the phase would not show its effect.
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*sent), *repeated]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in repeated:
            task.cancel()
        for end in done:
            end.result()
        phase.ttft_s = [task.result() for task in sent[WARM_UP:]]
        await asyncio.gather(*repeated, return_exceptions=True)
    return phase


def report(rounds: dict[str, list[tuple[Phase, Phase]]], options: argparse.Namespace) -> str:
    """Return the figures as Markdown."""
    load = (
        f"{options.shorts} clips of {SHORT_S} s per phase, {options.per_s:g}/s; {options.longs} files of "
        f"{LONG_S // 60} minutes in progress"
    )
    lines = [
        "# Short clips while long files are in progress",
        "",
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}. {load}. Times to first text in milliseconds.",
        "",
        "| Code | Round | p50 without | p50 with | p95 without | p95 with | p95 ratio | long: first text | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, pairs in rounds.items():
        for number, (without, with_) in enumerate(pairs, 1):
            times = [without.percentile(50), with_.percentile(50), without.percentile(95), with_.percentile(95)]
            long = f"{np.median(with_.long_ttft_s):.0f} s" if with_.long_ttft_s else "none yet"
            cells = [name, number, *(f"{1000 * t:.0f}" for t in times), f"{times[3] / times[2]:.2f}", long]
            lines.append(f"| {' | '.join(map(str, cells))} | {without.machine_load:.1f}, {with_.machine_load:.1f} |")
        ratios = [with_.percentile(95) / without.percentile(95) for without, with_ in pairs]
        lines += [
            f"| **{name}** | median | | | | | **{np.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f}) | | |"
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and write."""
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shorts", type=int, default=100, help="short clips per phase")
    parser.add_argument("--per-s", type=float, default=1.0, help="short clips per second")
    parser.add_argument("--longs", type=int, default=2, help="long files in progress")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--out", type=Path, help="path of the JSON; the table gets the suffix .md")
    options = parser.parse_args()

    checkouts = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    rounds: dict[str, list[tuple[Phase, Phase]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="captioner-clips-") as directory:
        clips = [Path(directory, f"{seed}.ogg") for seed in range(options.shorts + WARM_UP + options.longs)]
        for seed, path in enumerate(clips):
            make_clip(path, seed, LONG_S if seed < options.longs else SHORT_S)
        requests = [body(path.read_bytes(), options.max_tokens) for path in clips]
    longs, shorts = requests[: options.longs], requests[options.longs :]
    setup = Setup(model=options.model, max_tokens=options.max_tokens, max_num_seqs=64)
    for number in range(options.rounds):
        for name, root in checkouts.items():
            with Checkout(setup, root) as service:
                url = f"{service.url}/v1/chat/completions"
                without = asyncio.run(run_phase(url, shorts, (), options.per_s))
                rounds[name].append((without, asyncio.run(run_phase(url, shorts, longs, options.per_s))))
        print(f"round {number + 1}", report(rounds, options), sep="\n", flush=True)
        if options.out:
            figures: dict[str, Any] = {
                name: [[asdict(phase) for phase in pair] for pair in pairs] for name, pairs in rounds.items()
            }
            options.out.write_text(json.dumps(figures) + "\n")
            options.out.with_suffix(".md").write_text(report(rounds, options))


if __name__ == "__main__":
    main()
