"""The database of tenancy: SQLite in a file by default, PostgreSQL if several machines share it."""

from __future__ import annotations

import fcntl
import sqlite3
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from serving.tenancy.billing import prices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

_CONNECT_S = 5
_STATEMENT_S = 30
_BUSY_S = 10
_MOST_CHARACTERS = 200
_MIGRATION_LOCK = 0x63617074
"""Number of the advisory lock that a migration holds in PostgreSQL."""

_SQLITE, _POSTGRESQL = "sqlite", "postgresql"


_REASONS = {
    "authentication failed": "wrong user or password",
    "no password supplied": "wrong user or password",
    "pg_hba.conf": "access refused by the server",
    "too many": "too many connections",
    "starting up": "the server is starting",
    "shutting down": "the server is stopping",
    "could not translate host name": "host name not found",
    "failed to resolve host": "host name not found",
    "connection refused": "connection refused: no server listens there",
    "no such file": "no server listens there",
    "timeout": "no answer in time",
    "timed out": "no answer in time",
    "unreachable": "network unreachable",
    "permission denied": "permission denied",
    "is full": "disk full",
    "no space left": "disk full",
    "readonly database": "read-only file or disk",
    "disk i/o error": "disk error",
    "unable to open database file": "the file cannot be opened",
    "is locked": "locked by another process",
    "does not exist": "the database or user does not exist",
}
"""Words of the drivers' messages, and the reason that an operator reads; the first that is found holds."""


class UnusableDatabase(ValueError):  # noqa: N818
    """The database's address or its content cannot be used; a retry does not help."""


def open_database(settings: Settings) -> sa.Engine:
    """Return the database that the settings name, without connecting. Raises `UnusableDatabase`."""
    if settings.database_url is not None:
        return connect(settings.database_url.get_secret_value())
    return connect(f"sqlite:///{settings.data_dir / 'captioner.db'}")


def connect(address: str) -> sa.Engine:
    """Return an engine for a `sqlite:///…` or `postgresql://…` address. Raises `UnusableDatabase`."""
    try:
        url = sa.make_url(address)
    except sa.exc.ArgumentError:
        raise UnusableDatabase("database_url must be an address such as postgresql://user@host/name") from None
    match url.get_backend_name():
        case "sqlite":
            return _sqlite(url)
        case "postgresql" | "postgres":
            return _postgresql(url.set(drivername="postgresql+psycopg"))
        case other:
            raise UnusableDatabase(f"database_url: {other} is not supported, use sqlite or postgresql")


def migrate(database: sa.Engine) -> None:
    """Migrate the tables to this version. Several processes may call it at once; one of them migrates.

    Raises `UnusableDatabase` if the database has a later version. Raises `sqlalchemy.exc.SQLAlchemyError` if it is away
    or refuses the user, and `OSError` if the file that SQLite's migrations lock cannot be written: retry these.
    """
    with as_file(files("serving.tenancy.migrations")) as scripts, _migration_lock(database) as connection:
        config = Config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UnusableDatabase(f"the database cannot be migrated to this version: {error}") from error
        prices.seed(connection)


def address(database: sa.Engine) -> str:
    """Return host, port and name of the database, or the path of its file, without user and password."""
    url = database.url
    if database.dialect.name == _SQLITE:
        return str(url.database)
    return f"{url.host or 'local socket'}:{url.port or 5432}/{url.database or ''}"


def failure(error: BaseException) -> str:
    """Return the reason for which a database cannot be used, without any value of a statement and any password.

    The message of a failed connection is libpq's, which does not have the password. Of other errors only the known
    reason or the type is returned, because their messages may have values of rows.
    """
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    message = " ".join(str(cause).split())
    found = next((reason for words, reason in _REASONS.items() if words in message.lower()), None)
    if isinstance(cause, OSError):
        return f"{cause.strerror or cause} ({cause.filename})"
    connecting = message.startswith(("connection ", "failed to "))
    return found or (message[:_MOST_CHARACTERS] if connecting else type(cause).__name__)


@contextmanager
def _migration_lock(database: sa.Engine) -> Iterator[sa.Connection]:
    """Begin a transaction while no other process migrates."""
    if database.dialect.name == _POSTGRESQL:
        with database.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            yield connection
        return
    with database.connect():  # makes the directory
        path = Path(f"{database.url.database}.lock")
    path.touch(mode=0o600)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with database.begin() as connection:
            yield connection


def _sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise UnusableDatabase("database_url: SQLite needs a file, as in sqlite:////var/lib/captioner/captioner.db")
    path = Path(url.database).absolute()
    database = sa.create_engine(url.set(database=str(path)), connect_args={"timeout": _BUSY_S})

    @sa.event.listens_for(database, "do_connect")
    def connecting(*_: Any) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                path.touch(mode=0o600)  # SQLite's other files get the mode of this one
        except OSError as error:  # a full or read-only disk is an outage as any other
            raise sqlite3.OperationalError(f"{error.strerror}: {error.filename}") from error

    @sa.event.listens_for(database, "connect")
    def connected(connection: Any, _: Any) -> None:
        # Transactions are begun explicitly: Python's module would leave DDL and reads out of them.
        connection.isolation_level = None
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(database, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return database


def _postgresql(url: sa.URL) -> sa.Engine:
    options = f"-c statement_timeout={_STATEMENT_S * 1000} -c lock_timeout={_STATEMENT_S * 1000} -c timezone=UTC"
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
    return sa.create_engine(
        url,
        connect_args={"connect_timeout": _CONNECT_S, "options": options, "application_name": "captioner", **alive},
        pool_size=4,
        max_overflow=4,
        pool_timeout=_BUSY_S,
        pool_pre_ping=True,
    )
