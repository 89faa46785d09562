"""Progress of an engine's start: the phase, its seconds, and an estimate by the last start with the same caches.

vLLM's engine process appends a line for each phase to a file in the directory for temporary files that it got from the
service (`mark`); the service reads it. Seconds of each phase of a completed start are kept next to vLLM's compile
cache, by model and by what decides how much there is to do. There is no estimate without such a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config import Settings

PHASES = {
    "process": "starting vLLM's process",
    "weights": "loading the weights",
    "compile": "compiling the model and measuring its memory",
    "cache": "allocating the KV cache",
    "graphs": "warming up vLLM, on GPUs with CUDA graphs",
    "captions": "warming up with captions of silence",
}
"""Phases of a start in their order, with descriptions. A start without compilation or graphs passes them quickly."""

_FILE = "start-progress"
_HISTORY = "captioner-start-seconds.json"
_KEPT = 32
"""Records in the file of earlier starts; the oldest one goes first."""


def mark(phase: str) -> None:
    """Note in vLLM's engine process that a phase begins. Does nothing outside of an engine that the service started."""
    directory = os.environ.get("TMPDIR")
    if directory is None:
        return
    with suppress(OSError), Path(directory, _FILE).open("a") as file:
        file.write(f"{phase} {time.time():.3f}\n")


def cache_root(environment: dict[str, str]) -> Path:
    """Return the directory of vLLM's caches by its variable, or the default that vLLM itself has."""
    if root := environment.get("VLLM_CACHE_ROOT"):
        return Path(root).expanduser()
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm"


class StartProgress:
    """One start of an engine."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self._file = scratch / _FILE
        self._history = cache_root(dict(os.environ)) / _HISTORY
        about = (settings.model, settings.tensor_parallel, settings.dtype, settings.quantization)
        eager = (settings.enforce_eager, settings.max_num_seqs, settings.step_tokens)
        self._key = hashlib.sha256(json.dumps([*about, *eager]).encode()).hexdigest()[:16]
        self._last = self._read_history().get(self._key, {})
        self._marks = [("process", time.time())]

    def mark(self, phase: str) -> None:
        """Note that a phase begins in the service itself."""
        self._marks.append((phase, time.time()))

    @property
    def phase(self) -> str:
        """Present phase, a key of `PHASES`."""
        return self._begins()[-1][0]

    def seconds(self, now_s: float | None = None) -> dict[str, float]:
        """Return the seconds of each phase so far."""
        begins = self._begins()
        ends = [at for _, at in begins[1:]] + [time.time() if now_s is None else now_s]
        found: dict[str, float] = {}
        for (phase, began), ended in zip(begins, ends, strict=True):
            found[phase] = round(found.get(phase, 0.0) + max(0.0, ended - began), 1)
        return found

    def remaining_s(self) -> float | None:
        """Return the seconds that the rest of the start took the last time; None without one, or if it was faster."""
        if not self._last:
            return None
        so_far, phase = self.seconds(), self.phase
        later = list(PHASES)[list(PHASES).index(phase) + 1 :]
        left = self._last.get(phase, 0.0) - so_far[phase]
        return None if left < 0 else round(left + sum(self._last.get(each, 0.0) for each in later), 1)

    def describe(self) -> str:
        """Return what is happening, for how long, and how long it may take."""
        phase, so_far = self.phase, self.seconds()
        text = f"{PHASES[phase]} for {so_far[phase]:.0f} s, {sum(so_far.values()):.0f} s in total"
        if not self._last:
            return f"{text}; no earlier start with these caches to compare with"
        remaining = self.remaining_s()
        if remaining is None:
            return f"{text}; longer than the last start, which took {sum(self._last.values()):.0f} s"
        return f"{text}; about {remaining:.0f} s left, by the last start"

    def keep(self) -> dict[str, float]:
        """Record the seconds of a complete start for the next one, and return them; a disk that fails is no error."""
        found = self.seconds()
        records = self._read_history()
        records.pop(self._key, None)
        records = dict(list(records.items())[-_KEPT + 1 :]) | {self._key: found}
        unfinished = self._history.with_name(f".{_HISTORY}.{os.getpid()}")
        with suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(records, indent=1) + "\n")
            unfinished.replace(self._history)
        return found

    def _begins(self) -> list[tuple[str, float]]:
        """Return the phases in the order in which they began."""
        found = list(self._marks)
        with suppress(OSError):
            for line in self._file.read_text().splitlines():
                phase, _, at = line.partition(" ")
                if phase in PHASES:
                    with suppress(ValueError):
                        found.append((phase, float(at)))
        return sorted(found, key=lambda each: each[1])

    def _read_history(self) -> dict[str, dict[str, float]]:
        try:
            records = json.loads(self._history.read_text())
            return {
                str(key): {phase: float(of[phase]) for phase in PHASES if phase in of} for key, of in records.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
