"""Mutation run over the modules of money, access, admission and the wire: `make mutate`.

    python -m tests.mutants [--jobs N] [--list] [MODULE …]

Each module is changed by one fault at a time (`operators.py`) in a copy of the tree, and its narrow tests run
(`targets.py`). A fault with which they pass has survived. `survivors.toml` has the survivors that may, each with its
reason; any other makes the run fail. Prints each new survivor, and the figures of each module.

mutmut 3.8 was considered and not taken: it changes functions only, so no constant of a module or default of a class,
where limits and prices are, and needs its own configuration and four further packages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from tests.mutants.operators import mutants
from tests.mutants.runner import ROOT, Runner
from tests.mutants.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Mapping

SURVIVORS = Path(__file__).with_name("survivors.toml")


def explained(module: str) -> Mapping[tuple[str, str], str]:
    """Return the reasons of the module's survivors, by scope and change."""
    entries = tomllib.loads(SURVIVORS.read_text()).get("survivor", [])
    return {(each["scope"], each["change"]): each["reason"] for each in entries if each["module"] == module}


def main() -> int:
    """Run the faults of the modules and return the exit status: 1 if there is a survivor without a reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("modules", nargs="*", help=f"some of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests at the same time")
    parser.add_argument("--list", action="store_true", help="list the faults, run nothing")
    arguments = parser.parse_args()
    unexplained = 0
    with tempfile.TemporaryDirectory(prefix="captioner-mutants-") as directory:
        runner = Runner(Path(directory, "trees"), arguments.jobs)
        if arguments.list:
            for module in arguments.modules or TARGETS:
                for mutant in mutants((ROOT / module).read_text()):
                    print(f"{module}:{mutant.line} {mutant.scope}: {mutant.change}")  # noqa: T201
            return 0
        with runner:
            for module in arguments.modules or TARGETS:
                unexplained += _run(runner, module)
    return 1 if unexplained else 0


def _run(runner: Runner, module: str) -> int:
    """Run the faults of one module; return the number of survivors without a reason."""
    began_s, found, reasons = time.monotonic(), mutants((ROOT / module).read_text()), explained(module)
    survived = 0
    new = 0
    for mutant in runner.survivors(module, TARGETS[module], found):
        survived += 1
        if (mutant.scope, mutant.change) not in reasons:
            new += 1
            print(f"{module}:{mutant.line} {mutant.scope}: {mutant.change}", flush=True)  # noqa: T201
    killed = len(found) - survived
    took_s = time.monotonic() - began_s
    share = killed / len(found)
    figures = f"{killed} of {len(found)} killed ({share:.1%}), {survived - new} explained, {new} not; {took_s:.0f} s"
    print(f"{module}: {figures}", flush=True)  # noqa: T201
    return new


if __name__ == "__main__":
    sys.exit(main())
