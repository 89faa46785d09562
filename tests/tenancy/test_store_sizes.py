"""Bytes of a request in PostgreSQL and of a tenant in Redis, which deploy/capacity.md multiplies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import redis as redis_client

from serving.tenancy import database as databases
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.limits.redis import RedisStore
from serving.types import FreeQuota, Limits
from tests.tenancy.limits_support import caller, charge, limiter

if TYPE_CHECKING:
    from benchmarks.servers import Postgres, Redis

RECORDS = 20_000
_FILL = f"""
    INSERT INTO usage_records
    SELECT md5(n::text)::uuid::text, 'tenant-' || mod(n, 20), 'key-' || substr(md5(mod(n, 40)::text), 1, 12), 'beijing',
        'openai', 'qwen3-omni-30b-a3b-captioner', false, 'data_url', md5(mod(n, 3)::text)::uuid::text,
        at, at, at, at + 1000, at + 5000, 30000, 383, 600, 400, 600, 'finished', 'stop', true, 0, 'CNY', '0.0158',
        '0.0127', 383 * 15800 + 600 * 12700
    FROM (SELECT n, 1796083200000 + n::bigint * 100 AS at FROM generate_series(1, {RECORDS}) AS n) AS numbers
"""  # noqa: S608


def test_bytes_of_a_record_in_postgresql(postgres: Postgres) -> None:
    """A usage record takes about 328 bytes, its indexes about 227; sums by day have a row for each tenant and key."""
    admin = databases.connect(postgres.url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE store_sizes")
    database = databases.connect(postgres.url.replace("/postgres", "/store_sizes"))
    databases.migrate(database)
    with database.begin() as connection:
        connection.exec_driver_sql(_FILL)
        sizes = "SELECT pg_relation_size('usage_records'), pg_indexes_size('usage_records')"
        rows, indexes = connection.exec_driver_sql(sizes).one()
        days = connection.exec_driver_sql("SELECT count(*) FROM usage_days").scalar_one()
    database.dispose()
    admin.dispose()
    assert 300 < rows / RECORDS < 360
    assert 200 < indexes / RECORDS < 300
    assert days == 40


async def test_bytes_of_a_tenant_in_redis(redis_server: Redis) -> None:
    """A tenant and a key with every limit, busy in each second of a minute, take under 8 KiB."""
    limits = Limits(
        requests_per_minute=1000,
        tokens_per_minute=10**6,
        audio_seconds_per_minute=10**5,
        concurrent_requests=100,
        concurrent_audio_seconds=10**4,
        tokens_per_day=10**9,
        tokens_per_month=10**9,
        nanos_per_day=10**15,
        nanos_per_month=10**15,
    )
    store = RedisStore(redis_server.url)
    client = redis_client.Redis.from_url(redis_server.url)
    client.flushdb()
    async with limiter(store, Spent(Sums(1, 2, 3, 4), Sums(1, 2, 3, 4), free_tokens=3)) as running:
        reservation = await running.admit(caller(limits, limits, FreeQuota(10**6, time.time() + 3600)))
        await charge(running, reservation, audio_s=30, tokens=1000, nanos=10**6)
        for key in client.scan_iter():
            if key.rpartition(b":")[2] in {b"r", b"t", b"a"}:
                client.hset(key, mapping={str(10**9 + second): "100000" for second in range(60)})
        used = {key: client.memory_usage(key, samples=0) or 0 for key in client.scan_iter()}
    assert len(used) >= 10
    assert sum(used.values()) < 8 * 1024
