"""What goes with a request wherever its work goes, in this task and those that it starts: its id, and its trace."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.observability.request_record import RequestRecord

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Every log line tells it."""

TRACE: ContextVar[Mapping[str, str] | None] = ContextVar("trace", default=None)
"""W3C trace context (`traceparent`, `tracestate`), for whoever does the next part; `None`: nothing is traced."""


class Tracer(Protocol):
    """Traces requests."""

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Open the trace of a request, or join its caller's, which `headers` (names in lower case) tell."""
        ...

    def end(self, record: RequestRecord, outcome: str, code: str) -> str | None:
        """Tell the record as spans; return the trace's id if it was sampled."""
        ...

    def stop(self) -> None:
        """Send what has not been sent."""
        ...


class Untraced:
    """A `Tracer` that does nothing."""

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """See `Tracer`."""

    def end(self, record: RequestRecord, outcome: str, code: str) -> None:
        """See `Tracer`."""

    def stop(self) -> None:
        """See `Tracer`."""
