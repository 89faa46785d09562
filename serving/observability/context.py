"""Request context: the request id and the trace, carried by the tasks that work on a request."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.observability.request_record import RequestRecord
    from serving.types import Outcome

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the current request; part of every log line. Tasks inherit it from the task that starts them."""

TRACE: ContextVar[Mapping[str, str] | None] = ContextVar("trace", default=None)
"""W3C trace context (`traceparent`, `tracestate`) for the next hop; `None` if nothing is traced."""


class Tracer(Protocol):
    """A writer of traces of requests."""

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Start the trace of a request, or join the caller's if `headers` (names in lower case) carry one."""
        ...

    def end(self, record: RequestRecord, outcome: Outcome, code: str) -> str | None:
        """Write the record as spans; return the trace's id if the trace is sampled."""
        ...

    def stop(self) -> None:
        """Send the spans that are still buffered."""
        ...


class Untraced:
    """A `Tracer` that does nothing."""

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """See `Tracer`."""

    def end(self, record: RequestRecord, outcome: Outcome, code: str) -> None:
        """See `Tracer`."""

    def stop(self) -> None:
        """See `Tracer`."""
