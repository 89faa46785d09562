"""`captioner …` that kills its own process at a point of a batch's work.

    python -m tests.batch.killed_service POINT NUMBER serve …

The process is killed when it passes POINT for the NUMBER-th time. Leases are short, so that the next process need not
wait long.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from serving.batch import files, job, output, runner, store
from serving.cli.main import main
from serving.tenancy.ledger.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS: dict[str, tuple[Any, str, bool]] = {
    "validated": (store.BatchStore, "begin_lines", True),
    "opened": (Ledger, "open", True),
    "generated": (store.BatchStore, "finish_line", False),
    "committed": (store.BatchStore, "finish_line", True),
    "closed": (Ledger, "close", True),
    "ended": (store.BatchStore, "end_lines", True),
    "output stored": (files.Files, "_insert", True),
    "output named": (output, "_write", True),
    "finished": (store.BatchStore, "finish", False),
}
"""Points by name: a function, and whether the process is killed after it rather than before."""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(point: str, number: int) -> None:
    owner, name, after = POINTS[point]
    call: Callable[..., Any] = getattr(owner, name)
    passed = itertools.count(1)

    def armed(*arguments: Any, **named: Any) -> Any:
        mine = next(passed)
        if mine == number and not after:
            _die()
        result = call(*arguments, **named)
        if mine == number and after:
            _die()
        return result

    setattr(owner, name, armed)


if __name__ == "__main__":
    for module in (store, runner, job):
        module.LEASE_S = 1.0  # type: ignore[attr-defined]
    runner._RENEW_S = 0.2
    if sys.argv[1] != "never":
        _arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
