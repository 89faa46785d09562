"""The runbook's commands for keys, passwords and backups, unchanged, against a real PostgreSQL and a service.

No containers are needed: the test's own `docker` and `kubectl` run the commands that these would run in a container.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from benchmarks.servers import Postgres
from tests.support.service import RunningService

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "runbook.md").read_text()

DOCKER = r"""#!/usr/bin/env bash
# docker compose exec -T SERVICE COMMAND…; the test itself starts and stops the servers.
set -euo pipefail
shift
case $1 in
exec)
  shift 3
  exec "$@" ;;
up)
  sed -i "s|@postgres:5432|@127.0.0.1:$PGPORT|" "$CAPTIONER_SECRETS_DIR/captioner_database_url" ;;
*) exit 64 ;;
esac
"""

KUBECTL = r"""#!/usr/bin/env bash
# kubectl --namespace captioner exec -i POD -- COMMAND…; there is nothing to wait for.
set -euo pipefail
case $3 in
exec)
  shift 6
  exec "$@" ;;
wait) ;;
*) exit 64 ;;
esac
"""


def blocks(heading: str) -> list[str]:
    """Return the shell blocks below a heading, without their indentation."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", TEXT, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", re.sub(r"```sh\n(.*?)```", _hidden, section, flags=re.DOTALL), flags=re.MULTILINE)[0]
    found = re.findall(r"^( *)```sh\n(.*?)^ *```", section.replace("\0", "#"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def _hidden(block: re.Match[str]) -> str:
    """Return a block in which comments are not taken for headings."""
    return block[0].replace("#", "\0")


def preamble() -> str:
    """Return the shell functions of the runbook: Compose's, what all platforms share, and the names for Kubernetes.

    Compose's block comes after that for Kubernetes, so its `captioner` holds.
    """
    parts = ("On Kubernetes", "With Compose", "On every platform")
    return "\n".join((f"cd '{ROOT}'", *(blocks(part)[0] for part in parts)))


class Operator:
    """A shell in the directory of Compose's file, with its secrets, and a separate PostgreSQL."""

    def __init__(self, server: Postgres, directory: Path) -> None:
        self.directory, self.server = directory, server
        shutil.copy(ROOT / "deploy" / "compose" / "secrets.sh", directory)
        (directory / "bin").mkdir()
        for name, program in (("docker", DOCKER), ("kubectl", KUBECTL)):
            (directory / "bin" / name).write_text(program)
            (directory / "bin" / name).chmod(0o755)
        path = f"{directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {
            "PATH": path,
            "PGHOST": self.ask("SHOW unix_socket_directories"),
            "PGPORT": str(server.port),
            "CAPTIONER_SECRETS_DIR": str(directory / "secrets"),
        }
        self.run("./secrets.sh; rm secrets/captioner_redis_url; docker compose up")

    def ask(self, statement: str) -> str:
        """Return the first value of a statement that the administrator executes."""
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            row = cursor.fetchone() if cursor.description else None
            return str(row[0]) if row else ""

    def run(self, command: str, *, fails: bool = False, **variables: str) -> str:
        """Run shell commands after the runbook's first part; return their output."""
        script = f"set -euo pipefail\n{preamble()}\ncd '{self.directory}'\n{command}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.directory,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout

    def captioner(self, command: str) -> Any:
        """Return the JSON output of `captioner …`."""
        return json.loads(self.run(f"captioner {command} --format=json"))

    def service(self) -> RunningService:
        """Return a service with these secrets."""
        return RunningService("--auth", "--engine=fake", "--audio-workers=1")

    def billed(self, requests: int) -> Any:
        """Wait until the usage report has this number of requests; return it."""
        deadline = time.monotonic() + 30
        while True:
            usage = self.captioner("usage")
            if sum(row["requests"] for row in usage) == requests:
                return usage
            assert time.monotonic() < deadline, usage
            time.sleep(0.5)


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    """An operator with an empty database `captioner`, whose role of that name needs its password over the network."""
    with Postgres() as server:
        operator = Operator(server, tmp_path)
        monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path / "secrets"))
        hba = Path(operator.ask("SHOW hba_file"))
        operator.ask("CREATE DATABASE captioner")
        operator.ask("CREATE ROLE boss SUPERUSER LOGIN")
        operator.ask(f"ALTER ROLE captioner PASSWORD '{(tmp_path / 'secrets/postgres_password').read_text().strip()}'")
        hba.write_text("local all all trust\nhost all boss all trust\nhost all all all scram-sha-256\n")
        operator.ask("SELECT pg_reload_conf()")
        server.url = server.url.replace("captioner@", "boss@")
        yield operator


def shown(output: str) -> dict[str, str]:
    """Parse a table of names and values."""
    return dict(line.split(maxsplit=1) for line in output.splitlines() if len(line.split(maxsplit=1)) == 2)


def test_keys_passwords_and_backups_as_the_runbook_has_them(operator: Operator) -> None:
    """Each command has the effect that the text states; bills and keys before a loss are restored after it."""
    old = shown(operator.run(blocks("Install")[-1]))["key"]
    key_id = operator.captioner("keys list acme")[0]["id"]
    with operator.service() as service:
        assert '"content"' in operator.run("sample", URL=service.url, KEY=old)

        # A tenant's API key: both keys are valid during the rotation; the old one is refused within two seconds.
        *turn, revoke = blocks("A tenant's API key")[0].replace("KEY_ID", key_id).splitlines()
        new = shown(operator.run("\n".join(turn)))["key"]
        time.sleep(2)
        for key in (old, new):
            assert '"content"' in operator.run("sample", URL=service.url, KEY=key)
        operator.run(revoke)
        time.sleep(2)
        assert '"invalid_api_key"' in operator.run("sample", fails=True, URL=service.url, KEY=old)

    # A password, while the service is down to change its address.
    before = (operator.directory / "secrets" / "captioner_database_url").read_text()
    operator.run(blocks("The upload secret, the admin token, passwords")[-1])
    after = (operator.directory / "secrets" / "captioner_database_url").read_text()
    for address, valid in ((before, False), (after, True)):
        done = operator.run(
            "captioner tenants list >/dev/null 2>&1 && echo fine || echo refused",
            CAPTIONER_DATABASE_URL=address.strip(),
        )
        assert done.strip() == ("fine" if valid else "refused")

    # A backup while the service runs; then everything is lost.
    backups = "\n".join(blocks("Back up the ledger")[:2])
    with operator.service() as service:
        operator.run(backups)
        dump = next(operator.directory.glob("captioner-*.dump"))
        listed = operator.run(f"pg_restore --list {dump} | grep 'TABLE DATA'")
        assert {"usage_records", "tenants", "keys"} <= set(listed.split())
        was = operator.billed(3)
    lost = shown(operator.run("captioner keys create acme"))["key"]
    for block in blocks("Restore the ledger")[1:]:  # as on Kubernetes, and as with Compose
        operator.run(block.replace("captioner-2026-11-25.dump", dump.name))
        assert operator.billed(3) == was
    with operator.service() as service:
        assert '"content"' in operator.run("sample", URL=service.url, KEY=new)
        for key in (old, lost):
            assert '"invalid_api_key"' in operator.run("sample", fails=True, URL=service.url, KEY=key)
    operator.billed(4)

    # The same on another server, on which the service's role is not an administrator.
    operator.ask("ALTER ROLE captioner RENAME TO chief")
    operator.ask("ALTER DATABASE captioner RENAME TO old")
    password = (operator.directory / "secrets" / "postgres_password").read_text().strip()
    operator.ask(f"CREATE ROLE captioner LOGIN PASSWORD '{password}'")
    first, second = blocks("Restore the ledger")[0].replace("captioner-2026-11-25.dump", dump.name).splitlines()
    operator.run(f"{first}\n{second}", PGUSER="boss", PGDATABASE="postgres")
    assert operator.billed(3) == was
    address = (operator.directory / "secrets" / "captioner_database_url").read_text().strip()
    elsewhere = blocks("Back up the ledger")[2]
    operator.run(elsewhere, DATABASE_URL=address)
    assert "usage_records" in operator.run(f"pg_restore --list {dump}")
