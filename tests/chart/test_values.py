"""What values are refused, in which words, and that what is made from them is current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from serving.config import Settings
from tests.chart.rendering import CHART, ROOT, Refused, template

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def sections(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every map of the values that has names of its own."""
    yield path
    for key, each in values.items():
        if isinstance(each, dict) and each and key not in {"labels", "securityContext", "podSecurityContext"}:
            yield from sections(each, (*path, key))


def nested(path: tuple[str, ...], value: object) -> Any:
    """A value in its place."""
    for key in reversed(path):
        value = {key: value}
    return value


def test_a_typo_is_refused_in_every_section(helm: Path) -> None:
    """With its place; what a parent chart shares is not a typo."""
    found = [path for path in sections(VALUES) if not {"requests", "limits"} & set(path)]
    assert len(found) > 30
    for path in found:
        if path == ("networkPolicy", "dns", "to"):
            continue
        with pytest.raises(Refused, match=r"(?i)additional propert.*misspelt"):
            template(helm, nested((*path, "misspelt"), 1))
    template(helm, {"global": {"misspelt": 1}})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"settings": {"max_inflght": 1}}, "max_inflght"),
        ({"settings": {"max_num_seqs": "many"}}, "max_num_seqs"),
        ({"settings": {"response_timeout_s": 60}}, "response_timeout_s"),  # follows from drain
        ({"settings": {"api_keys": ["k"]}}, "api_keys"),  # a secret
        ({"frontend": {"topologySpreadConstraints": {}}}, "topologySpreadConstraints"),
        ({"engine": {"gpus": "2"}}, "gpus"),
        ({"workload": "pods"}, "workload"),
        ({"frontend": {"replicas": {"min": 0}}}, "min"),
        ({"frontend": {"replicas": {"min": 9}}}, "frontend.replicas: min 9 is above max 8"),
        ({"engine": {"minAvailable": 3}}, "no node could be drained"),
        ({"frontend": {"minAvailable": 2}}, "frontend.minAvailable is not below frontend.replicas.min"),
        ({"workload": "deployment", "deployment": {"rollingUpdate": {"maxSurge": 0}}}, "set maxUnavailable to 1"),
        ({"workload": "deployment", "deployment": {"rollingUpdate": {"maxSurge": "0%"}}}, "set maxUnavailable to 1"),
        ({"uploads": {"storage": "emptyDir"}}, "use pvc"),
        ({"postgresql": {"mode": "none"}}, "use bundled or external"),
        ({"postgresql": {"mode": "external", "host": "db"}}, "postgresql.networks"),
        ({"postgresql": {"mode": "external", "networks": [{"podSelector": {}}]}}, "postgresql.host"),
        ({"redis": {"mode": "external", "host": "r"}}, "redis.networks"),
        ({"keda": {"enabled": True}}, "Ray scales it"),
        ({"settings": {"metrics_token": "t"}}, "metrics_token"),  # a secret
        ({"secrets": {"values": {"metrics-token": "t"}}}, "unless monitoring.token is true"),
        ({"settings": {"otlp_endpoint": "http://collector:4318"}}, "networkPolicy.traces.to"),
        ({"ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}}}, "gatewayClassName"),
        (
            {
                "ray": {
                    "upgrade": {"type": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "g"}}
                },
                "ingress": {"enabled": True, "host": "h"},
            },
            "switch those off",
        ),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"model": {"revision": ""}}, "pin what is downloaded"),
        ({"model": {"source": "objectStore"}}, "model.objectStore.path"),
        ({"model": {"pvc": {"sizeGiB": 59}}}, "the model would not fit"),
        ({"model": {"source": "embedded"}, "engine": {"gpus": 2}}, "for one GPU or none"),
        ({"image": {"variant": "cpu"}}, "does not use GPUs"),
        ({"engine": {"gpus": 4}, "settings": {"quantization": "fp8_per_block"}}, "fp8_per_channel"),
        ({"settings": {"max_input_tokens": 65536}}, "leaves no room"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"test": {"url": "captions.example.com"}}, "url"),
        ({"secrets": {"values": {"api_keys": "k"}}}, "api_keys"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(helm: Path, values: dict[str, Any], told: str) -> None:
    """By the schema, or by the chart's own checks, before anything reaches the cluster."""
    with pytest.raises(Refused) as refused:
        template(helm, values)
    assert told in str(refused.value)


def test_several_faults_are_told_at_once(helm: Path) -> None:
    """So that one need not try again and again."""
    with pytest.raises(Refused) as refused:
        template(helm, {"uploads": {"storage": "emptyDir"}, "postgresql": {"mode": "none"}, "keda": {"enabled": True}})
    assert all(each in str(refused.value) for each in ("uploads.storage", "postgresql.mode", "keda.enabled"))


def test_a_name_that_kuberay_cannot_use_is_refused(helm: Path) -> None:
    """A long one is cut, one that begins with a digit is refused."""
    with pytest.raises(Refused, match="must begin with a letter"):
        template(helm, {}, name="1x")
    (service,) = [each for each in template(helm, {}, name="a" * 53) if each["kind"] == "RayService"]
    assert len(service["metadata"]["name"]) <= 40


def test_what_is_made_is_current() -> None:
    """README table, schema, and the copies of rules, dashboards and Ray's environment: `make chart` writes them."""
    done = subprocess.run(
        [sys.executable, "helm/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_is_one_of_the_services() -> None:
    """The schema has each setting but those that follow from other values, and no secret."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    assert schema.keys() < Settings.model_fields.keys()
    assert {"max_num_seqs", "fetch_allow", "quantization"} <= schema.keys()
    assert not {"api_keys", "upload_secret", "tensor_parallel", "shutdown_grace_s"} & schema.keys()


def test_every_value_is_described() -> None:
    """In the table, each with its default."""
    table = (CHART / "README.md").read_text().partition("<!-- values")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", table, re.MULTILINE)
    assert len(rows) > 150
    assert all(len(text) > 3 for _, text in rows)
    names = {name for name, _ in rows}
    assert {"workload", "drain.longestRequestSeconds", "networkPolicy.callers", "extraManifests"} <= names


def test_ports_of_downloads_are_those_of_the_service() -> None:
    """A port that the service uses and the policy closes would look like a dead host."""
    assert tuple(VALUES["networkPolicy"]["fetch"]["ports"]) == Settings.model_fields["fetch_ports"].default
