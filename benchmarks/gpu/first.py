"""The first hour on a GPU: doctor, parity, V2 against V1, FP8, peak memory, two GPUs, drain, start, throughput.

    benchmarks/gpu/first.sh --profile deploy/profiles/1xh100-80g.toml --price 3.5 [--model DIRECTORY] [--out DIRECTORY]
    benchmarks/gpu/first.sh --load-format dummy --profile …    without weights
    benchmarks/gpu/first.sh --small                            the embedded stand-in, to try the script on a CPU

One step after another; only one model is loaded at a time. A step that fails is recorded, and the next one runs; the
same command goes on where a run was stopped, and repeats what failed. Other options need another --out. Writes
OUT/report.json and OUT/report.md, which are meant to be sent back.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import plan as plans
from benchmarks.gpu.journal import FAILED, Journal
from benchmarks.gpu.report import markdown
from benchmarks.gpu.steps import STEPS
from benchmarks.program import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.gpu.plan import Plan

OTHER_PLAN = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and write the report; return 0 if no step has failed, 1 if one has, 3 for another plan's OUT."""
    plan, options = plans.plan_of(argv, list(STEPS), __doc__)
    kept = plan.out / "plan.json"
    described = describe(plan)
    if kept.exists() and json.loads(kept.read_text()) != described:
        print(f"{plan.out} has a run with other options: set --out to another directory", file=sys.stderr)
        return OTHER_PLAN
    write_json(kept, described)
    journal = Journal(plan.out, plan.step_timeout_s)
    with stoppable():
        for name in options.only:
            journal.run(name, partial(STEPS[name], plan), again=name in options.again)
            write_report(plan, journal)
    report = write_report(plan, journal)
    print(f"{plan.out}/report.json and {plan.out}/report.md")
    return int(any(record["status"] == FAILED for record in report["steps"].values()))


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM, and SIGINT also in the background, where shells switch it off, stop what was started and the run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the options that the results depend on, as JSON has them."""
    options = asdict(plan)
    del options["out"], options["step_timeout_s"], options["dollars_per_gpu_hour"]
    described: dict[str, Any] = json.loads(json.dumps(options))
    return described


def write_report(plan: Plan, journal: Journal) -> dict[str, Any]:
    """Write the report of all steps that have run so far, and return it."""
    records = {name: record for name in STEPS if (record := journal.read(name)) is not None}
    report = {"kind": "first hour", **describe(plan), "steps": records}
    write_json(plan.out / "report.json", report)
    (plan.out / "report.md").write_text(markdown(report))
    return report
