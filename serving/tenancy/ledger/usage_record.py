"""What is kept of an admitted request, and what it costs: one record each, opened at admission, closed once."""

from __future__ import annotations

import dataclasses
import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.errors import CaptionerError, ClientError, Disconnected

if TYPE_CHECKING:
    from serving.observability.request_record import RequestRecord


def now_ms() -> int:
    """The time, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class Ending(enum.StrEnum):
    """How a request ended. Each has its bill (see `is_billed`, and the table in this folder's README)."""

    FINISHED = "finished"
    PARTIAL = "partial"
    """Cut by its deadline: the caller has what there was."""
    REJECTED = "rejected"
    """Its audio cannot be had, read or taken, or a limit was reached: the caller can mend it."""
    FAILED = "failed"
    """By our fault, before anything was generated."""
    FAILED_MIDSTREAM = "failed_midstream"
    """By our fault, after that."""
    DISCONNECTED = "disconnected"
    """The caller has left."""
    CANCELLED = "cancelled"
    """The service was stopped, and did not wait."""
    LOST = "lost"
    """The process that had it was killed, or its machine went. Somebody else closed the record."""


@dataclass(slots=True)
class UsageRecord:
    """One request, as the ledger keeps it. Fields are the columns of `usage_records`; times are ms since the epoch.

    Tokens are the manual's; the engine's own counts stand beside them, and are not what is billed.
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
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def follow(self, request: RequestRecord) -> None:
        """Take over what is known of the request by now."""
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
        """All of it, by column."""
        return {name: getattr(self, name) for name in COLUMNS}

    def progress(self) -> list[Any]:
        """What changes while it is open, in the order of `PROGRESS`."""
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
"""What a running request reports each second, and what is known of it should its process be killed."""


def ending_of(error: BaseException | None, *, partial: bool, generated: bool) -> Ending:
    """How a request ended. `error`: what ended it, `None` if it was answered; `generated`: whether it had a token."""
    match error:
        case None:
            return Ending.PARTIAL if partial else Ending.FINISHED
        case Disconnected():
            return Ending.DISCONNECTED
        case ClientError():
            return Ending.REJECTED
        case CaptionerError() | Exception():
            return Ending.FAILED_MIDSTREAM if generated else Ending.FAILED
        case _:
            return Ending.CANCELLED


def is_billed(ending: Ending, *, given_to_engine: bool) -> bool:
    """Whether the request is to be paid: its input, and the output that was generated for the caller.

    Nobody pays for what we failed to deliver. Who leaves pays for what was done until then, from the moment when the
    audio was given to the engine.
    """
    match ending:
        case Ending.FINISHED | Ending.PARTIAL:
            return True
        case Ending.DISCONNECTED:
            return given_to_engine
        case _:
            return False
