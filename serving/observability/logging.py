"""Structured logs: one JSON object per line, or plain text for a terminal."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson

from serving.observability.context import REQUEST_ID
from serving.observability.redaction import redact

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, object]:
    request_id = REQUEST_ID.get()
    return ({"request_id": request_id} if request_id else {}) | {
        key: value
        for key, value in vars(record).items()
        if key not in _STANDARD and not key.startswith(("vllm_", "_ray_"))  # set by vLLM and Ray on every record
    }


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the request's id, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(orjson.dumps(line, default=str).decode())


class TextFormatter(logging.Formatter):
    """`12:34:56 message key=value …`, for a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{key}={value}" for key, value in _extras(record).items() if value not in ("", {}))
        first, newline, rest = super().format(record).partition("\n")
        return redact(f"{first} {extras}".rstrip() + newline + rest)


def configure(level: str, log_format: Literal["json", "text"]) -> None:
    """Write every log record to standard error in the chosen format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Their lines repeat ours, or report a request before it is finished.
    for name in ("uvicorn.access", "uvicorn.error", "httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a warning for each malformed form of a stranger
