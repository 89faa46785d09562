"""Audit of the chaos: every answer against the expected text, every record against engines and clients."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from benchmarks.tenancy.chaos_client import CLIENT_S, ENDLESS, LEAVES
from benchmarks.tenancy.ledger_audit import INPUT_NANOS, OUTPUT_NANOS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.tenancy.chaos_client import Received

REFUSALS = {
    "no_audio": {400},
    "bad_url": {400},
    "bad_json": {400},
    "wrong_key": {401},
}
"""Statuses of requests that are wrong in themselves. Any request may get one of `UNAVAILABLE`."""
UNAVAILABLE = {429, 500, 503}


def audit(
    rows: list[dict[str, Any]],
    received: list[Received],
    generated: Counter[str],
    texts: Sequence[str],
    downtimes: Mapping[int, Sequence[tuple[float, float]]],
) -> dict[str, list[str]]:
    """Return what does not add up, by kind.

    `generated` are the tokens that all engines sent, by request; `texts` are the endless captions of the clips;
    `downtimes` are, by frontend, from when to when its process was killed, stopped or paused.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    by_id = {row["request_id"]: row for row in rows}
    for request_id, count in Counter(row["request_id"] for row in rows).items():
        if count > 1:
            wrong["several records"].append(request_id)
    for row in rows:
        for fault in _record_faults(row, generated[row["request_id"]]):
            wrong[fault].append(_of_row(row))
    wrong["generated, no record"] = [request_id for request_id in generated if request_id not in by_id]
    for request_id, count in Counter(each.request_id for each in received if each.request_id).items():
        if count > 1:
            wrong["one id of several answers"].append(request_id)
    for each in received:
        down = any(begin <= each.ended and each.began <= end for begin, end in downtimes.get(each.server, ()))
        for fault in _answer_faults(each, by_id.get(each.request_id), texts[each.clip], down=down):
            wrong[fault].append(f"{each.kind} {each.dialect} {each.request_id} {each.status} {each.code}")
    return {fault: found for fault, found in wrong.items() if found}


def _of_row(row: Mapping[str, Any]) -> str:
    return f"{row['request_id']}: {row['ending']}, {row['output_tokens']} tokens"


def _record_faults(row: Mapping[str, Any], generated: int) -> Iterator[str]:
    ending, output = row["ending"], row["output_tokens"]
    if ending is None or row["closed_at"] is None:
        yield "record still open"
    if output > generated:
        yield "more tokens than were generated"
    paid = ending in {"finished", "partial"} or (ending == "disconnected" and row["prepared_at"] is not None)
    if row["billed"] != paid:
        yield "billed against the rule"
    if row["amount_nanos"] != paid * (INPUT_NANOS * row["input_tokens"] + OUTPUT_NANOS * output):
        yield "another amount"


def _answer_faults(each: Received, row: Mapping[str, Any] | None, text: str, *, down: bool) -> Iterator[str]:
    if each.code == "not parsed":
        yield "not parsed"
    if not text.startswith(each.text):
        yield "wrong text"
    if each.ended - each.began > CLIENT_S - 1:
        yield "no end within the client's time"
    if each.status != 200:
        yield from _refusal_faults(each, row, down=down)
    elif row is None:
        yield "answered, no record"
    elif each.kind in REFUSALS:
        yield "wrong request accepted"
    elif not each.complete:
        yield from _cut_faults(each, row, down=down)
    elif each.terminal:
        yield from _finished_faults(each, row)
    else:
        yield from _failed_stream_faults(each, row)


def _cut_faults(each: Received, row: Mapping[str, Any], *, down: bool) -> Iterator[str]:
    """Yield the faults of an answer of which its client, or a kill, left the end."""
    if each.kind not in LEAVES and not down:
        yield "cut off"
    if row["output_tokens"] < _words(each) and row["ending"] != "lost":
        yield "fewer tokens recorded than delivered"


def _finished_faults(each: Received, row: Mapping[str, Any]) -> Iterator[str]:
    # A client gets its last byte a moment before the record is closed; a kill in between makes the record lost.
    if row["ending"] not in {"finished", "partial", "lost"}:
        yield "complete answer of a record that is not"
    if each.usage != (row["input_tokens"], row["output_tokens"]) and row["ending"] != "lost":
        yield "usage of the answer differs from the record"
    if each.usage is None or each.usage[1] != _words(each):
        yield "usage differs from the text"
    if each.kind == "deadline" and _words(each) >= ENDLESS:
        yield "no deadline"


def _failed_stream_faults(each: Received, row: Mapping[str, Any]) -> Iterator[str]:
    if not each.code:
        yield "stream without end or error"
    if row["ending"] not in {"failed_midstream", "cancelled", "lost"}:
        yield "error event of a record that is complete"
    if row["output_tokens"] != _words(each) and row["ending"] != "lost":
        yield "tokens of a failed stream differ from its text"


def _words(each: Received) -> int:
    """Return the number of tokens that a client received; a token of the fake engine is a word."""
    return len(each.text.split())


def _refusal_faults(each: Received, row: Mapping[str, Any] | None, *, down: bool) -> Iterator[str]:
    if not each.complete:
        if not (down or each.kind in LEAVES):
            yield "no answer"
    elif each.status not in REFUSALS.get(each.kind, set()) | UNAVAILABLE:
        yield "unexpected status"
    elif not each.code or not each.request_id:
        yield "refusal without code or id"
    if row is not None and row["billed"] and each.complete:
        yield "refused and billed"
