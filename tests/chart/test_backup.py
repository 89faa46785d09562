"""Backup and restore of the ledger: the Jobs of the chart by the runbook's commands, against a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from benchmarks.servers import Postgres
from tests.chart.combinations import COMBINATIONS
from tests.chart.jobs import environment, write_kubectl
from tests.chart.rendering import ROOT, RefusedError, only, pod_templates, template

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNBOOK = (ROOT / "deploy" / "runbook.md").read_text()

RCLONE = r"""#!/bin/sh
# rclone with the remote `store:bucket/backups` in $STORE.
[ "$1" = --config= ] || exit 64
shift
case $1 in
lsf) ls "$STORE" ;;
copy)
  [ "$2 $3 $4 $6" = "--immutable --include captioner-*.dump store:bucket/backups" ] || exit 64
  cp -n "$5"/captioner-*.dump "$STORE" ;;
copyto) cp "$STORE/${2#store:bucket/backups/}" "$3" ;;
deletefile) rm "$STORE/${2#store:bucket/backups/}" ;;
*) exit 64 ;;
esac
"""


def commands(heading: str) -> str:
    """Return the only shell block below a heading of the runbook."""
    section = RUNBOOK.partition(f"### {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return str(block)


BACK_UP, RESTORE = commands("Backups of the chart"), commands("From a backup of the chart")


class Cluster:
    """A ledger in a database, and the Jobs of a release."""

    def __init__(self, server: Postgres, directory: Path, helm: Path, values: dict[str, Any]) -> None:
        self.backups, self.store = directory / "backups", directory / "store"
        for each in (self.backups, self.store):
            each.mkdir()
        name = f"test_{uuid4().hex}"
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE ledger".encode())
        self.url = server.url.rpartition("/")[0] + f"/{name}"
        database = self.url.replace("postgresql:", "postgresql+psycopg:")
        write_kubectl(directory, template(helm, values, name="captioner"), database, BACKUP_DIR=self.backups)
        (directory / "rclone").write_text(RCLONE)
        (directory / "rclone").chmod(0o755)
        self._environment = environment(directory) | {"STORE": str(self.store)}

    def run(self, command: str, *, fails: bool = False) -> str:
        """Run shell commands; return their output."""
        script = f"set -euo pipefail\nK='kubectl --namespace captioner'\n{command}"
        done = subprocess.run(
            ["bash", "-c", script], env=self._environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout

    def back_up(self) -> str:
        """Back up by the runbook's commands; return the new backup's name."""
        (name,) = re.findall(r"wrote (captioner-.*\.dump)", self.run(BACK_UP))
        return str(name)

    def restore(self, backup: str) -> None:
        """Restore by the runbook's commands."""
        self.run(RESTORE.replace("captioner-2026-11-25T021700Z.dump", backup))

    def add_tenant(self, name: str) -> None:
        """Add a tenant that is otherwise like `acme`."""
        populate = "INSERT INTO tenants SELECT (json_populate_record(t, %s::json)).* FROM tenants t LIMIT 1"
        self.ask(populate, json.dumps({"id": name}))

    def ask(self, statement: str, *values: str) -> list[Any]:
        """Execute a statement; return the first column of its rows."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return [row[0] for row in cursor] if cursor.description else []

    @property
    def tenants(self) -> list[str]:
        """Ids of the tenants."""
        return self.ask("SELECT id FROM tenants ORDER BY id")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server with a ledger that has one tenant and one key, in the database `ledger`."""
    with Postgres() as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE ledger")
        url = server.url.replace("postgresql:", "postgresql+psycopg:").rpartition("/")[0] + "/ledger"
        for arguments in (("tenants", "create", "acme"), ("keys", "create", "acme")):
            program = Path(sys.executable).with_name("captioner")
            subprocess.run([program, *arguments], env=os.environ | {"CAPTIONER_DATABASE_URL": url}, check=True)
        yield server


@pytest.fixture(params=["pvc", "objectStore"])
def cluster(request: pytest.FixtureRequest, postgres: Postgres, tmp_path: Path, helm: Path) -> Cluster:
    """A cluster whose backups are in a claim, and one whose backups are in a bucket; two are kept."""
    values = {"backup": {"storage": request.param, "keep": 2, "objectStore": {"path": "bucket/backups", "secret": "s"}}}
    return Cluster(postgres, tmp_path, helm, values)


def test_a_restore_brings_the_ledger_back(cluster: Cluster) -> None:
    """The ledger is that of the backup: without what came later; a second restore changes nothing."""
    backup = cluster.back_up()
    cluster.add_tenant("later")
    cluster.ask("DELETE FROM keys")
    for _ in range(2):
        cluster.restore(backup)
        assert cluster.tenants == ["acme"]
        assert len(cluster.ask("SELECT id FROM keys")) == 1


def test_the_newest_backup_is_restored_by_default(cluster: Cluster) -> None:
    """Without a name the restore takes the newest, and only the newest are kept."""
    first = cluster.back_up()
    kept = cluster.store if any(cluster.store.iterdir()) else cluster.backups
    for day in ("01", "02"):
        (kept / f"captioner-2020-01-{day}T021700Z.dump").write_text("older")
    cluster.add_tenant("later")
    time.sleep(1)  # names have seconds
    second = cluster.back_up()
    assert sorted(each.name for each in kept.iterdir()) == sorted({first, second})
    cluster.add_tenant("last")
    cluster.run(re.sub(r"  \$K set env .*\n", "", RESTORE))
    assert cluster.tenants == ["acme", "later"]


def test_a_damaged_backup_changes_nothing(cluster: Cluster) -> None:
    """A restore that fails in the middle leaves the ledger as it was."""
    backup = cluster.back_up()
    for directory in (cluster.store, cluster.backups):
        if (directory / backup).exists():
            whole = (directory / backup).read_bytes()
            (directory / backup).write_bytes(whole[: len(whole) * 3 // 4])
    cluster.add_tenant("later")
    cluster.run(RESTORE.replace("captioner-2026-11-25T021700Z.dump", backup), fails=True)
    assert cluster.tenants == ["acme", "later"]


def test_a_restore_refuses_while_the_service_runs(cluster: Cluster) -> None:
    """A client of the database is counted, and the log names the remedy."""
    backup = cluster.back_up()
    with psycopg.connect(cluster.url):
        command = RESTORE.replace("captioner-2026-11-25T021700Z.dump", backup)
        cluster.run(command, fails=True)
        assert "1 clients use the database; stop the service first" in cluster.run("$K logs job/captioner-restore-now")


def test_a_database_without_a_ledger_removes_no_backup(cluster: Cluster) -> None:
    """A backup of an empty database, as after the loss of its disk, fails and keeps the older ones."""
    backup = cluster.back_up()
    cluster.ask("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    cluster.run(BACK_UP, fails=True)
    assert "older backups are kept" in cluster.run("$K logs job/captioner-backup-now")
    cluster.restore(backup)
    assert cluster.tenants == ["acme"]


def test_backups_are_made_where_the_chart_has_the_server(helm: Path) -> None:
    """The bundled server has backups in a claim that is kept; an external one only on request."""
    manifests = template(helm)
    claim = only(manifests, "PersistentVolumeClaim", "x-captioner-backups")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert only(manifests, "CronJob", "x-captioner-backup")["spec"]["concurrencyPolicy"] == "Forbid"
    assert only(manifests, "CronJob", "x-captioner-restore")["spec"]["suspend"] is True
    for name in ("external stores", "no backups"):
        assert not [each for each in template(helm, COMBINATIONS[name]) if each["kind"] == "CronJob"]
    manifests = template(helm, COMBINATIONS["backups of an external database"])
    (spec,) = [each["spec"] for who, each in pod_templates(manifests) if who == "CronJob x-captioner-backup"]
    assert spec["containers"][0]["image"] == "docker.io/library/postgres:17.11"
    assert {"name": "ca", "mountPath": "/etc/ca", "readOnly": True} in spec["containers"][0]["volumeMounts"]


def test_a_backup_that_cannot_be_is_refused(helm: Path) -> None:
    """A bucket without its name or its Secret, and a database in a pod, are refused with the remedy."""
    with pytest.raises(RefusedError, match=r"backup\.objectStore\.path and backup\.objectStore\.secret are required"):
        template(helm, {"backup": {"storage": "objectStore", "objectStore": {"path": "b/p"}}})
    with pytest.raises(RefusedError, match=r"backup\.storage requires PostgreSQL"):
        template(helm, {"backup": {"storage": "pvc"}, "postgresql": {"mode": "none"}})
