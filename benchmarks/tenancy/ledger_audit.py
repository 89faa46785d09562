"""Audit of the ledger: every record against the engines' log and the answers that the clients received."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.servers import Postgres

INPUT_NANOS, OUTPUT_NANOS = 15_800, 12_700
"""Prices of a token."""


@dataclass(slots=True)
class Received:
    """One request as its client saw it."""

    kind: str = ""
    status: int = 0
    request_id: str = ""
    code: str = ""
    body: bytes = b""
    complete: bool = False
    usage: dict[str, Any] = field(default_factory=dict)


def delivered_tokens(engine_logs: Sequence[Path]) -> Counter[str]:
    """Return the tokens that the engines delivered, by request."""
    tokens: Counter[str] = Counter()
    for log in engine_logs:
        for line in log.read_text().splitlines():
            request_id, count = line.split()
            tokens[request_id] += int(count)
    return tokens


def audit(rows: list[dict[str, Any]], received: list[Received], delivered: Counter[str]) -> dict[str, Any]:
    """Compare the ledger with engines and clients; `wrong` lists what does not add up."""
    by_id = {row["request_id"]: row for row in rows}
    wrong: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for fault in _faults(row, delivered[row["request_id"]]):
            wrong[fault].append(f"{row['request_id']}: {row['ending']}, {row['output_tokens']} tokens")
    wrong["doubled"] += [
        request_id for request_id, count in Counter(row["request_id"] for row in rows).items() if count > 1
    ]
    wrong["delivered, not in the ledger"] += [request_id for request_id in delivered if request_id not in by_id]
    answered = [each for each in received if each.status == 200]
    wrong["answered, not in the ledger"] += [each.request_id for each in answered if each.request_id not in by_id]
    complete = [(each, by_id[each.request_id]) for each in answered if each.usage and each.request_id in by_id]
    # A client gets its last byte a moment before the record is closed; a kill in between makes the record lost.
    wrong["another usage in the answer"] += [
        each.request_id
        for each, row in complete
        if row["ending"] != "lost"
        and (each.usage["prompt_tokens"], each.usage["completion_tokens"])
        != (row["input_tokens"], row["output_tokens"])
    ]
    wrong["answered to the end, recorded otherwise"] += [
        f"{each.request_id}: {row['ending']}"
        for each, row in complete
        if row["ending"] not in ("finished", "partial", "lost")
    ]
    lost = {row["request_id"]: row for row in rows if row["ending"] == "lost"}
    return {
        "records": len(rows),
        "endings": dict(Counter(str(row["ending"]) for row in rows)),
        "output_tokens_of_all_but_lost": {
            "ledger": sum(row["output_tokens"] for row in rows if row["request_id"] not in lost),
            "engine": sum(tokens for request_id, tokens in delivered.items() if request_id not in lost),
        },
        "lost": {
            "records": len(lost),
            "tokens_recorded": sum(row["output_tokens"] for row in lost.values()),
            "tokens_delivered": sum(delivered[request_id] for request_id in lost),
            "answered_to_the_end": sum(each.request_id in lost for each, _ in complete),
        },
        "billed_nanos": sum(row["amount_nanos"] for row in rows),
        "wrong": {fault: found for fault, found in wrong.items() if found},
    }


def _faults(row: dict[str, Any], delivered: int) -> Iterator[str]:
    """Yield the faults of one record, for which the engine delivered this number of tokens."""
    ending, output = row["ending"], row["output_tokens"]
    if ending is None or row["closed_at"] is None:
        yield "still open"
    if output > delivered or (ending != "lost" and output != delivered):
        yield "tokens differ from the engine's"
    paid = ending in ("finished", "partial") or (ending == "disconnected" and row["prepared_at"] is not None)
    if row["billed"] != paid:
        yield "billed against the rule"
    if row["amount_nanos"] != paid * (INPUT_NANOS * row["input_tokens"] + OUTPUT_NANOS * output):
        yield "another amount"


def all_records(database: Postgres) -> list[dict[str, Any]]:
    """Return the ledger, row by row."""
    with psycopg.connect(database.url, row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute("SELECT * FROM usage_records").fetchall()


def billed_tokens(rows: list[dict[str, Any]]) -> int:
    """Return the number of tokens to be paid."""
    return sum(row["input_tokens"] + row["output_tokens"] for row in rows if row["billed"])
