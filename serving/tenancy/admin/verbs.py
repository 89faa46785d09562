"""The table of administration verbs, from which come the command line, the HTTP API and the list in the README."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.tenancy.admin import kinds
from serving.tenancy.admin.service import Administration
from serving.tenancy.admin.validation import LIMITS, InvalidChangeError
from serving.tenancy.batch_table import BatchStatus
from serving.tenancy.billing import reports
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.plans import State
from serving.types import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a verb: `name` is that of the function's argument.

    `field`: its name over HTTP if different; `flag`: its name on the command line if different, without `--`; `word`:
    its name in the usage, of a positional parameter. `default` makes the value of a parameter that is not given; of a
    required one on the command line only. `nullable`: JSON `null` is accepted. `bounds`: numbers over HTTP are moved
    into these.
    """

    name: str
    kind: kinds.Kind
    help: str = ""
    required: bool = False
    default: Callable[[], Any] | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = False
    field: str = ""
    flag: str = ""
    word: str = ""
    bounds: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Name over HTTP."""
        return self.field or self.name

    def of_json(self, value: Any) -> Any:
        """Convert a field of a JSON object. Raises `InvalidChangeError`."""
        return None if value is None and self.nullable else self._converted(self.kind.from_json, value)

    def of_query(self, word: str) -> Any:
        """Convert a word of a query. Raises `InvalidChangeError`."""
        value = self._converted(self.kind.from_words, word)
        return min(max(value, self.bounds[0]), self.bounds[1]) if self.bounds else value

    def _converted(self, convert: Callable[[Any], Any], value: Any) -> Any:
        try:
            return convert(value)
        except (ValueError, OverflowError):
            raise InvalidChangeError(f"{self.key}: must be {self.kind.phrase}, not {value!r:.80}") from None


@dataclass(frozen=True, slots=True)
class Verb:
    """A row: `words` on the command line; `routes` over HTTP, method and path, none for the command line alone.

    `run` gets the parameters that were given or have a default. `status`: of a success over HTTP.
    """

    words: str
    help: str
    run: Callable[..., Any]
    parameters: tuple[Parameter, ...] = ()
    routes: tuple[tuple[str, str], ...] = ()
    status: int = 200
    needs_change: bool = False

    def of_body(self, path: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's arguments from a path and a JSON object. Raises `InvalidChangeError`."""
        expected = {each.key: each for each in self.parameters if each.key not in path}
        for key in body:
            if key not in expected:
                known = f"known are {', '.join(expected)}" if expected else "there are no fields"
                raise InvalidChangeError(f"{key}: unknown field; {known}")
        for key, each in expected.items():
            if each.required and key not in body:
                raise InvalidChangeError(f"{key} is missing")
        given = {expected[key].name: expected[key].of_json(value) for key, value in body.items()}
        return self._of_path(path) | given

    def of_query(self, path: Mapping[str, str], query: Mapping[str, str]) -> dict[str, Any]:
        """Return the function's arguments from a path and a query. Raises `InvalidChangeError`."""
        asked = [each for each in self.parameters if not each.word]
        given = {each.name: each.of_query(query[each.key]) for each in asked if each.key in query}
        defaults = {each.name: each.default() for each in asked if each.default and each.name not in given}
        return self._of_path(path) | defaults | given

    def _of_path(self, path: Mapping[str, str]) -> dict[str, Any]:
        return {each.name: each.of_query(path[each.key]) for each in self.parameters if each.key in path}


def _create_key(admin: Administration, **values: Any) -> Any:
    key, secret = admin.create_key(**values)
    return {"key": secret, **key}


def _rotate_key(admin: Administration, **values: Any) -> Any:
    key, secret = admin.rotate_key(**values)
    return {"key": secret, **key}


def _suspend(admin: Administration, tenant_id: str) -> Any:
    return admin.change_tenant(tenant_id, state=State.SUSPENDED.value)


def _activate(admin: Administration, tenant_id: str) -> Any:
    return admin.change_tenant(tenant_id, state=State.ACTIVE.value)


def _usage(admin: Administration, **values: Any) -> Any:
    return reports.usage(admin.database, **values)


def _invoice(admin: Administration, tenant: str, month: str) -> Any:
    return reports.invoice(admin.database, tenant, month=month)


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()


def _limit(name: str, flag: str, about: str, *, nullable: bool = False) -> Parameter:
    return Parameter(name, kinds.LIMITS, about, flag=flag, nullable=nullable)


_LIMIT_HELP = f"{', '.join(LIMITS)}; VALUE `none` lifts the limit, `plan` leaves it to the plan; may be repeated"
_TENANT = Parameter("tenant_id", kinds.TEXT, required=True, field="id", word="TENANT")
_KEY = Parameter("key_id", kinds.TEXT, required=True, field="id", word="KEY_ID")
_BATCH = Parameter("batch_id", kinds.TEXT, required=True, field="id", word="BATCH")
_PLAN = Parameter("name", kinds.TEXT, required=True, field="id", word="NAME")
_REGIONS = tuple(each.value for each in Region)

_OF_TENANT = (
    Parameter("name", kinds.TEXT, "name for people"),
    Parameter("free_tokens", kinds.WHOLE, "free tokens, instead of the plan's", nullable=True),
    Parameter("free_days", kinds.WHOLE, "days for them, instead of the plan's", nullable=True),
    Parameter("free_only", kinds.TRUTH, "serve nothing after the free tokens"),
    Parameter("log_content", kinds.TRUTH, "captions may be logged"),
    _limit("limits", "limit", _LIMIT_HELP),
)

GROUPS = {
    "tenants": "customers of the service",
    "keys": "API keys of tenants",
    "plans": "limits, weight and priority that tenants have in common",
    "prices": "prices of 1,000 tokens",
    "batches": "batches of caption requests",
    "sums": "kept sums of usage, from which budgets, reports and invoices are made",
}
"""Words before a verb, and their help. Other verbs have a single word."""

VERBS = (
    Verb("tenants list", "list all tenants", Administration.tenants, (), (("GET", "/v1/tenants"),)),
    Verb("tenants show", "show a tenant", Administration.tenant, (_TENANT,), (("GET", "/v1/tenants/{id}"),)),
    Verb(
        "tenants create",
        "make a tenant",
        Administration.create_tenant,
        (
            _TENANT,
            Parameter("region", kinds.TEXT, "region of its keys and prices", choices=_REGIONS),
            Parameter("plan", kinds.TEXT, "plan; default: standard"),
            *_OF_TENANT,
        ),
        (("POST", "/v1/tenants"),),
        status=201,
    ),
    Verb(
        "tenants set",
        "change a tenant",
        Administration.change_tenant,
        (
            _TENANT,
            Parameter("plan", kinds.TEXT, "plan"),
            Parameter("state", kinds.TEXT, "state", choices=tuple(each.value for each in State)),
            *_OF_TENANT,
        ),
        (("PATCH", "/v1/tenants/{id}"),),
        needs_change=True,
    ),
    Verb("tenants suspend", "refuse a tenant's requests", _suspend, (_TENANT,)),
    Verb("tenants activate", "accept a tenant's requests again", _activate, (_TENANT,)),
    Verb(
        "keys list",
        "list all keys, or a tenant's",
        Administration.keys,
        (Parameter("tenant_id", kinds.TEXT, field="id", word="TENANT"),),
        (("GET", "/v1/keys"), ("GET", "/v1/tenants/{id}/keys")),
    ),
    Verb(
        "keys create",
        "make a key for a tenant; its secret is shown this once",
        _create_key,
        (
            _TENANT,
            Parameter("name", kinds.TEXT, "purpose of the key"),
            Parameter(
                "expires_at",
                kinds.MOMENT,
                "first day on which the key is not valid (2027-01-31, UTC)",
                nullable=True,
                flag="expires",
            ),
            _limit("limits", "limit", _LIMIT_HELP, nullable=True),
        ),
        (("POST", "/v1/tenants/{id}/keys"),),
        status=201,
    ),
    Verb(
        "keys rotate",
        "replace a key by a new one; its secret is shown this once",
        _rotate_key,
        (
            _KEY,
            Parameter("overlap_s", kinds.HOURS, "hours for which the old key stays valid (24)", flag="overlap-hours"),
        ),
        (("POST", "/v1/keys/{id}/rotate"),),
        status=201,
    ),
    Verb("keys revoke", "revoke a key now", Administration.revoke_key, (_KEY,), (("POST", "/v1/keys/{id}/revoke"),)),
    Verb("keys revoke-all", "revoke all keys now, before a change of pepper", Administration.revoke_all_keys),
    Verb("plans list", "list all plans", Administration.plans, (), (("GET", "/v1/plans"),)),
    Verb(
        "plans set",
        "make or change a plan",
        Administration.set_plan,
        (
            _PLAN,
            Parameter("weight", kinds.AMOUNT, "share of a saturated engine, relative to the weights of other plans"),
            Parameter("priority", kinds.WHOLE, "tenants of a higher priority go first"),
            Parameter("free_tokens", kinds.WHOLE, "free tokens, once"),
            Parameter("free_days", kinds.WHOLE, "days for them from a tenant's activation on"),
            Parameter("batch_price_percent", kinds.WHOLE, "price of a token in a batch, in percent of the list price"),
            _limit("tenant_limits", "limit", _LIMIT_HELP),
            _limit("key_limits", "key-limit", "the same for each key"),
        ),
        (("PATCH", "/v1/plans/{id}"),),
    ),
    Verb("prices list", "list all prices", Administration.prices, (), (("GET", "/v1/prices"),)),
    Verb(
        "prices set",
        "set prices from a day on",
        Administration.set_price,
        (
            Parameter("region", kinds.TEXT, "region", required=True, choices=_REGIONS),
            Parameter("currency", kinds.TEXT, "currency; default: CNY", required=True, default=lambda: "CNY"),
            Parameter("input_price", kinds.AMOUNT, "price of 1,000 input tokens", required=True, flag="input"),
            Parameter("output_price", kinds.AMOUNT, "price of 1,000 output tokens", required=True, flag="output"),
            Parameter("valid_from", kinds.MOMENT, "first day (UTC); default: now", required=True, default=now_ms),
        ),
        (("POST", "/v1/prices"),),
        status=201,
    ),
    Verb(
        "batches list",
        "list batches, the latest first",
        Administration.batches,
        (
            Parameter("tenant", kinds.TEXT, "only of this tenant"),
            Parameter("status", kinds.TEXT, "only with this status", choices=tuple(each.value for each in BatchStatus)),
            Parameter("limit", kinds.WHOLE, "most batches; default: 100", bounds=(1, 10_000)),
        ),
        (("GET", "/v1/batches"),),
    ),
    Verb("batches show", "show a batch", Administration.batch, (_BATCH,), (("GET", "/v1/batches/{id}"),)),
    Verb(
        "batches cancel",
        "cancel a batch; what is done stays",
        Administration.cancel_batch,
        (_BATCH,),
        (("POST", "/v1/batches/{id}/cancel"),),
    ),
    Verb(
        "usage",
        "usage by day, tenant and key",
        _usage,
        (
            Parameter("since", kinds.DAY, "first day; default: of this month", default=lambda: _today().replace(day=1)),
            Parameter("until", kinds.DAY, "last day; default: today", default=_today),
            Parameter("by", kinds.GROUPS, "some of day,tenant,key (day,tenant)"),
            Parameter("tenant", kinds.TEXT, "only this tenant"),
            Parameter("key", kinds.TEXT, "only this key"),
        ),
        (("GET", "/v1/usage"),),
    ),
    Verb(
        "invoice",
        "invoice of a tenant for a month",
        _invoice,
        (
            Parameter("tenant", kinds.TEXT, required=True, field="id", word="TENANT"),
            Parameter(
                "month", kinds.MONTH, "such as 2026-11; default: this month", default=lambda: _today().isoformat()[:7]
            ),
        ),
        (("GET", "/v1/tenants/{id}/invoice"),),
    ),
    Verb("sums check", "compare the kept sums of usage with all records", Administration.check_sums),
    Verb("sums rebuild", "compute the kept sums of usage from all records", Administration.rebuild_sums),
    Verb(
        "audit",
        "audit log of changes, the last change first",
        Administration.audit,
        (
            Parameter("subject", kinds.TEXT, "only changes of this tenant, key, plan or region"),
            Parameter("limit", kinds.WHOLE, "most changes; default: 100", bounds=(1, 10_000)),
        ),
        (("GET", "/v1/audit"),),
    ),
)


def markdown() -> str:
    """Return the table of verbs for the README."""
    rows = ["| Command | HTTP | |", "|---|---|---|"]
    for verb in VERBS:
        words = [each.word if each.required else f"[{each.word}]" for each in verb.parameters if each.word]
        query = "&".join(f"{each.key}=" for each in verb.parameters if not each.word)
        routes = [
            f"`{method} {path}{'?' if query and method == 'GET' else ''}{query if method == 'GET' else ''}`"
            for method, path in verb.routes
        ]
        command = " ".join(("captioner", verb.words, *words))
        rows.append(f"| `{command}` | {', '.join(routes) or 'none'} | {verb.help} |")
    return "\n".join(rows)
