"""The audit of the chaos finds every planted fault, and nothing in a clean run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.tenancy.chaos_audit import audit
from benchmarks.tenancy.chaos_client import CLIPS, Received, parse, unchunk

TEXTS = ["A quiet room opens the clip, then a hum rises."] * len(CLIPS)
WHOLE = (
    b'{"choices":[{"message":{"content":"A quiet room"},"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":21,"completion_tokens":3}}'
)
DELTA = b'data: {"choices":[{"delta":{"content":"A quiet"},"finish_reason":null}]}\n\n'
ERROR = b'data: {"error":{"code":"internal_error","message":"m"},"request_id":"id"}\n\n'


def whole(**changes: Any) -> Received:
    """Make a complete answer of three tokens."""
    received = Received("limited", "openai", stream=False, clip=0, server=0, began=10.0, ended=11.0)
    received.status, received.request_id, received.body, received.complete = 200, "id", WHOLE, True
    parse(received)
    return replace(received, **changes)


def stream(body: bytes, **changes: Any) -> Received:
    """Make a stream."""
    received = replace(whole(), stream=True, body=body, text="", usage=None, terminal=False)
    parse(received)
    return replace(received, **changes)


def refusal(**changes: Any) -> Received:
    """Make a refusal."""
    return whole(
        **{"status": 503, "code": "service_unavailable", "text": "", "usage": None, "terminal": False} | changes
    )


def row(**changes: Any) -> dict[str, Any]:
    """Make the record of the complete answer, its amount by its tokens unless given."""
    made: dict[str, Any] = {"request_id": "id", "ending": "finished", "closed_at": 1, "prepared_at": 1, "billed": True}
    made |= {"input_tokens": 21, "output_tokens": 3} | changes
    amount = made["billed"] * (15_800 * made["input_tokens"] + 12_700 * made["output_tokens"])
    return {"amount_nanos": amount} | made


FAILED = row(ending="failed_midstream", billed=False, output_tokens=2)
LEFT = row(ending="disconnected", output_tokens=2)
CLEAN = {
    "a complete answer": (whole(), row()),
    "a stream that failed": (stream(DELTA + ERROR), FAILED),
    "a client that left": (stream(DELTA, kind="leave_midstream", complete=False), LEFT),
    "a stream cut by a kill": (
        stream(DELTA, complete=False, server=1),
        row(ending="lost", billed=False, output_tokens=0),
    ),
    "a complete answer of a killed process": (whole(), row(ending="lost", billed=False, output_tokens=0)),
    "a refusal": (refusal(), None),
    "a refusal of a record": (refusal(), row(ending="failed", billed=False, output_tokens=0)),
}
FAULTS: dict[str, tuple[Received, dict[str, Any] | None, str]] = {
    "another text": (whole(text="A quiet hum"), row(), "wrong text"),
    "another usage": (whole(usage=(21, 4)), row(), "usage differs from the text"),
    "another record": (whole(), row(output_tokens=2), "usage of the answer differs from the record"),
    "no record": (whole(), None, "answered, no record"),
    "an open record": (whole(), row(ending=None, closed_at=None, billed=False), "record still open"),
    "an amount": (whole(), row(amount_nanos=1), "another amount"),
    "a free caption": (whole(), row(billed=False), "billed against the rule"),
    "a failure that is billed": (stream(DELTA + ERROR), FAILED | {"billed": True}, "billed against the rule"),
    "tokens from nowhere": (whole(), row(output_tokens=30), "more tokens than were generated"),
    "a cut stream": (stream(DELTA, complete=False), LEFT, "cut off"),
    "a silent end": (stream(DELTA), FAILED, "stream without end or error"),
    "a failure taken for complete": (
        stream(DELTA + ERROR), row(output_tokens=2), "error event of a record that is complete",
    ),
    "a complete answer taken for a failure": (whole(), FAILED, "complete answer of a record that is not"),
    "a failed stream's tokens": (
        stream(DELTA + ERROR), FAILED | {"output_tokens": 1}, "tokens of a failed stream differ from its text",
    ),
    "fewer than delivered": (
        stream(DELTA, kind="leave_midstream", complete=False), row(ending="disconnected", output_tokens=1),
        "fewer tokens recorded than delivered",
    ),
    "an accepted wrong key": (whole(kind="wrong_key"), row(), "wrong request accepted"),
    "a refused right request": (refusal(status=400), None, "unexpected status"),
    "a refusal without code": (refusal(code=""), None, "refusal without code or id"),
    "no answer": (refusal(status=0, complete=False), None, "no answer"),
    "a billed refusal": (refusal(), row(), "refused and billed"),
    "a hang": (whole(ended=99.9), row(), "no end within the client's time"),
}  # fmt: skip


def audited(received: Received, record: dict[str, Any] | None) -> dict[str, list[str]]:
    """Audit one request, of which the engines generated three tokens and frontend 1 was killed."""
    return audit(
        [record] if record else [], [received], Counter({"id": 3} if record else {}), TEXTS, {1: [(10.5, 12.0)]}
    )


@pytest.mark.parametrize("name", CLEAN)
def test_a_right_ending_is_no_fault(name: str) -> None:
    """Each ending that may happen in a run is accepted."""
    assert audited(*CLEAN[name]) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    """The fault is named, with the request."""
    received, record, fault = FAULTS[name]
    assert fault in audited(received, record)


def test_doubled_and_unrecorded_requests_are_found() -> None:
    """Two records of one request, one id of two answers, and tokens of no record are faults."""
    found = audit([row(), row()], [whole(), whole()], Counter({"id": 3, "other": 2}), TEXTS, {})
    assert found.keys() == {"several records", "generated, no record", "one id of several answers"}
    assert found["generated, no record"] == ["other"]


def test_chunks_are_joined() -> None:
    """The content of complete chunks is returned; a chunk that is cut is left out."""
    assert unchunk(b"3\r\nabc\r\na\r\n0123456789\r\n5\r\nab") == b"abc0123456789"
