"""Steps of a run: each has a deadline and a file with its result; a run can be resumed, and no failure ends it."""

from __future__ import annotations

import datetime as dt
import json
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.program import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

OK, PARTIAL, FAILED, SKIPPED = "ok", "partial", "failed", "skipped"
"""`partial`: at least one variant of the step has a result, and at least one has failed."""


class SkippedError(Exception):
    """A step does not apply to this machine; the message has the reason."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the main thread after `seconds`."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Journal:
    """Results of steps in a directory, one file each."""

    def __init__(self, directory: Path, step_timeout_s: int) -> None:
        self.directory = directory
        self._step_timeout_s = step_timeout_s
        (directory / "steps").mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a step's record, or None if it has not run. A file that a crash has cut counts as not run."""
        path = self.directory / "steps" / f"{name}.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return record

    def run(self, name: str, step: Callable[[], dict[str, Any]], *, again: bool = False) -> dict[str, Any]:
        """Run a step unless its record says that it has succeeded; return the record.

        Whatever the step raises is recorded as its failure. Only an interrupt (Ctrl-C) ends the run; the step then has
        no record, and the next run repeats it.
        """
        known = self.read(name)
        if known is not None and known["status"] != FAILED and not again:
            _log(f"{name}: {known['status']} before, not repeated")
            return known
        _log(f"{name}: started")
        record: dict[str, Any] = {"started": dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds")}
        began = time.monotonic()
        try:
            with deadline(self._step_timeout_s):
                result = step()
                record |= {"result": result, "status": PARTIAL if _has_failure(result) else OK}
        except SkippedError as reason:
            record |= {"status": SKIPPED, "reason": str(reason)}
        except Exception as failure:  # noqa: BLE001 - the next step must run
            record |= {"status": FAILED, "reason": short(failure), "traceback": traceback.format_exc()[-6000:]}
        record["seconds"] = round(time.monotonic() - began, 1)
        unfinished = self.directory / "steps" / f".{name}.json"
        write_json(unfinished, record)
        unfinished.replace(self.directory / "steps" / f"{name}.json")
        _log(f"{name}: {record['status']} after {record['seconds']} s {record.get('reason', '')[:300]}")
        return record


def attempt(variants: Sequence[tuple[str, Callable[[], dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Run the variants of a step in turn; return the result, or the reason of the failure, of each.

    Raises `RuntimeError` if none succeeds, and `TimeoutError` of the step's deadline.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants:
        try:
            found[name] = variant()
        except (TimeoutError, SkippedError):
            raise
        except Exception as failure:  # noqa: BLE001 - the other variants are worth having
            found[name] = {"failed": short(failure)}
            _log(f"  {name}: failed: {short(failure)[:300]}")
    if all("failed" in of for of in found.values()):
        raise RuntimeError("; ".join(f"{name}: {of['failed']}" for name, of in found.items()))
    return found


def _has_failure(result: object) -> bool:
    """Return whether the result of a variant, at any depth, is a failure."""
    return isinstance(result, dict) and (
        bool(result.keys() & {"failed", "failed_clips"}) or any(_has_failure(of) for of in result.values())
    )


def short(failure: BaseException) -> str:
    """Return type and text of an exception, and of those in a group, without the middle of a long text."""
    inner = [short(each) for each in getattr(failure, "exceptions", ())][:3]
    text = f"{type(failure).__name__}: {'; '.join(inner) if inner else failure}"
    return text if len(text) <= 4000 else f"{text[:1000]} … {text[-3000:]}"


def _log(message: str) -> None:
    print(f"{dt.datetime.now(tz=dt.UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)
