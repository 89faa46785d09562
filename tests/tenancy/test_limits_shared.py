"""Limits that several services share, over HTTP, with one database and one Redis."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx

from serving.tenancy.admin.service import Administration
from serving.tenancy.database import connect, migrate
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.limits.counter_store import WINDOW_S
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, compatible_body, data_url, wav

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.servers import Redis

PEPPER = "a pepper of three services"
CLIP = data_url(wav(1))
LIMIT, EACH = 40, 60


def test_several_processes_admit_no_more_than_one_would(redis_server: Redis, tmp_path: Path) -> None:
    """Three services get 180 requests within a minute, of which 40 are allowed: exactly 40 are served."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    database = connect(url)
    migrate(database)
    admin = Administration(database, Pepper(PEPPER.encode()), "test")
    admin.create_tenant("acme", plan="unlimited", limits={"requests_per_minute": LIMIT})
    _, key = admin.create_key("acme")
    database.dispose()
    headers = {"authorization": f"Bearer {key}"}
    flags = ("--engine=fake", "--audio-workers=1", "--auth", f"--database-url={url}", f"--key-pepper={PEPPER}")
    with ExitStack() as stack:
        services = [
            stack.enter_context(RunningService(*flags, f"--redis-url={redis_server.url}", start_timeout_s=120))
            for _ in range(3)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(24))

        started = time.time()

        def ask(number: int) -> tuple[float, int, str]:
            # Evenly spaced, so that they are not a burst.
            time.sleep(max(0.0, started + number / 15 - time.time()))
            service = services[number % 3]
            answer = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=headers, timeout=60)
            return time.time(), answer.status_code, answer.headers.get("x-ratelimit-remaining-requests", "")

        answers = list(pool.map(ask, range(3 * EACH)))
        assert all(service.metric("captioner_limits_store_up") == 1 for service in services)
    within = [answer for answer in answers if answer[0] < started + WINDOW_S - 1]
    assert len(within) > 2 * LIMIT
    statuses = Counter(status for _, status, _ in within)
    assert set(statuses) == {200, 429}
    assert statuses[200] == LIMIT
    assert {remaining for _, status, remaining in within if status == 429} <= {"0"} | set(map(str, range(LIMIT)))
