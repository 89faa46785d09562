"""`/v1/batches`: the life of a batch, its output files, its errors and its bill, in one process."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy import schema
from serving.tenancy.billing.prices import money
from serving.tenancy.billing.reports import invoice
from tests.batch.served import Served, jsonl, line, served
from tests.support.wire import data_url

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("in_process", "hurried_batches")

ENDED = {"completed", "failed", "expired", "cancelled"}


async def created(running: Served, lines: list[Any], **changes: Any) -> dict[str, Any]:
    """Upload lines and make a batch of them; return its object."""
    body = {
        "input_file_id": await running.upload(jsonl(lines)),
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        **changes,
    }
    answer = await running.one.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def ended(running: Served, batch_id: str, timeout_s: float = 30) -> dict[str, Any]:
    """Wait until a batch has ended; return its object."""
    deadline = time.monotonic() + timeout_s
    while True:
        shown: dict[str, Any] = (await running.one.get(f"/v1/batches/{batch_id}")).json()
        if shown["status"] in ENDED:
            return shown
        assert time.monotonic() < deadline, shown
        await asyncio.sleep(0.05)


async def results(running: Served, file_id: str | None) -> dict[str, Any]:
    """Return the lines of an output file by custom id; no id is in it twice."""
    if file_id is None:
        return {}
    content = (await running.one.get(f"/v1/files/{file_id}/content")).text
    lines = [json.loads(each) for each in content.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def records(running: Served) -> list[Any]:
    """Return the usage records of batches in the database."""
    usage = schema.usage_records
    with running.administration.database.connect() as connection:
        return [*connection.execute(sa.select(usage).where(usage.c.dialect == "batch").order_by(usage.c.request_id))]


def amount_nanos(running: Served, batch_id: str) -> int:
    """Return the amount of a batch, in nano-units."""
    batches = schema.batches.c
    with running.administration.database.connect() as connection:
        return int(connection.scalar(sa.select(batches.amount_nanos).where(batches.id == batch_id)) or 0)


async def test_a_batch_is_captioned_and_billed(tmp_path: Path) -> None:
    """Good and bad lines are in their files, once each; the sums are those of the ledger, at half the price."""
    lines = [line(f"good-{number}") for number in range(5)]
    lines += [line("no-audio", data_url(b"no audio")), line("no-url", "http://127.0.0.1:1/a.wav"), line("bad", "x")]
    lines += [line("streamed", parameters={"stream": True})]
    async with served(tmp_path, plan={"batch_price_percent": 50}, fetch_ports=[1]) as running:
        batch = await created(running, lines, metadata={"purpose": "a test"})
        assert (batch["status"], batch["object"], batch["metadata"]) == ("validating", "batch", {"purpose": "a test"})
        assert batch["expires_at"] == batch["created_at"] + 24 * 3600
        shown = await ended(running, batch["id"])
        assert shown["status"] == "completed"
        assert shown["request_counts"] == {"total": 9, "completed": 5, "failed": 4}
        assert (shown["errors"], shown["model"]) == (None, "qwen3-omni-30b-a3b-captioner")
        good = await results(running, shown["output_file_id"])
        bad = await results(running, shown["error_file_id"])
        assert set(good) == {f"good-{number}" for number in range(5)}
        assert {name: each["response"]["status_code"] for name, each in bad.items()} == {
            "no-audio": 400,
            "no-url": 503,
            "bad": 400,
            "streamed": 400,
        }
        answer = good["good-0"]["response"]
        assert (good["good-0"]["error"], answer["status_code"], answer["body"]["object"]) == (
            None,
            200,
            "chat.completion",
        )
        assert answer["body"]["usage"] == {
            "prompt_tokens": 21,
            "completion_tokens": 24,
            "total_tokens": 45,
            "prompt_tokens_details": {"audio_tokens": 13, "text_tokens": 8},
            "completion_tokens_details": {"text_tokens": 24},
        }
        assert shown["usage"] | {"input_tokens": 105, "output_tokens": 120, "total_tokens": 225} == shown["usage"]
        await asyncio.sleep(1.2)  # the ledger's writer
        found = records(running)
        assert len(found) == 7  # of five good lines, and of two whose audio could not be had
        assert [row.request_id for row in found if row.billed] == [f"{batch['id']}-{number}" for number in range(1, 6)]
        assert sum(row.input_tokens + row.output_tokens for row in found if row.billed) == 225
        assert {(row.input_price, row.output_price) for row in found} == {("0.0079", "0.00635")}
        report = invoice(running.administration.database, "one", month=f"{dt.datetime.now(dt.UTC):%Y-%m}")
        (total,) = report["totals"]
        assert (total["billed_requests"], total["input_tokens"], total["output_tokens"]) == (5, 105, 120)
        assert total["amount"] == total["list_amount"] == money(amount_nanos(running, batch["id"])) == "0.0015915"


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        ([], [("empty_file", None, None)]),
        (["{", line("a")], [("invalid_json_line", 1, None)]),
        ([line("a"), line("b"), line("a")], [("duplicate_custom_id", 3, "custom_id")]),
        ([line("a"), line("b", url="/v1/embeddings")], [("invalid_url", 2, "url")]),
        ([line("a", method="GET")], [("invalid_method", 1, "method")]),
        ([line("a", body=[])], [("missing_required_parameter", 1, "body")]),
        ([line("a", parameters={"model": "gpt-4o"})], [("model_not_found", 1, "body.model")]),
        ([{"method": "POST"}, "[]"], [("missing_required_parameter", 1, "custom_id"), ("invalid_json_line", 2, None)]),
        ([line("a") | {"custom_id": "x" * 513}], [("missing_required_parameter", 1, "custom_id")]),
        (
            ["", line("a", data_url(b"x" * 200_000)), "", "x"],
            [("line_too_long", 2, None), ("invalid_json_line", 4, None)],
        ),
    ],
)
async def test_a_wrong_input_file_fails_the_batch(
    tmp_path: Path, lines: list[Any], errors: list[tuple[str, int | None, str | None]]
) -> None:
    """Each wrong line is in the batch's errors with its number; nothing runs, and nothing is billed."""
    content = jsonl(lines) or b"\n"
    async with served(tmp_path, max_body_bytes=100_000) as running:
        file_id = await running.upload(content)
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await running.one.post("/v1/batches", json=body)).json()
        shown = await ended(running, batch["id"])
        found = [(each["code"], each["line"], each["param"]) for each in shown["errors"]["data"]]
        assert (shown["status"], found) == ("failed", errors)
        assert (shown["output_file_id"], shown["error_file_id"]) == (None, None)
        assert records(running) == []
