"""Shutdown, probes, timeouts and disruption budgets that the manifests set."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.config import Settings
from tests.chart.combinations import COMBINATIONS
from tests.chart.rendering import CHART, PROFILES, Manifest, group, only, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path

MARGIN = 10


def leave_timeout_s(spec: Manifest) -> int:
    """Return the seconds that a Ray pod may take to leave the cluster before it receives SIGTERM."""
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    found = re.fullmatch(r'captioner leave --instance "\$RAY_CLOUD_INSTANCE_ID" --within-s (\d+); true', command)
    assert found
    return int(found[1])


def probe_timeout_s(probe: Manifest) -> int:
    """Return the seconds for which a probe may fail before it has an effect."""
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(longest=st.integers(30, 86400), margin=st.integers(5, 600))
def test_running_requests_finish_before_a_pod_is_killed(helm: Path, longest: int, margin: int) -> None:
    """Kill > leaving > the replicas' shutdown > the longest request, each with a margin, all derived from one value."""
    manifests = template(helm, {"drain": {"longestRequestSeconds": longest, "marginSeconds": margin}})
    args = serve_config(manifests)["applications"][0]["args"]
    assert args["stream_timeout_s"] == longest
    assert args["response_timeout_s"] <= min(longest, 280)
    assert args["shutdown_grace_s"] >= longest + margin
    for component in ("frontend", "engine"):
        spec = group(manifests, component)["template"]["spec"]
        leaving = leave_timeout_s(spec)
        # A replica is stopped when only its shutdown time is left. Its replacement should have started by then.
        assert leaving - args["shutdown_grace_s"] >= (60 if component == "frontend" else 600)
        assert spec["terminationGracePeriodSeconds"] >= leaving + 30 + margin
    environment = only(manifests, "ConfigMap", "x-captioner-ray")["data"]
    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest + margin
    assert only(manifests, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] >= longest + margin


def test_an_engine_outlives_the_start_of_its_replacement(helm: Path) -> None:
    """Leaving allows time for another pod to copy the model, if it does, to load it, and for the longest request."""
    for profile in PROFILES:
        manifests = template(helm, {}, profile)
        spec = group(manifests, "engine")["template"]["spec"]
        args = serve_config(manifests)["applications"][0]["args"]
        load = probe_timeout_s(spec["containers"][0]["startupProbe"])
        copies = [each["name"] for each in spec["initContainers"]].count("fetch-model")
        assert leave_timeout_s(spec) >= (1 + copies) * (load - 10) + args["shutdown_grace_s"]


def test_without_ray_a_pod_stops_in_order(helm: Path) -> None:
    """The pod leaves the Service, then shuts down within the grace period, then is killed."""
    manifests = template(helm, COMBINATIONS["without Ray"])
    spec = only(manifests, "Deployment")["spec"]["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    given = tomllib.loads(only(manifests, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"])
    assert sleep >= 5
    assert given["shutdown_grace_s"] > given["stream_timeout_s"]
    assert spec["terminationGracePeriodSeconds"] >= sleep + given["shutdown_grace_s"] + 30 + MARGIN


def test_ingress_and_route_wait_as_long_as_the_longest_request(helm: Path) -> None:
    """Their timeouts exceed it, buffering is off, and the body limit admits the largest request."""
    ingress = only(template(helm, COMBINATIONS["an Ingress"]), "Ingress")
    annotations = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    longest = 1200
    assert int(annotations["proxy-read-timeout"]) > longest
    assert int(annotations["proxy-send-timeout"]) > longest
    assert annotations["proxy-buffering"] == annotations["proxy-request-buffering"] == "off"
    for name in ("max_body_bytes", "max_transcription_bytes"):
        assert int(annotations["proxy-body-size"]) >= Settings.model_fields[name].default
    large = COMBINATIONS["an Ingress"] | {"settings": {"max_upload_bytes": 200_000_000}}
    annotations = only(template(helm, large), "Ingress")["metadata"]["annotations"]
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"]) > 200_000_000
    route = only(template(helm, COMBINATIONS["an HTTPRoute"]), "HTTPRoute")
    for rule in route["spec"]["rules"]:
        assert all(int(rule["timeouts"][each].rstrip("s")) > longest for each in ("request", "backendRequest"))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_slow_load_does_not_fail_a_probe(helm: Path, profile: str) -> None:
    """No probe of a Ray pod depends on the engine, and a start may take as long as a load at the slowest read rate."""
    manifests = template(helm, {}, profile)
    for component in ("head", "frontend", "engine"):
        container = group(manifests, component)["template"]["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert probe_timeout_s(container["livenessProbe"]) >= 60
        if component != "head":
            assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    if profile != "cpu-embedded":
        model = yaml.safe_load((CHART / "profiles" / f"{profile}.yaml").read_text()).get("model", {})
        probe = group(manifests, "engine")["template"]["spec"]["containers"][0]["startupProbe"]
        assert probe_timeout_s(probe) > model.get("sizeGiB", 60) * 1024 / 100


def test_without_ray_the_start_up_probe_outlasts_the_load(helm: Path) -> None:
    """Startup and readiness require that captions can be made; liveness fails only if a restart would help."""
    container = only(template(helm, COMBINATIONS["without Ray"]), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["startupProbe"]["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert probe_timeout_s(container["startupProbe"]) > 60 * 1024 / 100
    slow = COMBINATIONS["without Ray"] | {"model": {"readMiBPerSecond": 20}}
    container = only(template(helm, slow), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert probe_timeout_s(container["startupProbe"]) > 60 * 1024 / 20


@pytest.mark.parametrize(("least", "spare"), [(1, None), (2, 1), (4, 3)])
def test_a_budget_lets_a_node_be_drained_and_keeps_the_service(helm: Path, least: int, spare: int | None) -> None:
    """One pod may be missing; with a minimum of one there is no budget, which would block the drain forever."""
    replicas = {"replicas": {"min": least, "max": 8}}
    manifests = template(helm, {"frontend": replicas, "engine": replicas})
    budgets = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == (set() if spare is None else {"x-captioner-frontend", "x-captioner-engine"})
    for component in ("frontend", "engine") if spare else ():
        spec = budgets[f"x-captioner-{component}"]
        # For pods outside a Deployment Kubernetes supports neither percentages nor maxUnavailable.
        assert spec["minAvailable"] == spare
        assert "maxUnavailable" not in spec
        labels = group(manifests, component)["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        other = group(manifests, "head")["template"]["metadata"]["labels"]
        assert not spec["selector"]["matchLabels"].items() <= other.items()
