"""The bundled stores: their images, and where they keep their files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.chart.rendering import ROOT, Manifest, only, template

if TYPE_CHECKING:
    from pathlib import Path


def store(helm: Path, name: str) -> Manifest:
    """Return the pod's spec of a bundled store."""
    found: Manifest = only(template(helm), "StatefulSet", f"x-captioner-{name}")["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize(("name", "service"), [("postgresql", "postgres"), ("redis", "redis")])
def test_chart_and_compose_have_the_same_image(helm: Path, name: str, service: str) -> None:
    """A store has the same version and digest in both, so that one review of an image covers both."""
    (container,) = store(helm, name)["containers"]
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())["services"]
    default = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-(.*)\}", compose[service]["image"])
    assert default
    assert re.search(r":\d+\.\d+(\.\d+)?-trixie@sha256:[0-9a-f]{64}$", default[1])
    assert container["image"] in {f"docker.io/library/{default[1]}", f"docker.io/{default[1]}"}


def test_another_major_version_makes_no_empty_database(helm: Path) -> None:
    """The directory of the data has no version in its name, so that PostgreSQL sees files of another one and stops."""
    (container,) = store(helm, "postgresql")["containers"]
    (data,) = [each["value"] for each in container["env"] if each["name"] == "PGDATA"]
    assert data == "/var/lib/postgresql/pgdata"
    assert {"name": "data", "mountPath": "/var/lib/postgresql"} in container["volumeMounts"]


def test_valkey_refuses_writes_before_its_memory_is_full(helm: Path) -> None:
    """Its bound follows the container's limit; without a bound the kernel would kill it, with all counters."""
    (container,) = store(helm, "redis")["containers"]
    assert '--maxmemory "$((MEMORY_LIMIT * 3 / 4))" --maxmemory-policy noeviction' in container["command"][-1]
    limit = {"name": "MEMORY_LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}
    assert limit in container["env"]


def test_postgresql_has_shared_memory_for_parallel_queries(helm: Path) -> None:
    """It has 256 MiB in place of a container's 64, as with Compose."""
    spec = store(helm, "postgresql")
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}} in spec["volumes"]
    mounts = {each["name"]: each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    assert mounts["shm"].rpartition("/") == ("/dev", "/", "shm")
