"""The long form of the fuzzing tests.

    python -m tests.hardening --share 1.0 [--target openai] [--first 0]
    python -m tests.hardening --guided 600 [--target openai]

The first tries a million inputs over all targets (with `--share 0.1`: a tenth), made from intact ones by their
structure; the second lets atheris (libFuzzer) look for inputs that reach new code, for some seconds for each target. An
input that breaks a promise is kept in `corpus/`, which the tests replay.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

from tests.hardening import fuzz
from tests.hardening.targets import TARGETS

_SCRATCH = Path(__file__).parents[2] / ".cache" / "hardening"


def main() -> int:
    """Run the chosen targets and print a line about each. Returns the exit status: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.hardening", description="Fuzz parsers at length")
    parser.add_argument("--share", type=float, default=1.0, help="Share of a million inputs")
    parser.add_argument("--guided", type=float, default=0.0, help="Time in seconds for each target, guided by coverage")
    parser.add_argument("--target", choices=TARGETS, action="append", help="Target. Default: all")
    parser.add_argument("--first", type=int, default=0, help="Number of the first input")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    targets = arguments.target or list(TARGETS)
    if arguments.guided:
        return max(_guided(target, arguments.guided) for target in targets if not TARGETS[target].isolated)
    return max(_run(target, arguments.share, arguments.first) for target in targets)


def _run(target: str, share: float, first: int) -> int:
    began = time.monotonic()
    result = fuzz.run(target, range(first, first + int(TARGETS[target].inputs * share)))
    grown_mib, took_s = result.grown_bytes / 2**20, time.monotonic() - began
    print(  # noqa: T201 - the output of a program
        f"{target}: {result.inputs:,} inputs, {len(result.faults)} faults, slowest {result.slowest_s:.3f} s of CPU, "
        f"memory {grown_mib:+.1f} MiB, {took_s:.0f} s",
        flush=True,
    )
    seeds = TARGETS[target].seeds()
    for number, problem in result.faults.items():
        kept = fuzz.CORPUS / target / f"{number}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(fuzz.made(target, number, seeds))
        print(f"  {kept}: {problem[:300]}", flush=True)  # noqa: T201
    return int(bool(result.faults) or result.grown_bytes > fuzz.MAX_GROWTH_BYTES)


def _guided(target: str, seconds: float) -> int:
    known, found = _SCRATCH / target, fuzz.CORPUS / target
    known.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(TARGETS[target].seeds()):
        (known / f"seed-{index}").write_bytes(seed)
    program = [sys.executable, "-m", "tests.hardening.guided", target, str(known)]
    limits = [f"-max_total_time={seconds:.0f}", "-timeout=2", "-rss_limit_mb=4096", "-max_len=65536"]
    done = subprocess.run(
        [*program, *limits, f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    figures = [line for line in done.stderr.splitlines() if line.startswith(("stat::", "Done", "==", "SUMMARY"))]
    print(f"{target}: exit status {done.returncode}", *figures, sep="\n  ", flush=True)  # noqa: T201
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
