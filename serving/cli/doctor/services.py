"""Services that the settings name: database, Redis, bucket, receiver of traces. None is probed that is not set."""

from __future__ import annotations

import asyncio
import importlib
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import redis
import sqlalchemy as sa
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from serving.cli.doctor.findings import Finding, error, ok, warning
from serving.cli.doctor.weights import network_reason, skew
from serving.storage.uploads import UnusableBucket
from serving.tenancy.database import UnusableDatabase, address, failure, open_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

_TIMEOUT_S = 4.0


def database(settings: Settings) -> Iterator[Finding]:
    """Yield whether PostgreSQL answers and accepts the user. SQLite is a file in data_dir, whose disk is probed."""
    if settings.database_url is None:
        yield ok("database", "SQLite in data_dir (database_url is unset)")
        return
    try:
        engine = open_database(settings)
    except UnusableDatabase as problem:
        yield error("database", str(problem), "set database_url to postgresql://user@host/name")
        return
    try:
        began_s = time.time()
        with engine.connect() as connection:
            if engine.dialect.name != "postgresql":
                yield ok("database", f"{address(engine)} can be opened")
                return
            theirs_s = float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
            ended_s = time.time()
    except (sa.exc.SQLAlchemyError, OSError) as problem:
        yield error("database", f"{address(engine)} cannot be used: {failure(problem)}", _DATABASE_REMEDY)
        return
    finally:
        engine.dispose()
    yield ok("database", f"PostgreSQL at {address(engine)} answers")
    yield skew((began_s + ended_s) / 2 - theirs_s, "the database")


_DATABASE_REMEDY = "check host, port, user and password in database_url, and that the server admits this machine"


def counters(settings: Settings) -> Iterator[Finding]:
    """Yield whether Redis answers and accepts the password."""
    if settings.redis_url is None:
        yield ok("redis", "not used (redis_url is unset): each process counts limits alone")
        return
    url = settings.redis_url.get_secret_value()
    try:
        parts = urlsplit(url)
        where = f"{parts.hostname}:{parts.port or 6379}"
        client = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    except ValueError:
        yield error("redis", "redis_url is not an address", "set redis_url to redis://host:6379/0")
        return
    try:
        began_s = time.time()
        seconds, micros = client.time()
        ended_s = time.time()
    except (RedisError, OSError) as problem:
        yield error("redis", f"{where} cannot be used: {_redis_reason(problem)}", _REDIS_REMEDY)
        return
    finally:
        client.close()
    yield ok("redis", f"Redis at {where} answers")
    yield skew((began_s + ended_s) / 2 - (seconds + micros / 1e6), "Redis")


_REDIS_REMEDY = (
    "check host, port and password in redis_url; until Redis answers, limits are counted per process, not together"
)


def _redis_reason(problem: BaseException) -> str:
    text = str(problem).lower()
    if isinstance(problem, AuthenticationError) or "wrongpass" in text or "noauth" in text or "authentic" in text:
        return "wrong user or password"
    if isinstance(problem, ResponseError):
        return "the server refuses commands"
    return network_reason(problem.__cause__ or problem.__context__ or problem)


def bucket(settings: Settings) -> Iterator[Finding]:
    """Yield whether the bucket of uploaded files can be listed; nothing is written."""
    if settings.object_store_url is None:
        return
    remedy = "check the bucket's name, object_store_endpoint, object_store_region and the keys or the identity"
    try:
        # Import obstore only if it is used.
        store = importlib.import_module("serving.storage.objects").Bucket(settings)
    except UnusableBucket as problem:
        yield error("bucket", str(problem), remedy)
        return
    if reason := asyncio.run(store.problem(_TIMEOUT_S)):
        yield error("bucket", f"{settings.object_store_url} cannot be used: {reason}", remedy)
        return
    yield ok("bucket", f"{settings.object_store_url} can be listed")


def traces(settings: Settings) -> Iterator[Finding]:
    """Yield whether the receiver of traces accepts connections."""
    if settings.otlp_endpoint is None:
        return
    parts = urlsplit(settings.otlp_endpoint)
    where = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(where, timeout=_TIMEOUT_S).close()
    except OSError as problem:
        message = f"{where[0]}:{where[1]} cannot be reached: {network_reason(problem)}"
        yield warning("traces", message, "check otlp_endpoint; requests are served, and their traces are lost")
        return
    yield ok("traces", f"{where[0]}:{where[1]} accepts connections")
