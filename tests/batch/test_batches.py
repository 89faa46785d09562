"""`/v1/batches`: the life of a batch, its output files, its errors and its bill, in one process."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from benchmarks.servers import Postgres
from serving.tenancy import schema
from serving.tenancy.admin.service import NotFoundError
from serving.tenancy.admin.validation import InvalidChangeError
from serving.tenancy.billing.prices import money
from serving.tenancy.billing.reports import invoice
from tests.batch.served import Served, jsonl, line, served
from tests.support.wire import data_url, wav

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


async def test_a_line_may_be_a_timeline(tmp_path: Path) -> None:
    """A line with `timeline` has a caption for each segment, as a request has, and one bill."""
    async with served(tmp_path) as running:
        batch = await created(running, [line("long", data_url(wav(45)), parameters={"timeline": True})])
        shown = await ended(running, batch["id"])
        assert shown["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        body = (await results(running, shown["output_file_id"]))["long"]["response"]["body"]
        segments = body["choices"][0]["message"]["timeline"]["segments"]
        assert [segment["index"] for segment in segments] == [0, 1]
        assert (segments[0]["start"], segments[0]["end"], segments[1]["end"]) == (0, segments[1]["start"], 45)
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (571, 48)
        assert (shown["usage"]["input_tokens"], shown["usage"]["output_tokens"]) == (571, 48)


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
            "prompt_tokens_details": {"audio_tokens": 13, "text_tokens": 8, "cached_tokens": 0},
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


async def test_a_batch_in_postgresql(tmp_path: Path) -> None:
    """The statements are PostgreSQL's, too: a batch is completed, one is cancelled, one is wrong."""
    with Postgres() as server:
        async with served(tmp_path, database_url=server.url, fake_tpot_s=0.005) as running:
            lines = [*(line(f"good-{number}") for number in range(4)), line("bad", "x")]
            shown = await ended(running, (await created(running, lines))["id"])
            assert (shown["status"], shown["request_counts"]) == (
                "completed",
                {"total": 5, "completed": 4, "failed": 1},
            )
            assert len(await results(running, shown["output_file_id"])) == 4
            assert (await ended(running, (await created(running, ["x"]))["id"]))["status"] == "failed"
            slow = await created(running, [line(f"slow-{number}") for number in range(30)])
            await running.one.post(f"/v1/batches/{slow['id']}/cancel")
            cancelled = await ended(running, slow["id"])
            good = await results(running, cancelled["output_file_id"])
            assert len(good) + len(await results(running, cancelled["error_file_id"])) in {0, 30}
            assert [each["id"] for each in running.administration.batches(status="cancelled")] == [slow["id"]]
            assert len((await running.one.get("/v1/batches?limit=2")).json()["data"]) == 2
            await running.components.files.sweep()
            assert len((await running.one.get("/v1/files?limit=1")).json()["data"]) == 1


async def test_administrators_see_and_cancel_batches(tmp_path: Path) -> None:
    """The verbs list and show batches of all tenants; a cancellation is in the audit log."""
    async with served(tmp_path, max_batch_lines=0) as running:
        batch = await created(running, [line("a")])
        admin = running.administration
        (listed,) = admin.batches(tenant="one", status="validating")
        assert (listed["id"], listed["tenant"], listed["total"]) == (batch["id"], "one", 0)
        assert admin.batches(tenant="two") == []
        assert admin.batch(batch["id"])["amount"] == "0.00"
        assert admin.cancel_batch(batch["id"])["status"] == "cancelling"
        assert admin.audit(limit=1)[0]["after"] == {"status": "cancelling"}
        with pytest.raises(InvalidChangeError, match="cancelling cannot be cancelled"):
            admin.cancel_batch(batch["id"])
        with pytest.raises(NotFoundError, match="no batch 'batch_none'"):
            admin.batch("batch_none")


async def test_a_batch_is_cancelled(tmp_path: Path) -> None:
    """The lines that ran are in the output, the others in the error file; only the first are billed."""
    async with served(tmp_path, fake_tpot_s=0.02, max_batch_lines=2) as running:
        batch = await created(running, [line(f"line-{number}") for number in range(40)])
        while not (await running.one.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]["completed"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        cancelling = (await running.one.post(f"/v1/batches/{batch['id']}/cancel")).json()
        assert cancelling["status"] == "cancelling"
        assert cancelling["cancelling_at"] is not None
        shown = await ended(running, batch["id"])
        assert (shown["status"], shown["completed_at"]) == ("cancelled", None)
        assert shown["cancelled_at"] >= shown["cancelling_at"]
        good, bad = await results(running, shown["output_file_id"]), await results(running, shown["error_file_id"])
        assert {*good, *bad} == {f"line-{number}" for number in range(40)}
        assert len(good) + len(bad) == 40
        assert {each["error"]["code"] for each in bad.values()} == {"batch_cancelled"}
        assert {each["response"] for each in bad.values()} == {None}
        assert shown["request_counts"] == {"total": 40, "completed": len(good), "failed": len(bad)}
        await asyncio.sleep(1.2)
        assert sum(row.output_tokens for row in records(running) if row.billed) == 24 * len(good)
        again = await running.one.post(f"/v1/batches/{batch['id']}/cancel")
        assert again.json()["status"] == "cancelled"
        complete = await created(running, [line("a")])
        await ended(running, complete["id"])
        refused = await running.one.post(f"/v1/batches/{complete['id']}/cancel")
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "Cannot cancel a batch with status 'completed'."


async def test_a_batch_expires(tmp_path: Path) -> None:
    """Past its window a batch ends as expired, with what was done; the rest has the error `batch_expired`."""
    async with served(tmp_path, fake_tpot_s=0.02, max_batch_lines=1) as running:
        batch = await created(running, [line(f"line-{number}") for number in range(20)])
        while not (await running.one.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]["completed"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await _stop_runner(running)
        table = schema.batches
        with running.administration.database.begin() as connection:
            connection.execute(table.update().values(expires_at=int(time.time() * 1000)))
        await _start_runner(running)
        shown = await ended(running, batch["id"])
        good, bad = await results(running, shown["output_file_id"]), await results(running, shown["error_file_id"])
        assert (shown["status"], shown["completed_at"], len(good) + len(bad)) == ("expired", None, 20)
        assert shown["expired_at"] is not None
        assert good
        assert {each["error"]["code"] for each in bad.values()} == {"batch_expired"}


async def _stop_runner(running: Served) -> None:
    await running.components.batch_runner.stop()


async def _start_runner(running: Served) -> None:
    running.components.batch_runner._lines.stopping.clear()
    await running.components.batch_runner.start()


async def test_a_used_up_budget_ends_the_rest(tmp_path: Path) -> None:
    """Lines run until the budget is used up; the rest are errors with its code, and no line is billed beyond it."""
    plan = {"tenant_limits": {"tokens_per_day": 45 * 3 + 10}}
    async with served(tmp_path, plan=plan, fake_tokens=24) as running:
        lines = [line(f"line-{number}", parameters={"max_tokens": 24}) for number in range(8)]
        shown = await ended(running, (await created(running, lines))["id"])
        bad = await results(running, shown["error_file_id"])
        assert shown["request_counts"] == {"total": 8, "completed": 3, "failed": 5}
        assert {
            (each["response"]["status_code"], each["response"]["body"]["error"]["code"]) for each in bad.values()
        } == {(429, "insufficient_quota")}
        await asyncio.sleep(1.2)
        assert sum(row.input_tokens + row.output_tokens for row in records(running) if row.billed) == 135


async def test_a_limit_delays_lines(tmp_path: Path) -> None:
    """A limit per minute or of running requests is no error of a line: it is tried again until it runs."""
    plan = {"tenant_limits": {"concurrent_requests": 1}}
    async with served(tmp_path, plan=plan, fake_tpot_s=0.005) as running:
        shown = await ended(running, (await created(running, [line(f"line-{number}") for number in range(4)]))["id"])
        assert shown["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        await asyncio.sleep(1.2)
        assert [row.billed for row in records(running)] == [True] * 4


async def test_a_revoked_key_ends_the_rest(tmp_path: Path) -> None:
    """A batch runs for the key that made it: once the key is revoked, its lines are refused as that key is."""
    async with served(tmp_path, fake_tpot_s=0.02, max_batch_lines=1) as running:
        batch = await created(running, [line(f"line-{number}") for number in range(20)])
        for key in running.administration.keys("one"):
            running.administration.revoke_key(key["id"])
        secret = running.administration.create_key("one")[1]
        running.one.headers["authorization"] = f"Bearer {secret}"
        while (await running.one.get("/v1/batches")).status_code != 200:  # noqa: ASYNC110 - until keys are read again
            await asyncio.sleep(0.05)
        shown = await ended(running, batch["id"])
        bad = await results(running, shown["error_file_id"])
        assert bad
        assert {each["response"]["body"]["error"]["code"] for each in bad.values()} == {"invalid_api_key"}


async def test_batches_are_listed_to_their_tenant_alone(tmp_path: Path) -> None:
    """A list has pages, the latest batch first; another tenant finds nothing."""
    async with served(tmp_path, max_batch_lines=0) as running:
        ids = [(await created(running, [line("a")]))["id"] for _ in range(3)]
        everything = (await running.one.get("/v1/batches")).json()
        shown = [each["id"] for each in everything["data"]]
        assert (set(shown), everything["has_more"]) == (set(ids), False)
        first = (await running.one.get("/v1/batches?limit=2")).json()
        assert ([each["id"] for each in first["data"]], first["has_more"]) == (shown[:2], True)
        rest = (await running.one.get(f"/v1/batches?limit=2&after={first['last_id']}")).json()
        assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (shown[2:], False)
        assert (await running.two.get("/v1/batches")).json()["data"] == []
        assert (await running.two.get(f"/v1/batches/{ids[0]}")).status_code == 404
        assert (await running.two.post(f"/v1/batches/{ids[0]}/cancel")).status_code == 404
        in_use = (await running.one.get(f"/v1/batches/{ids[0]}")).json()["input_file_id"]
        assert (await running.one.delete(f"/v1/files/{in_use}")).status_code == 400


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"completion_window": "23h"}, 400, "completion_window"),
        ({"completion_window": "15d"}, 400, "completion_window"),
        ({"completion_window": None}, 400, "completion_window"),
        ({"input_file_id": 1}, 400, "input_file_id"),
        ({"input_file_id": "file-none"}, 404, None),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, 400, "output_expires_after"),
        ({"completion_window": "14d", "output_expires_after": {"anchor": "created_at", "seconds": 3600}}, 200, None),
        ({"endpoint": "/compatible-mode/v1/chat/completions", "completion_window": "336h"}, 200, None),
    ],
)
async def test_a_wrong_request_is_refused(
    tmp_path: Path, changes: dict[str, Any], status: int, param: str | None
) -> None:
    """The request that makes a batch is checked at once; an audio file is no input."""
    async with served(tmp_path, max_batch_lines=0) as running:
        body = {
            "input_file_id": await running.upload(jsonl([line("a")])),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            **changes,
        }
        answer = await running.one.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json().get("error", {}).get("param")) == (status, param)
        audio = await running.upload(b"x", "user_data")
        assert (await running.one.post("/v1/batches", json=body | {"input_file_id": audio})).status_code == 400
