"""Selection of the PodMonitor's targets by rules and dashboards, and the token that scrapes send."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from tests.chart.combinations import COMBINATIONS
from tests.chart.network import selects
from tests.chart.rendering import Manifest, containers, only, pod_templates, serve_config, template
from tests.observability.named_tenants import check_alert, metrics_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Labels = dict[str, str]
COMPONENT = "app.kubernetes.io/component"
CAPTIONS, RAY, HAPROXY = 9464, 8080, 9101
ALONE = COMBINATIONS["monitoring"] | COMBINATIONS["without Ray"]
PROCESSES = {
    ("head", RAY, "ray"),
    ("head", HAPROXY, "haproxy"),
    ("frontend", RAY, "ray"),
    ("frontend", HAPROXY, "haproxy"),
    ("frontend", CAPTIONS, "frontend"),
    ("engine", RAY, "ray"),
    ("engine", HAPROXY, "haproxy"),
    ("engine", CAPTIONS, "engine"),
}
"""Pod, port and role, as `/metrics/targets` lists them."""


def targets(manifests: list[Manifest]) -> Iterator[tuple[str, int, Labels]]:
    """Yield the PodMonitor's targets for one pod of each component: component, port, and the target's labels."""
    monitor = only(manifests, "PodMonitor")
    for _, pod in pod_templates(manifests):
        labels = pod["metadata"]["labels"]
        if not selects(monitor["spec"]["selector"], labels):
            continue
        ports = {port["name"]: port for each in containers(pod["spec"]) for port in each.get("ports", [])}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if port := ports.get(endpoint["port"]):
                # Labels set by the operator before it applies the endpoint's rules.
                target = {"job": f"captions/{monitor['metadata']['name']}", "endpoint": endpoint["port"]}
                meta = {"__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", key): labels[key] for key in labels}
                for rule in endpoint["relabelings"]:
                    assert rule.keys() <= {"sourceLabels", "targetLabel", "replacement"}
                    source = ";".join((meta | target).get(name, "") for name in rule.get("sourceLabels", []))
                    target[rule["targetLabel"]] = rule.get("replacement", source)
                yield labels[COMPONENT], port["containerPort"], target


def expressions(manifests: list[Manifest]) -> list[str]:
    """Return every query of the chart's rules and dashboards."""
    rules = [
        str(rule["expr"])
        for each in manifests
        if each["kind"] == "PrometheusRule"
        for group in each["spec"]["groups"]
        for rule in group["rules"]
    ]

    def queries(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            if isinstance(part.get("expr"), str):
                yield part["expr"]
            part = list(part.values())
        if isinstance(part, list):
            for each in part:
                yield from queries(each)

    boards = [text for each in manifests if "-dashboard-" in each["metadata"]["name"] for text in each["data"].values()]
    return rules + [query for text in boards for query in queries(json.loads(text))]


def selected(selector: str, found: list[Labels]) -> list[Labels]:
    """Return the targets that a selector's matchers of `job`, `role` and `endpoint` select."""
    matchers = re.findall(r"""\b(job|role|endpoint)(=~|!~|!=|=)(["'])(.*?)\3""", selector)
    assert matchers, selector

    def fits(labels: Labels, name: str, operator: str, value: str) -> bool:
        actual = labels.get(name, "")
        same = re.fullmatch(value, actual) is not None if "~" in operator else actual == value
        return same != operator.startswith("!")

    return [each for each in found if all(fits(each, name, how, value) for name, how, _, value in matchers)]


@pytest.fixture(scope="module")
def monitored(helm: Path) -> list[Manifest]:
    """Manifests of a release on Ray with all of monitoring."""
    return template(helm, COMBINATIONS["monitoring"])


def test_every_process_is_scraped_with_its_role(helm: Path, monitored: list[Manifest]) -> None:
    """Targets and roles equal those of `/metrics/targets`: Ray and HAProxy in each pod, frontends, engines.

    Without Ray there is one process.
    """
    found = list(targets(monitored))
    assert {(component, port, labels["role"]) for component, port, labels in found} == PROCESSES
    alone = list(targets(template(helm, ALONE)))
    assert [(component, port, labels["role"]) for component, port, labels in alone] == [("frontend", 8000, "server")]
    assert {labels["job"] for _, _, labels in [*found, *alone]} == {"captioner"}


def test_rules_and_dashboards_find_the_targets(helm: Path, monitored: list[Manifest]) -> None:
    """Every selector of job and role matches a target; otherwise an alert would fire always or never."""
    selectors = {
        found
        for query in expressions(monitored)
        for found in re.findall(r"\w+\{[^}]*\}", query)
        if re.search(r"""\b(job|role)[=!]""", found)
    }
    # Alerts: nothing scraped, not ready, crash loop, target down. Dashboards: two panels.
    assert len(selectors) >= 5
    for manifests in (monitored, template(helm, ALONE)):
        found = [labels for _, _, labels in targets(manifests)]
        assert all(selected(selector, found) for selector in selectors)


def test_alerts_distinguish_the_service_from_its_surroundings(monitored: list[Manifest]) -> None:
    """A running Ray is not a service, an engine makes no service ready, and a pod without replicas is not down."""
    found = [labels for _, _, labels in targets(monitored)]
    rules = {
        rule["alert"]: [each for each in re.findall(r"\w+\{[^}]*\}", rule["expr"]) if re.search("job=|role!", each)]
        for each in monitored
        if each["kind"] == "PrometheusRule"
        for group in each["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }

    def roles(alert: str) -> list[set[str]]:
        return [{labels["role"] for labels in selected(selector, found)} for selector in rules[alert]]

    assert roles("CaptionerNothingScraped") == [{"frontend", "engine"}]
    assert roles("CaptionerNotReady") == [{"frontend", "ray", "haproxy"}]  # only frontends expose `captioner_ready`
    assert roles("CaptionerTargetDown") == [{"ray"}, {"frontend", "engine"}]


def variables(pod: Manifest) -> dict[str, Any]:
    """Return a pod's environment variables that are references, by name."""
    return {
        each["name"]: each["valueFrom"]
        for container in containers(pod["spec"])
        for each in container.get("env", [])
        if "valueFrom" in each
    }


@pytest.mark.parametrize(("values", "secret"), [({}, "x-captioner"), ({"existingSecret": "mine"}, "mine")])
@pytest.mark.parametrize("alone", [False, True])
def test_scrapes_send_the_required_token(helm: Path, values: dict[str, Any], secret: str, *, alone: bool) -> None:
    """Frontends and engines require the Secret's token, and the PodMonitor sends it only to them."""
    assert "metrics_token" in Settings.model_fields
    values_of = COMBINATIONS["administration"] | (ALONE if alone else COMBINATIONS["monitoring"])
    manifests = template(helm, values_of | {"secrets": values})
    key = {"name": secret, "key": "metrics-token"}
    knows = set()
    for who, pod in pod_templates(manifests):
        if token := variables(pod).get("CAPTIONER_METRICS_TOKEN"):
            assert token == {"secretKeyRef": key}, who
            knows.add(pod["metadata"]["labels"][COMPONENT])
    assert knows == ({"frontend"} if alone else {"frontend", "engine"})
    sent = {
        each["port"]: each["authorization"]
        for each in only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
        if "authorization" in each
    }
    assert sent == {"serve" if alone else "captions": {"credentials": key}}
    if not values:
        assert len(only(manifests, "Secret")["data"]["metrics-token"]) > 40


@pytest.mark.parametrize("alone", [False, True])
def test_the_token_is_required_by_default(helm: Path, *, alone: bool) -> None:
    """As shipped, metrics name tenants: processes have the token, and the PodMonitor sends it."""
    workload = COMBINATIONS["without Ray"] if alone else {}
    manifests = template(helm, workload | {"monitoring": {"podMonitor": {"enabled": True}}})
    tokens = [variables(pod).get("CAPTIONER_METRICS_TOKEN") for _, pod in pod_templates(manifests)]
    assert sum(token is not None for token in tokens) == (1 if alone else 2)
    endpoints = only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert sum("authorization" in each for each in endpoints) == 1


@pytest.mark.parametrize("values", [{}, COMBINATIONS["without Ray"]], ids=["on Ray", "without Ray"])
def test_the_alert_on_spending_finds_the_tenant(
    helm: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the chart's default values the alert on spending fires."""
    manifests = template(helm, values)
    [frontend] = [pod for who, pod in pod_templates(manifests) if pod["metadata"]["labels"][COMPONENT] == "frontend"]
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path / "data"))
    reference = variables(frontend)["CAPTIONER_METRICS_TOKEN"]["secretKeyRef"]
    monkeypatch.setenv(
        "CAPTIONER_METRICS_TOKEN", only(manifests, "Secret", reference["name"])["data"][reference["key"]]
    )
    chosen = {} if values else serve_config(manifests)["applications"][0]["args"]
    shipped = {name: value for name, value in chosen.items() if "metrics" in name}
    check_alert(metrics_of(Settings(engine="fake", **shipped), in_cluster=not values), tmp_path)


def test_no_token_is_required_if_it_is_switched_off(helm: Path) -> None:
    """Without the token there is no variable, no credentials, and no key in the Secret."""
    manifests = template(helm, {"monitoring": {"podMonitor": {"enabled": True}, "token": False}})
    assert not any("CAPTIONER_METRICS_TOKEN" in variables(pod) for _, pod in pod_templates(manifests))
    assert not any("authorization" in each for each in only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"])
    assert "metrics-token" not in only(manifests, "Secret")["data"]
