"""Rejected values and their messages, and the files generated from the values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from serving.config import Settings
from tests.chart.rendering import CHART, ROOT, RefusedError, template

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def sections(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every map of the values that has fixed keys."""
    yield path
    for key, each in values.items():
        if isinstance(each, dict) and each and key not in {"labels", "securityContext", "podSecurityContext"}:
            yield from sections(each, (*path, key))


def nested(path: tuple[str, ...], value: object) -> Any:
    """Return `value` nested at `path`."""
    for key in reversed(path):
        value = {key: value}
    return value


def test_a_typo_is_rejected_in_every_section(helm: Path) -> None:
    """The message has the typo's path; unknown keys of `global` are accepted."""
    found = [path for path in sections(VALUES) if not {"requests", "limits"} & set(path)]
    assert len(found) > 30
    for path in found:
        if path == ("networkPolicy", "dns", "to"):
            continue
        with pytest.raises(RefusedError, match=r"(?i)additional propert.*misspelt"):
            template(helm, nested((*path, "misspelt"), 1))
    template(helm, {"global": {"misspelt": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": {"max_inflght": 1}}, "max_inflght"),
        ({"settings": {"max_num_seqs": "many"}}, "max_num_seqs"),
        ({"settings": {"response_timeout_s": 60}}, "response_timeout_s"),  # derived from drain
        ({"settings": {"api_keys": ["k"]}}, "api_keys"),  # a secret
        ({"frontend": {"topologySpreadConstraints": {}}}, "topologySpreadConstraints"),
        ({"engine": {"gpus": "2"}}, "gpus"),
        ({"workload": "pods"}, "workload"),
        ({"frontend": {"replicas": {"min": 0}}}, "min"),
        ({"frontend": {"replicas": {"min": 9}}}, "frontend.replicas.min (9) must not exceed frontend.replicas.max (8)"),
        ({"engine": {"minAvailable": 3}}, "no node can be drained"),
        ({"frontend": {"minAvailable": 2}}, "frontend.minAvailable (2) must be below frontend.replicas.min (2)"),
        ({"workload": "deployment", "deployment": {"rollingUpdate": {"maxSurge": 0}}}, "set maxUnavailable to 1"),
        ({"workload": "deployment", "deployment": {"rollingUpdate": {"maxSurge": "0%"}}}, "set maxUnavailable to 1"),
        ({"objectStore": {"url": ""}}, "objectStore.url is required with several pods"),
        ({"image": {"registry": ""}}, "image.registry is required"),
        ({"objectStore": {"url": "", "secret": "s"}}, "objectStore.secret has no effect without objectStore.url"),
        ({"settings": {"object_store_url": "s3://b"}}, "object_store_url"),  # derived from objectStore
        ({"settings": {"object_store_secret_key": "k"}}, "object_store_secret_key"),  # a secret
        (
            {"objectStore": {"url": "s3://b"}, "networkPolicy": {"fetch": {"enabled": False}}},
            "objectStore.networks is required",
        ),
        ({"postgresql": {"mode": "none"}}, "use bundled or external"),
        ({"postgresql": {"mode": "external", "host": "db"}}, "postgresql.networks"),
        ({"postgresql": {"mode": "external", "networks": [{"podSelector": {}}]}}, "postgresql.host"),
        ({"redis": {"mode": "external", "host": "r"}}, "redis.networks"),
        ({"keda": {"enabled": True}}, "Ray scales a RayService"),
        ({"settings": {"metrics_token": "t"}}, "metrics_token"),  # a secret
        (
            {"secrets": {"values": {"metrics-token": "t"}}, "monitoring": {"token": False}},
            "unless monitoring.token is true",
        ),
        (
            {"workload": "deployment", "monitoring": {"token": False, "podMonitor": {"enabled": True}}},
            "monitoring.token is required",
        ),
        ({"settings": {"otlp_endpoint": "http://collector:4318"}}, "networkPolicy.traces.to"),
        (
            {"ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}}},
            "ray.upgrade.incremental.gatewayClassName is required with NewClusterWithIncrementalUpgrade",
        ),
        (
            {
                "ray": {
                    "upgrade": {"type": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "g"}}
                },
                "ingress": {"enabled": True, "host": "h"},
            },
            "set ingress.enabled and httpRoute.enabled to false",
        ),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"model": {"revision": ""}}, "model.revision is required"),
        ({"model": {"source": "objectStore"}}, "model.objectStore.path"),
        (
            {"model": {"source": "pvc", "pvc": {"sizeGiB": 59}}},
            "model.pvc.sizeGiB (59) must be at least model.sizeGiB (60)",
        ),
        ({"model": {"source": "embedded"}, "engine": {"gpus": 2}}, "engine.gpus must be 0 or 1"),
        ({"image": {"variant": "cpu"}}, "does not use GPUs"),
        ({"engine": {"gpus": 4}, "settings": {"quantization": "fp8_per_block"}}, "fp8_per_channel"),
        ({"settings": {"max_input_tokens": 65536}}, "there is no room for a caption"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"test": {"url": "captions.example.com"}}, "url"),
        ({"secrets": {"values": {"api_keys": "k"}}}, "api_keys"),
    ],
)
def test_invalid_values_are_rejected_with_a_message(helm: Path, values: dict[str, Any], message: str) -> None:
    """The schema or the chart's checks reject them before anything reaches the cluster."""
    with pytest.raises(RefusedError) as refused:
        template(helm, values)
    assert message in str(refused.value)


def test_several_errors_are_reported_at_once(helm: Path) -> None:
    """One message lists all errors."""
    with pytest.raises(RefusedError) as refused:
        template(helm, {"objectStore": {"url": ""}, "postgresql": {"mode": "none"}, "keda": {"enabled": True}})
    assert all(each in str(refused.value) for each in ("objectStore.url", "postgresql.mode", "keda.enabled"))


def test_a_name_that_kuberay_cannot_use_is_rejected(helm: Path) -> None:
    """A long name is truncated, and a name that begins with a digit is rejected."""
    with pytest.raises(RefusedError, match="must begin with a letter"):
        template(helm, {}, name="1x")
    (service,) = [each for each in template(helm, {}, name="a" * 53) if each["kind"] == "RayService"]
    assert len(service["metadata"]["name"]) <= 40


def test_generated_files_are_current() -> None:
    """README table, schema, and copies of rules, dashboards and Ray's environment match; `make chart` writes them."""
    done = subprocess.run(
        [sys.executable, "helm/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr


def test_the_schema_has_the_services_settings() -> None:
    """It has every setting except derived settings and secrets."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    assert schema.keys() < Settings.model_fields.keys()
    assert {"max_num_seqs", "fetch_allow", "quantization"} <= schema.keys()
    assert not {"api_keys", "upload_secret", "tensor_parallel", "shutdown_grace_s"} & schema.keys()


def test_every_value_is_described() -> None:
    """The README's table lists every value with a description and its default."""
    table = (CHART / "README.md").read_text().partition("<!-- values")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", table, re.MULTILINE)
    assert len(rows) > 150
    assert all(len(text) > 3 for _, text in rows)
    names = {name for name, _ in rows}
    assert {"workload", "drain.longestRequestSeconds", "networkPolicy.callers", "extraManifests"} <= names


def test_download_ports_match_the_service() -> None:
    """The network policy allows exactly the service's default `fetch_ports`."""
    assert tuple(VALUES["networkPolicy"]["fetch"]["ports"]) == Settings.model_fields["fetch_ports"].default
