"""Secrets, stores, addresses and files that the manifests connect."""

from __future__ import annotations

import json
import os
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart.combinations import COMBINATIONS
from tests.chart.rendering import CHART, PROFILES, ROOT, containers, group, only, pods, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path


def test_only_the_callers_paths_are_reachable_from_outside(helm: Path) -> None:
    """The dialects' paths and uploads are; metrics, health, Ray's dashboard and the administration are not."""
    paths = set(yaml.safe_load((CHART / "values.yaml").read_text())["ingress"]["paths"])
    for name, kind in (("an Ingress", "Ingress"), ("an HTTPRoute", "HTTPRoute")):
        rules = only(template(helm, COMBINATIONS[name]), kind)["spec"]["rules"]
        found = (
            [each["path"] for each in rules[0]["http"]["paths"]]
            if kind == "Ingress"
            else [each["path"]["value"] for rule in rules for each in rule["matches"]]
        )
        assert set(found) == paths
        assert not any(path in str(found) for path in ("metrics", "healthz", "admin", "'/'"))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_equals_the_services_profile(profile: str) -> None:
    """It has the same settings as the TOML file for one machine, and the same arithmetic in its comment."""
    text = (CHART / "profiles" / f"{profile}.yaml").read_text()
    toml = (ROOT / "deploy" / "profiles" / f"{profile}.toml").read_text()
    values, service = yaml.safe_load(text), tomllib.loads(toml)
    for line in toml.splitlines():
        if "GiB" in line or "KV cache" in line or "weights" in line:
            assert line in text
    if service["tensor_parallel"] > 1:
        assert values["engine"]["gpus"] == service["tensor_parallel"]
    for name in set(service) - {
        "model",
        "tensor_parallel",
        "min_engine_replicas",
        "max_engine_replicas",
        "engine_on_gpu",
    }:
        assert values["settings"][name] == service[name]


def test_secrets_reach_only_the_pods_that_need_them(helm: Path) -> None:
    """No secret is text; engines and heads lack the callers' secrets; only the administration has its token."""
    for values in ({}, COMBINATIONS["external stores"], COMBINATIONS["administration"]):
        manifests = template(helm, values | {"secrets": {"values": {"api-keys": "sk-hidden"}}})
        for who, spec in pods(manifests):
            names = {each["name"] for container in spec["containers"] for each in container.get("env", [])}
            knows = bool(
                names & {"CAPTIONER_DATABASE_URL", "CAPTIONER_REDIS_URL", "CAPTIONER_KEY_PEPPER", "CAPTIONER_API_KEYS"}
            )
            if who.startswith("CronJob"):  # backups: only the database
                assert names & {"CAPTIONER_REDIS_URL", "CAPTIONER_KEY_PEPPER", "CAPTIONER_API_KEYS"} == set(), who
                continue
            assert knows == who.endswith((" frontend", "-admin", "-tenants")), who
            assert ("CAPTIONER_ADMIN_TOKEN" in names) == who.endswith("-admin"), who
        assert not any("sk-hidden" in json.dumps(each) for each in manifests if each["kind"] != "Secret")


def test_external_stores_are_configured_by_secret_references(helm: Path) -> None:
    """The URL has host and user, a variable from the Secret the password; the chart creates no store."""
    manifests = template(helm, COMBINATIONS["external stores"])
    assert not [each for each in manifests if each["kind"] == "StatefulSet"]
    env = {each["name"]: each for each in group(manifests, "frontend")["template"]["spec"]["containers"][0]["env"]}
    assert env["CAPTIONER_DATABASE_URL"]["value"] == (
        "postgresql+psycopg://captioner:$(DATABASE_PASSWORD)@db.example.com:5432/captioner?sslmode=verify-full"
    )
    assert env["DATABASE_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "db", "key": "password"}
    assert env["CAPTIONER_REDIS_URL"]["value"] == "rediss://:$(REDIS_SECRET)@cache.example.com:6380/0"
    assert list(env).index("DATABASE_PASSWORD") < list(env).index(
        "CAPTIONER_DATABASE_URL"
    )  # Kubernetes expands only earlier variables
    assert list(env).index("REDIS_SECRET") < list(env).index("CAPTIONER_REDIS_URL")
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "rediss://cache.example.com:6380"


def test_a_database_may_be_configured_by_its_url_alone(helm: Path) -> None:
    """A Secret contains the complete URL: host and password are not required, and the chart's Secret is not used."""
    manifests = template(helm, COMBINATIONS["a database by its URL"])
    env = {each["name"]: each for each in group(manifests, "frontend")["template"]["spec"]["containers"][0]["env"]}
    assert env["CAPTIONER_DATABASE_URL"]["valueFrom"]["secretKeyRef"] == {"name": "db", "key": "database-url"}
    assert "DATABASE_PASSWORD" not in env


def test_uploads_in_a_bucket_need_no_shared_disk(helm: Path) -> None:
    """No claim is shared, the bucket is a setting, and its keys reach only frontends, as references to the Secret."""
    for name, keys in (
        ("uploads in a bucket", "bucket"),
        ("uploads in a bucket, by the pods' identity", None),
        ("without Ray, uploads in a bucket", "bucket"),
    ):
        manifests = template(helm, COMBINATIONS[name] | {"model": {"source": "embedded"}})
        assert "ReadWriteMany" not in json.dumps(manifests), name
        assert not [each for each in manifests if each["metadata"]["name"].endswith("-uploads")], name
        for who, spec in pods(manifests):
            volumes = {each["name"]: each for each in spec.get("volumes", [])}
            assert "uploads" not in volumes or volumes["uploads"] == {
                "name": "uploads",
                "emptyDir": {"sizeLimit": "20Gi"},
            }
            found = {
                each["name"]: each["valueFrom"]["secretKeyRef"]
                for container in spec["containers"]
                for each in container.get("env", [])
                if each["name"].startswith("CAPTIONER_OBJECT_STORE_")
            }
            expected = {
                "CAPTIONER_OBJECT_STORE_ACCESS_KEY_ID": {"name": keys, "key": "access-key-id", "optional": True},
                "CAPTIONER_OBJECT_STORE_SECRET_KEY": {"name": keys, "key": "secret-key"},
            }
            assert found == (expected if keys and "uploads" in volumes else {}), who
    args = serve_config(template(helm, COMBINATIONS["uploads in a bucket"]))["applications"][0]["args"]
    assert {key: value for key, value in args.items() if key.startswith("object_store")} == {
        "object_store_url": "s3://captions/production",
        "object_store_endpoint": "https://s3.oss-cn-beijing.aliyuncs.com",
        "object_store_region": "cn-beijing",
        "object_store_virtual_host": True,
    }


def test_a_canary_gets_its_share_of_every_path(helm: Path) -> None:
    """Each rule splits its requests between the two releases; without a canary there is one backend."""
    rules = only(template(helm, COMBINATIONS["an HTTPRoute with a canary"]), "HTTPRoute")["spec"]["rules"]
    assert rules
    for rule in rules:
        assert rule["backendRefs"] == [
            {"name": "x-captioner-serve-svc", "port": 8000, "weight": 90},
            {"name": "canary-captioner-serve-svc", "port": 8000, "weight": 10},
        ]
    (one, *_) = only(template(helm, COMBINATIONS["an HTTPRoute"]), "HTTPRoute")["spec"]["rules"]
    assert one["backendRefs"] == [{"name": "x-captioner-serve-svc", "port": 8000}]


def test_haproxy_answers_in_the_callers_dialect(helm: Path) -> None:
    """Ray starts the wrapper in HAProxy's place, at its path in both images; another image can set another path."""

    def wrapper(values: dict[str, Any]) -> str:
        manifests = template(helm, values)
        for component in ("head", "frontend", "engine"):
            (container,) = group(manifests, component)["template"]["spec"]["containers"]
            assert {"configMapRef": {"name": "x-captioner-ray"}} in container["envFrom"]
        return str(only(manifests, "ConfigMap", "x-captioner-ray")["data"]["RAY_SERVE_HAPROXY_BINARY_PATH"])

    path = wrapper({})
    app, _, inside = path.partition("/serving/")
    assert os.access(ROOT / "serving" / inside, os.X_OK)
    for build in ("cpu", "cuda", "frontend"):
        lines = (ROOT / "deploy" / "docker" / f"{build}.Dockerfile").read_text().splitlines()
        assert any(line.strip().startswith(f"--target {app} .") for line in lines)
        assert f"&& chmod 0755 {path}" in [line.strip() for line in lines]  # Ray rejects a file that is not executable
    assert wrapper({"ray": {"env": {"RAY_SERVE_HAPROXY_BINARY_PATH": "/app/haproxy.py"}}}) == "/app/haproxy.py"


@pytest.mark.parametrize(
    ("tag", "image"), [("0.1.0-frontend", ":0.1.0-frontend"), ("sha256:" + "a" * 64, "@sha256:" + "a" * 64)]
)
def test_only_engines_need_the_image_with_cuda(helm: Path, tag: str, image: str) -> None:
    """With an image for frontends, all pods but engines have it; without one, and without Ray, there is one."""
    values = COMBINATIONS["frontends without CUDA"] | {"image": {"frontendTag": tag}}
    name = "registry.example.com/captioner"
    for who, spec in pods(template(helm, values)):
        ours = {each["image"] for each in containers(spec) if each["image"].startswith(name)}
        assert ours <= {f"{name}:0.2.0-cuda" if who.endswith(" engine") else f"{name}{image}"}, who
    environment = only(template(helm, values), "ConfigMap", "x-captioner-ray")["data"]
    assert environment["RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"] == "minor"
    for other in (COMBINATIONS["administration"], values | {"workload": "deployment"}):
        images = {each["image"] for _, spec in pods(template(helm, other)) for each in containers(spec)}
        assert {each for each in images if each.startswith(name)} == {f"{name}:0.2.0-cuda"}


def test_the_test_calls_the_callers_address(helm: Path) -> None:
    """It calls the Service. With incremental upgrades KubeRay creates none, so it calls only `test.url`."""

    def url(values: dict[str, Any]) -> str:
        (container,) = only(template(helm, values), "Pod")["spec"]["containers"]
        return str(container["command"][2])

    assert url({}) == "http://x-captioner-serve-svc.captions.svc:8000"
    assert url({"workload": "deployment"}) == "http://x-captioner.captions.svc:8000"
    assert url(COMBINATIONS["incremental upgrades"]) == ""  # the test then fails with a message, see test_scripts.py
    gateway = {"test": {"url": "http://gateway.example.com"}}
    assert url(COMBINATIONS["incremental upgrades"] | gateway) == gateway["test"]["url"]


def test_rules_and_dashboards_are_shipped(helm: Path) -> None:
    """Every rule and dashboard of `deploy/` is in the manifests, unchanged."""
    manifests = template(helm, COMBINATIONS["monitoring"])
    rules = [each["spec"]["groups"] for each in manifests if each["kind"] == "PrometheusRule"]
    files = sorted((ROOT / "deploy" / "prometheus").glob("captioner.*.yml"))
    assert rules == [yaml.safe_load(path.read_text())["groups"] for path in files]
    boards = [
        json.loads(text)
        for each in manifests
        if "-dashboard-" in each["metadata"]["name"]
        for text in each["data"].values()
    ]
    assert boards == [
        json.loads(path.read_text()) for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
    ]
    assert len(boards) >= 6
    ports = [each["port"] for each in only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]]
    for component in ("frontend", "engine"):
        container = group(manifests, component)["template"]["spec"]["containers"][0]
        assert {each["name"] for each in container["ports"]} >= set(ports)
    metrics_port = serve_config(manifests)["applications"][0]["args"]["metrics_port"]
    assert {"name": "captions", "containerPort": metrics_port} in container["ports"]
