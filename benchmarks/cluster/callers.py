"""Locust's callers of a cluster, and the account of every request that they sent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from benchmarks.load.command import locust_command
from benchmarks.program import CLIPS, module_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LENGTHS_S = (0.3, 0.45, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
"""As MP3. A request with one of the two shortest clips fits into one buffer of HAProxy's, the others do not."""
WAYS = "dashscope,dashscope-stream,openai,openai-stream"
TIMEOUT_S = 150
FOREVER_S = 1_000_000

OUTCOMES = ("answered", "dialect_error", "proxy_error", "lost", "abandoned", "defect")
"""Outcomes of a request; every request that was sent has exactly one.

answered       200, all of the text, the right usage, the end of the stream
dialect_error  an error in the caller's dialect: a status, or the last event of a started stream
proxy_error    an error from the proxy before the service, in no dialect
lost           the connection was refused, reset, or closed within a message
abandoned      the caller was stopped during the request, at the end of the run
defect         anything else: an answer that looks right and is not, a stream cut off cleanly, two request ids
"""
DIALECT_STATUSES = (429, 500, 502, 503)
"""Statuses of errors that a right request may get; another status means that the request was taken for a wrong one."""


def outcome_of(entry: Mapping[str, Any]) -> str:
    """Return the outcome of a request by its journal entry."""
    if entry["outcome"] == "right":
        return "answered" if len(entry["request_id"]) == 36 else "defect"
    if entry["outcome"] == "abandoned":
        return "abandoned"
    match entry.get("cause"), entry.get("status", 0):
        case "stream", _:
            return "dialect_error"
        case "dialect", status if status in DIALECT_STATUSES:
            return "dialect_error"
        case "foreign", status if status >= 500:
            return "proxy_error"
        case "connection", _:
            return "lost"
    return "defect"


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Callers:
    """Locust with a fixed number of callers. A context manager: on exit the callers finish their last requests.

    Each caller sends one request after another, in both dialects, streamed and not, of eight fixed clips; every other
    caller opens a connection for each request.
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        users: int,
        *,
        max_pause_s: float,
        tokens: int,
        name: str = "callers",
        clips_dir: Path = CLIPS,
    ) -> None:
        self.journal = directory / f"{name}.jsonl"
        self.journal.unlink(missing_ok=True)
        self._read_bytes, self._answers = 0, 0
        self._log = directory / f"{name}.log"
        self._command = locust_command(
            url,
            self.journal,
            "--journal-sent",
            *(f"--load={users}", f"--seconds={FOREVER_S}", "--warm-up=0", f"--max-pause-s={max_pause_s}"),
            *(f"--ways={WAYS}", "--connections=both", f"--caption-words={tokens}", "--probe-share=0"),
            *(f"--mix={','.join(map(str, LENGTHS_S))}", "--clips-per-length=1", f"--clips-dir={clips_dir}"),
            f"--timeout-s={TIMEOUT_S}",
        )

    def __enter__(self) -> Self:
        environment = os.environ | module_environment()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.send_signal(signal.SIGINT)  # with a load shape, Locust has no handler of SIGTERM
        try:
            self.process.wait(2 * TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):  # nothing of a run that hangs goes on
                os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self) -> list[dict[str, Any]]:
        """Return the journal entries of the requests that have ended, each with `result`, one of `OUTCOMES`."""
        return [entry | {"result": outcome_of(entry)} for entry in self._entries() if "outcome" in entry]

    def answered(self) -> list[dict[str, Any]]:
        """Return the journal entries of the right answers."""
        return [entry for entry in self.ended() if entry["result"] == "answered"]

    def answers(self) -> int:
        """Return the number of right answers; reads only what was added to the journal since the last call."""
        if self.journal.exists():
            with self.journal.open("rb") as journal:
                journal.seek(self._read_bytes)
                lines, _, _ = journal.read().rpartition(b"\n")
            self._read_bytes += len(lines) + bool(lines)
            entries = [json.loads(line) for line in lines.splitlines()]
            self._answers += sum("outcome" in entry and outcome_of(entry) == "answered" for entry in entries)
        return self._answers

    def account(self) -> dict[str, Any]:
        """Return `account` of the requests so far."""
        sent = [entry["number"] for entry in self._entries() if "outcome" not in entry]
        return account(sent, self.ended())

    def _entries(self) -> list[dict[str, Any]]:
        """Return the complete lines of the journal."""
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


def account(sent: Sequence[str], ended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count requests by outcome; `defects` lists the first that do not add up or were answered wrongly.

    `sent` has the numbers of all requests, `ended` the journal entries of those that have ended, with `result`.
    """
    captions = {(entry["clip"], entry["text"]) for entry in ended if entry["result"] == "answered"}
    request_ids = Counter(entry["request_id"] for entry in ended if entry.get("request_id"))
    defects = [dict(entry) for entry in ended if entry["result"] == "defect"]
    if len(captions) != len({clip for clip, _ in captions}) or len(captions) != len({text for _, text in captions}):
        defects.append({"detail": f"captions differ for one clip, or agree for two: {sorted(captions)}"})
    defects += [
        {"detail": f"{times} answers have the request id {id_}"} for id_, times in request_ids.items() if times > 1
    ]
    if Counter(sent) != Counter(entry["number"] for entry in ended):
        without = set(sent) - {entry["number"] for entry in ended}
        defects.append({"detail": f"requests and ends do not match: {sorted(without)[:20]} without end"})
    details = Counter(_UUID.sub("…", f"{entry['result']}: {entry.get('detail', '')}")[:120] for entry in ended)
    return {
        "sent": len(sent),
        **dict.fromkeys(OUTCOMES, 0),
        **Counter(entry["result"] for entry in ended),
        "by_way": dict(Counter(entry["way"] for entry in ended)),
        "details": {detail: count for detail, count in details.items() if not detail.startswith("answered")},
        "defects": defects[:20],
    }
