"""Declarations of the operator's settings: logs, administration, metrics and traces; as in `groups`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr

from serving.settings.types import Example


def _log_format() -> Literal["json", "text"]:
    return "text" if sys.stderr is not None and sys.stderr.isatty() else "json"


class Logs(BaseModel):
    """Level and format of log lines."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")
    log_format: Annotated[Literal["json", "text"], Example("json")] = Field(
        default_factory=_log_format,
        description="Format of log lines: `json` for machines, `text` for a person. Default: `text` on a terminal, "
        "else `json`",
    )


class AdministrationApi(BaseModel):
    """HTTP API of tenants, keys, plans and prices."""

    admin_host: str = Field("127.0.0.1", description="Address of the administration's HTTP API")
    admin_port: Annotated[int | None, Example(8100)] = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port of the administration's HTTP API, different from port; 0 picks a free one. Unset: no API",
    )
    admin_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Bearer token of the administration's HTTP API; required with admin_port. Unset: no API",
    )


class MetricsAndTraces(BaseModel):
    """Scraping of metrics and export of traces."""

    metrics_token: SecretStr | None = Field(
        None,
        description="Bearer token of scrapes. Unset: without metrics_port, /metrics answers only direct requests from "
        "this machine (in a cluster none), and does not name tenants",
    )
    metrics_tenants: int = Field(
        100, ge=0, description="Most tenants that metrics name; the rest are counted as `other`"
    )
    metrics_port: Annotated[int | None, Example(9464)] = Field(
        None,
        ge=0,
        le=65_000,
        description="First of 32 TCP ports, of which each process serves its metrics on the first free; 0: any port. "
        "Unset: in a cluster any port, else the service's port",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="Address of metrics_port on one machine; in a cluster it is the node's. Not on loopback: tenants "
        "are named only with metrics_token",
    )
    vllm_metrics: bool = Field(default=True, description="vLLM's metrics in addition to the service's")
    otlp_endpoint: Annotated[str | None, Example("http://collector:4318")] = Field(
        None, description="Receiver of traces (OTLP over HTTP). Unset: nothing is traced"
    )
    trace_ratio: float = Field(0.01, ge=0, le=1, description="Share of the requests with a valid key that are traced")
    trace_follow_callers: bool = Field(
        default=False,
        description="Sampling decision of a caller's `traceparent` instead of trace_ratio, for callers who are trusted "
        "not to trace everything; their trace id is joined in any case",
    )
