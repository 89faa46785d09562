"""`GET /v1/usage` and `GET /v1/limits`: a tenant's own account, by its own key, as JSON or CSV."""

from __future__ import annotations

import csv
import datetime as dt
import io
import re
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response
from starlette.routing import Route

from serving.api.request_counting import RequestCounter
from serving.errors import InvalidRequest
from serving.tenancy import account
from serving.tenancy.limits import remaining

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.datastructures import QueryParams
    from starlette.requests import Request

    from serving.api.components import Components
    from serving.types import Caller

MAX_DAYS = 366
"""Most days of one usage report."""

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_HEADERS = {"cache-control": "no-store", "vary": "accept, authorization"}


def routes(components: Components) -> list[Route]:
    """Return the routes of the account."""
    endpoints = _Endpoints(components)
    return [Route("/v1/usage", endpoints.usage), Route("/v1/limits", endpoints.limits)]


class _Endpoints:
    def __init__(self, components: Components) -> None:
        self._keys = components.keys
        self._accounts = components.accounts
        self._requests = RequestCounter(components.usage_sessions)

    async def usage(self, request: Request) -> Response:
        """Answer what the caller's tenant used, by day and key."""
        caller = await self._admit(request)
        query = request.query_params
        _check_known(query, ("since", "until", "by", "format"))
        as_csv = _is_csv(request)
        today = dt.datetime.now(dt.UTC).date()
        until = _day(query, "until", today)
        since = _day(query, "since", min(until, today).replace(day=1))
        if since > until:
            raise InvalidRequest(f"since {since} is after until {until}.", param="since")
        if (days := (until - since).days + 1) > MAX_DAYS:
            raise InvalidRequest(f"{days} days are more than {MAX_DAYS}: ask for fewer at a time.", param="since")
        by = _groups(query)
        report = await self._accounts.usage(caller, since=since, until=until, by=by)
        if as_csv:
            return _csv(account.columns(by), report["data"], f"usage-{caller.tenant_id}-{since}-{until}.csv")
        return _json(report)

    async def limits(self, request: Request) -> Response:
        """Answer the limits of the caller's tenant and key, and what is left of each."""
        caller = await self._admit(request)
        _check_known(request.query_params, ("format",))
        as_csv = _is_csv(request)
        report = await self._accounts.limits(caller)
        if as_csv:
            return _csv(remaining.COLUMNS, report["data"], f"limits-{caller.tenant_id}.csv")
        return _json(report)

    async def _admit(self, request: Request) -> Caller:
        """Return the caller, and count the request, as of lists of models."""
        caller = self._keys.authenticate(request.headers)
        await self._requests.count(caller)
        return caller


def _check_known(query: QueryParams, known: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a parameter that would be ignored: `tenant=…` shows nobody else's data."""
    for name in query:
        if name not in known:
            raise InvalidRequest(f"{name[:64]} is unknown; known are {', '.join(known)}.", param=name[:64])


def _day(query: QueryParams, name: str, default: dt.date) -> dt.date:
    if (word := query.get(name)) is None:
        return default
    try:
        day = dt.date.fromisoformat(word) if _DAY.fullmatch(word) else None
    except ValueError:
        day = None
    if day is None or not dt.date(1970, 1, 1) <= day <= dt.date(9998, 12, 31):
        raise InvalidRequest(f"{name} must be a day such as 2026-11-01, from 1970 to 9998.", param=name)
    return day


def _groups(query: QueryParams) -> Sequence[str]:
    names = query.get("by", ",".join(account.GROUPS)).split(",")
    if not set(names) <= set(account.GROUPS) or len(set(names)) != len(names):
        raise InvalidRequest(f"by must be some of {', '.join(account.GROUPS)}, separated by commas.", param="by")
    return names


def _is_csv(request: Request) -> bool:
    """Return whether CSV is wanted: by `format`, which comes first, or by the header `accept`."""
    wanted = request.query_params.get("format")
    if wanted is None:
        types = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
        return "text/csv" in types and "application/json" not in types
    if wanted not in {"json", "csv"}:
        raise InvalidRequest("format must be json or csv.", param="format")
    return wanted == "csv"


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], name: str) -> Response:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    headers = _HEADERS | {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text.getvalue(), headers=headers, media_type="text/csv")


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: names of keys are any text."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _json(report: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(report), headers=_HEADERS, media_type="application/json")
