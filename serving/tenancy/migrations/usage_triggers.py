"""Triggers that keep `usage_days`, the sums of `usage_records` by day, key and price.

Used by the migration 0004 and by `schema.py`. These statements are never edited: a change of them is a migration with
other statements.

A statement that inserts, updates or deletes records adds the difference to the sums, in the same transaction. So the
sums equal the rows whatever is written, how often, by which version, and wherever a process is killed: a record that
is written twice changes nothing the second time. `FILL` computes the same sums from all rows.

An amount is kept as whole units and nano-units beyond them, each summed separately: neither can overflow 64 bits, even
where the sum in nano-units would.
"""

from __future__ import annotations

NAMES = ("day", "tenant_id", "key_id", "region", "currency", "input_price", "output_price")
"""Columns by which sums are kept; `day`: days since the epoch, UTC, of the admission."""

_DAY_MS = 86_400_000
_NANOS = 1_000_000_000
_BILLED = {
    "billed_requests": "1",
    "input_tokens": "{row}input_tokens",
    "output_tokens": "{row}output_tokens",
    "free_tokens": "{row}free_tokens",
    "amount_units": f"{{row}}amount_nanos / {_NANOS}",
    "amount_nanos": f"{{row}}amount_nanos - {{row}}amount_nanos / {_NANOS} * {_NANOS}",
}
_VALUES = {
    "requests": "1",
    "open_requests": "CASE WHEN {row}ending IS NULL THEN 1 ELSE 0 END",
    "audio_ms": "{row}audio_ms",
} | {name: f"CASE WHEN {{row}}billed THEN {value} ELSE 0 END" for name, value in _BILLED.items()}
"""Values that a record adds to the sums."""

COLUMNS = (*NAMES, *_VALUES)
"""Columns of `usage_days`, in the order of `SUMS`."""

_ADD = ", ".join(f"{name} = usage_days.{name} + excluded.{name}" for name in _VALUES)
_ON_CONFLICT = f"ON CONFLICT ({', '.join(NAMES)}) DO UPDATE SET {_ADD}"
_INSERT = f"INSERT INTO usage_days ({', '.join(COLUMNS)})"


def _names(row: str) -> list[str]:
    return [f"{row}opened_at / {_DAY_MS}", *(f"{row}{name}" for name in NAMES[1:])]


def _sums(rows: str) -> str:
    """Return a query of the sums of `rows`, which have a column `sign`, in one order, so that locks cannot cross."""
    sums = [f"sum(sign * ({value.format(row='')}))" for value in _VALUES.values()]
    columns = ", ".join([*_names(""), *sums])
    order = ", ".join(str(number) for number in range(1, len(NAMES) + 1))
    changed = " OR ".join(f"{each} <> 0" for each in sums)
    grouped = f"GROUP BY {order} HAVING {changed} ORDER BY {order}"
    return f"SELECT {columns} FROM ({rows}) AS differences {grouped}"  # noqa: S608


SUMS = _sums("SELECT 1 AS sign, usage_records.* FROM usage_records")
"""The sums of all rows: their columns are `COLUMNS`."""

FILL = f"{_INSERT} {SUMS}"

_NEW, _OLD = "SELECT 1 AS sign, n.* FROM new_rows AS n", "SELECT -1 AS sign, o.* FROM old_rows AS o"
_POSTGRESQL = (
    f"""
    CREATE FUNCTION usage_days_follow() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            {_INSERT} {_sums(_NEW)} {_ON_CONFLICT};
        ELSIF TG_OP = 'UPDATE' THEN
            {_INSERT} {_sums(f"{_NEW} UNION ALL {_OLD}")} {_ON_CONFLICT};
        ELSIF TG_OP = 'DELETE' THEN
            {_INSERT} {_sums(_OLD)} {_ON_CONFLICT};
        ELSE
            DELETE FROM usage_days;
        END IF;
        RETURN NULL;
    END $$
    """,  # noqa: S608
    *(
        f"CREATE TRIGGER usage_{event} AFTER {when} FOR EACH STATEMENT EXECUTE FUNCTION usage_days_follow()"
        for event, when in (
            ("inserted", "INSERT ON usage_records REFERENCING NEW TABLE AS new_rows"),
            ("updated", "UPDATE ON usage_records REFERENCING NEW TABLE AS new_rows OLD TABLE AS old_rows"),
            ("removed", "DELETE ON usage_records REFERENCING OLD TABLE AS old_rows"),
            ("truncated", "TRUNCATE ON usage_records"),
        )
    ),
)


def statements(dialect: str) -> list[str]:
    """Return the statements that make the triggers, for `sqlite` or `postgresql`."""
    return list(_POSTGRESQL) if dialect == "postgresql" else _of_sqlite()


def _of_sqlite() -> list[str]:
    add, subtract = _of_row("NEW.", 1), _of_row("OLD.", -1)
    return [
        f"CREATE TRIGGER usage_{event} AFTER {when} ON usage_records BEGIN {then} END"
        for event, when, then in (
            ("inserted", "INSERT", add),
            ("updated", "UPDATE", f"{subtract} {add}"),
            ("removed", "DELETE", subtract),
        )
    ]


def _of_row(row: str, sign: int) -> str:
    values = [f"{sign} * ({value.format(row=row)})" for value in _VALUES.values()]
    return f"{_INSERT} VALUES ({', '.join([*_names(row), *values])}) {_ON_CONFLICT};"
