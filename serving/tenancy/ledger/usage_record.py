"""The ledger's record of an admitted request, and what it costs: opened at admission, closed once."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.types import Outcome

if TYPE_CHECKING:
    from serving.observability.request_record import RequestRecord


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class UsageRecord:
    """The record of one request. Fields are the columns of `usage_records`; times are ms since the epoch.

    Tokens are the manual's; the engine's own counts are kept as well, and are not billed. `ending` is the `Outcome`.
    """

    request_id: str
    tenant_id: str
    key_id: str
    region: str
    dialect: str
    model: str
    stream: bool
    audio_form: str
    replica: str
    currency: str
    input_price: str
    output_price: str
    opened_at: int = field(default_factory=now_ms)
    prepared_at: int | None = None
    first_token_at: int | None = None
    closed_at: int | None = None
    reported_at: int = field(default_factory=now_ms)
    audio_ms: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    engine_input_tokens: int = 0
    engine_output_tokens: int = 0
    ending: str | None = None
    finish_reason: str | None = None
    billed: bool = False
    free_tokens: int = 0
    amount_nanos: int = 0

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    def follow(self, request: RequestRecord) -> None:
        """Copy what is known of the request by now."""
        if request.usage is not None:
            self.audio_ms = round(1000 * request.audio_s)
            self.input_tokens, self.output_tokens = request.usage.input_tokens, request.usage.output_tokens
            self.engine_input_tokens = request.engine_input_tokens
            self.engine_output_tokens = request.engine_output_tokens
        if request.first_token is not None and self.first_token_at is None:
            # The clock is read last, and nothing is rounded up: it never comes before `prepared_at`.
            ago_ns = int(1e9 * (time.perf_counter() - request.first_token))
            self.first_token_at = (time.time_ns() - ago_ns) // 1_000_000

    def row(self) -> dict[str, Any]:
        """Return all values by column."""
        return {name: getattr(self, name) for name in COLUMNS}

    def closed_row(self, outcome: Outcome) -> dict[str, Any]:
        """Return all values by column, as of a record that is closed now."""
        at = now_ms()
        return self.row() | {"ending": outcome.value, "closed_at": at, "reported_at": at}

    def progress(self) -> list[Any]:
        """Return the values that change while the record is open, in the order of `PROGRESS`."""
        return [getattr(self, name) for name in PROGRESS]


COLUMNS = tuple(each.name for each in dataclasses.fields(UsageRecord))

PROGRESS = (
    "request_id",
    "prepared_at",
    "first_token_at",
    "audio_ms",
    "input_tokens",
    "output_tokens",
    "engine_input_tokens",
    "engine_output_tokens",
)
"""Values that a running request reports each second; they are all that is known if its process is killed."""


def is_billed(outcome: Outcome, *, given_to_engine: bool) -> bool:
    """Return whether the request is billed: its input, and the output that was generated for the caller.

    Nobody pays for what the service failed to deliver. A caller that leaves pays for what was done until then, from the
    moment when the audio was given to the engine. The table in tenancy/BILLS.md has all endings.
    """
    return outcome in {Outcome.FINISHED, Outcome.PARTIAL} or (outcome is Outcome.DISCONNECTED and given_to_engine)
