"""Starts without a database: the port answers, the log has host and reason, signals work, and it goes on by then."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
import sqlalchemy as sa

from benchmarks.servers import free_port
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav
from tests.tenancy.running import Command

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.servers import Postgres, Redis

KEY = {"authorization": "Bearer sk-of-the-settings"}
ADMIN = {"authorization": "Bearer an-administrators-token"}
WAITING = "database cannot be used, waiting for it"


@pytest.fixture
def secured(postgres: Postgres) -> Any:
    """The address of a database whose user has a password, with `{}` in its place."""
    name = f"secured_{uuid4().hex[:8]}"
    admin = sa.create_engine(postgres.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    rules = postgres._directory / "data" / "pg_hba.conf"
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD 'the-right-one'")
        connection.exec_driver_sql(f"CREATE DATABASE {name} OWNER {name}")
        rules.write_text(f"host {name} {name} 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    yield f"postgresql://{name}:{{}}@127.0.0.1:{postgres.port}/{name}"
    admin.dispose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_without_database_answers_and_obeys(tmp_path: Path, number: signal.Signals) -> None:
    """Captions get 503 in both dialects, the process is alive and not ready, and a signal ends it at once."""
    port = free_port()
    address = f"postgresql://captioner:hunter2@127.0.0.1:{port}/captioner"
    with Command(tmp_path, "serve", CAPTIONER_DATABASE_URL=address, CAPTIONER_API_KEYS="sk-of-the-settings") as service:
        ready = service.wait(lambda: service.get("/readyz"))
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert ready.json()["reason"] == "The service waits for the database; the log has the reason."
        assert (service.get("/healthz").status_code, service.get("/healthz").json()) == (200, {"alive": True})
        clip = data_url(wav(1))
        native = httpx.post(service.url + NATIVE, json=native_body(clip), headers=KEY)
        assert (native.status_code, native.json()["code"]) == (503, "ModelUnavailable")
        compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(clip, stream=True), headers=KEY)
        assert (compatible.status_code, compatible.json()["error"]["code"]) == (503, "model_unavailable")
        assert compatible.headers["retry-after"] == "10"
        assert service.get("/v1/models", **KEY).status_code == 503
        metrics = service.get("/metrics").text
        assert "\ncaptioner_ready 0.0" in metrics
        assert "\ncaptioner_database_up 0.0" in metrics
        assert "\ncaptioner_ledger_writable 1.0" in metrics
        [line] = service.lines(WAITING)
        assert line["database"] == f"127.0.0.1:{port}/captioner"
        assert line["reason"] == "connection refused: no server listens there"
        assert "hunter2" not in service.text()
        service.process.send_signal(number)
        assert service.process.wait(timeout=5) == 0


def test_a_host_that_does_not_answer_does_not_hold_up_a_signal(tmp_path: Path) -> None:
    """While a connection attempt hangs, the port answers and a signal ends the process at once."""
    import socket  # noqa: PLC0415

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)  # accepts, and never says a word
        address = f"postgresql://captioner@127.0.0.1:{silent.getsockname()[1]}/captioner"
        with Command(tmp_path, "serve", CAPTIONER_DATABASE_URL=address, CAPTIONER_API_KEYS="sk-x") as service:
            service.wait(lambda: service.get("/readyz"))
            assert service.stop(within_s=5) == 0


def test_a_wrong_password_is_named_and_can_be_corrected(tmp_path: Path, secured: str) -> None:
    """The log distinguishes a wrong password from a server that is away; once it is right the service goes on."""
    address = secured.format("a-wrong-one")
    with Command(tmp_path, "serve", CAPTIONER_DATABASE_URL=address, CAPTIONER_API_KEYS="sk-of-the-settings") as service:
        service.wait(lambda: service.lines(WAITING))
        assert service.lines(WAITING)[0]["reason"] == "wrong user or password"
        assert service.wait(lambda: service.get("/readyz")).status_code == 503
        assert "a-wrong-one" not in service.text()
        engine = sa.create_engine(secured.format("the-right-one").replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER ROLE {engine.url.username} PASSWORD 'a-wrong-one'")
        engine.dispose()
        service.wait(lambda: service.get("/readyz").status_code == 200)
        answer = httpx.post(service.url + COMPATIBLE, json=compatible_body(data_url(wav(1))), headers=KEY, timeout=30)
        assert answer.status_code == 200
        assert len(service.lines("database can be used")) == 1
        assert service.stop() == 0


def test_a_service_goes_on_when_its_database_comes(tmp_path: Path, postgres: Postgres) -> None:
    """A server that starts later is found, the tables are migrated, and captions are made."""
    postgres.stop()
    try:
        with Command(
            tmp_path, "serve", CAPTIONER_DATABASE_URL=postgres.url, CAPTIONER_API_KEYS="sk-of-the-settings"
        ) as service:
            service.wait(lambda: service.get("/readyz"))
            assert service.get("/v1/models", **KEY).status_code == 503
            postgres.start()
            service.wait(lambda: service.get("/readyz").status_code == 200)
            assert service.get("/v1/models", **KEY).status_code == 200
            assert service.lines()[-1]["message"] != WAITING
            assert service.stop() == 0
    finally:
        if postgres._process is None:
            postgres.start()


def test_a_database_of_a_later_version_ends_the_start(tmp_path: Path) -> None:
    """A database that no repetition makes usable ends the process, with the reason in the log."""
    from serving.tenancy import database as databases  # noqa: PLC0415

    database = databases.connect(f"sqlite:///{tmp_path}/later.db")
    databases.migrate(database)
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.dispose()
    with Command(
        tmp_path, "serve", CAPTIONER_DATABASE_URL=f"sqlite:///{tmp_path}/later.db", CAPTIONER_API_KEYS="sk-x"
    ) as service:
        assert service.process.wait(timeout=60) == 1
        [line] = service.lines("database cannot be used")
        assert "9999" in line["reason"]


def test_administration_without_database_answers_and_obeys(tmp_path: Path) -> None:
    """`captioner admin` answers 503 and logs the reason; a signal ends it at once."""
    address = f"postgresql://captioner:hunter2@127.0.0.1:{free_port()}/captioner"
    with Command(
        tmp_path,
        "admin",
        CAPTIONER_DATABASE_URL=address,
        CAPTIONER_ADMIN_TOKEN="an-administrators-token",  # noqa: S106
    ) as admin:
        assert admin.wait(lambda: admin.get("/healthz")).status_code == 200
        answer = admin.get("/v1/tenants", **ADMIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert admin.lines(WAITING)[0]["reason"] == "connection refused: no server listens there"
        assert "hunter2" not in admin.text()
        assert admin.stop(within_s=5) in {0, -signal.SIGTERM}


def test_administration_goes_on_when_its_database_comes(tmp_path: Path, postgres: Postgres) -> None:
    """`captioner admin` migrates a database that starts later."""
    postgres.stop()
    try:
        with Command(
            tmp_path,
            "admin",
            CAPTIONER_DATABASE_URL=postgres.url,
            CAPTIONER_ADMIN_TOKEN="an-administrators-token",  # noqa: S106
        ) as admin:
            admin.wait(lambda: admin.lines(WAITING))
            postgres.start()
            admin.wait(lambda: admin.get("/v1/tenants", **ADMIN).status_code == 200)
    finally:
        if postgres._process is None:
            postgres.start()


def test_redis_away_at_start_is_no_outage(tmp_path: Path, redis_server: Redis) -> None:
    """Limits are counted in memory until Redis answers; a wrong password is named; signals work."""
    for address, error in (
        (f"redis://127.0.0.1:{free_port()}/0", "ConnectionError"),
        (redis_server.url.replace("//", "//user:hunter2@"), "AuthenticationError"),
    ):
        with Command(
            tmp_path, "serve", CAPTIONER_REDIS_URL=address, CAPTIONER_API_KEYS="sk-of-the-settings"
        ) as service:
            service.wait(lambda service=service: service.get("/readyz").status_code == 200)  # type: ignore[misc]
            assert [line["error"] for line in service.lines("Redis lost, limits hold per process")] == [error]
            assert "hunter2" not in service.text()
            assert service.stop(within_s=10) == 0
