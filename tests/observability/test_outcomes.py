"""One list of outcomes: metrics, log line, trace and ledger have the same outcome for the same end of a request."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from serving import errors
from serving.config import Settings
from serving.observability.metrics import Metrics
from serving.observability.request_record import OUTCOMES, RequestRecord
from serving.tenancy.schema import usage_records
from serving.tenancy.service import Tenancy
from serving.types import Caller, CaptionRequest, InlineAudio, Outcome, Usage
from tests.observability.test_rules import DEPLOY, HERE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ARGUMENTS: dict[type[BaseException], BaseException] = {
    errors.ModelNotFound: errors.ModelNotFound("m"),
    errors.MethodNotAllowed: errors.MethodNotAllowed("PUT"),
}
"""Errors whose class needs arguments; limits aside, which all need the same."""

REJECTED = {
    "client_error",
    "invalid_request",
    "missing_model",
    "missing_input",
    "inline_too_large",
    "body_too_large",
    "model_not_found",
    "not_found",
    "idempotency_conflict",
    "method_not_allowed",
    "async_not_supported",
    "unsupported_operation",
    "unauthenticated",
    "missing_api_key",
    "invalid_api_key",
    "access_denied",
    "free_tier_exhausted",
    "arrearage",
    "rate_limited",
    "requests_limited",
    "burst_limited",
    "tokens_limited",
    "audio_limited",
    "concurrency_limited",
    "budget_exhausted",
    "upload_rejected",
    "policy_invalid",
    "policy_expired",
    "key_not_allowed",
    "upload_empty",
    "upload_too_large",
    "upload_exists",
    "audio_error",
    "invalid_audio_url",
    "download_failed",
    "download_timeout",
    "source_unavailable",
    "too_many_values",
    "body_timeout",
    "malformed_http",
    "headers_too_large",
    "upload_not_found",
    "audio_too_large",
    "audio_too_long",
    "audio_empty",
    "audio_unreadable",
}
FAILED = {
    "server_error",
    "engine_failed",
    "engine_stalled",
    "not_ready",
    "overloaded",
    "storage_unavailable",
    "deadline_exceeded",
    "internal",
}


def classes(root: type[errors.CaptionerError]) -> list[type[errors.CaptionerError]]:
    """Return an error class and all below it."""
    return [root, *(each for child in root.__subclasses__() for each in classes(child))]


def instance(kind: type[errors.CaptionerError]) -> BaseException:
    """Return an error of this class."""
    if issubclass(kind, errors.RateLimited):
        return kind(limit="requests", retry_after_s=1)
    return ARGUMENTS.get(kind) or kind()


@pytest.fixture
async def tenancy(tmp_path: Path) -> AsyncIterator[Tenancy]:
    """Limits and ledger over SQLite."""
    components = Tenancy(Settings(engine="fake", data_dir=tmp_path))
    await components.start()
    yield components
    await components.stop()


ENDS = [
    *((instance(kind), {"generated"}) for kind in classes(errors.CaptionerError)),
    *((instance(kind), set()) for kind in classes(errors.CaptionerError)),
    *((error, flags) for error in (ValueError(), asyncio.CancelledError()) for flags in ({"generated"}, set())),
    (None, {"generated"}),
    (None, {"generated", "partial"}),
]


async def test_metrics_log_and_ledger_agree_on_every_end(tenancy: Tenancy, caplog: pytest.LogCaptureFixture) -> None:
    """For every error class, before and after the first token, metrics and log have the ledger's outcome."""
    caplog.set_level(logging.INFO)
    found: dict[str, tuple[str, str, str]] = {}
    for number, (error, flags) in enumerate(ENDS):
        metrics = Metrics()
        record = metrics.begin(f"r{number}", "openai")
        request = CaptionRequest(record.request_id, "m", InlineAudio(""))
        session = tenancy.usage_sessions.session(Caller("acme", "k1"), record)
        await session.admit()
        session.open(request)
        record.usage, record.partial = Usage(13), "partial" in flags
        if "generated" in flags:
            record.first_token = record.started
        await session.settle(error)
        metrics.finish(record, error)
        [(outcome, code)] = [
            (sample.labels["outcome"], sample.labels["code"])
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "captioner_requests_total" and sample.value
        ]
        line = caplog.records[-1]
        assert (line.__dict__["outcome"], line.__dict__["code"]) == (outcome, code)
        failed = outcome in {"failed", "failed_midstream"}
        assert line.levelno == (logging.WARNING if failed else logging.INFO)
        found[record.request_id] = outcome, code, type(error).__name__
    await tenancy.stop()
    with tenancy.database.connect() as connection:
        endings = {row.request_id: row.ending for row in connection.execute(sa.select(usage_records))}
    assert endings == {request_id: outcome for request_id, (outcome, _, _) in found.items()}
    assert len(endings) == len(ENDS)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("kind", classes(errors.CaptionerError), ids=lambda kind: kind.__name__)
def test_each_error_has_its_outcome_and_code(kind: type[errors.CaptionerError], *, generated: bool) -> None:
    """A caller's mistake is rejected, a fault of the service failed; the code is the error's name."""
    record = RequestRecord("r", "openai", first_token=1.0 if generated else None)
    outcome, code = record.conclude(instance(kind))
    if code in REJECTED:
        assert outcome.value == "rejected"
    elif code in FAILED | {"captioner_error"}:
        assert outcome.value == ("failed_midstream" if generated else "failed")
    else:
        assert (outcome.value, code) == ("disconnected", "disconnected")


def test_the_first_conclusion_counts() -> None:
    """A response that the ledger has settled as finished stays finished, whatever happens to its connection."""
    record = RequestRecord("r", "openai", first_token=1.0)
    assert record.conclude(None) == ("finished", "length")
    assert record.conclude(asyncio.CancelledError()) == ("finished", "length")


def test_every_pair_has_a_series_from_the_start() -> None:
    """The foreseen pairs of outcome and code are these; each is exported as zero for both dialects."""
    expected = {
        ("finished", "stop"),
        ("finished", "length"),
        ("partial", "partial"),
        ("disconnected", "disconnected"),
        ("cancelled", "cancelled"),
        *(("rejected", code) for code in REJECTED),
        *((outcome, code) for outcome in ("failed", "failed_midstream") for code in FAILED),
    }
    assert set(OUTCOMES) == expected
    exported = [
        (sample.labels["outcome"], sample.labels["code"])
        for family in Metrics().registry.collect()
        for sample in family.samples
        if sample.name == "captioner_requests_total"
    ]
    assert sorted(exported) == sorted([*expected] * 3)


def test_rules_dashboards_and_pages_name_existing_outcomes() -> None:
    """Every outcome that a rule, a dashboard or a page of an alert selects is one of the list."""
    files = [*HERE.glob("*.yml"), *(DEPLOY / "alerts").glob("*.md"), DEPLOY / "grafana" / "boards.py"]
    selected = {
        outcome
        for file in files
        for words in re.findall(r'outcome=~?\\?"([^"\\]+)', file.read_text())
        for outcome in words.split("|")
    }
    assert {"finished", "partial", "failed", "failed_midstream"} <= selected <= {outcome.value for outcome in Outcome}
