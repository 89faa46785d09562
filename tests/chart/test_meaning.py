"""Drain, probes, budgets, placement, secrets, models: what the manifests bring about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.config import Settings
from tests.chart.combinations import COMBINATIONS, SCHEDULED
from tests.chart.rendering import CHART, PROFILES, ROOT, Manifest, group, only, pods, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path

MARGIN = 10
SHM = "/dev/shm"  # noqa: S108 - where it is


def pod_of(values: dict[str, Any], helm: Path, component: str, *profiles: str) -> Manifest:
    """The pod of one component."""
    spec: Manifest = group(template(helm, values, *profiles), component)["template"]["spec"]
    return spec


def told_to_leave(spec: Manifest) -> int:
    """How long a Ray pod takes at most to leave the cluster before it is told to stop."""
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    found = re.fullmatch(r'captioner leave --instance "\$RAY_CLOUD_INSTANCE_ID" --within-s (\d+); true', command)
    assert found
    return int(found[1])


def budget(probe: Manifest) -> int:
    """How long a probe may fail before something happens."""
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(longest=st.integers(30, 86400), margin=st.integers(5, 600))
def test_what_runs_is_finished_before_a_pod_is_killed(helm: Path, longest: int, margin: int) -> None:
    """Kill > leaving > the replicas' shutdown > the longest request, each with room; all from one value."""
    manifests = template(helm, {"drain": {"longestRequestSeconds": longest, "marginSeconds": margin}})
    args = serve_config(manifests)["applications"][0]["args"]
    assert args["stream_timeout_s"] == longest
    assert args["response_timeout_s"] <= min(longest, 280)
    assert args["shutdown_grace_s"] >= longest + margin
    for component in ("frontend", "engine"):
        spec = group(manifests, component)["template"]["spec"]
        leaving = told_to_leave(spec)
        # A replica is stopped at the latest when only its shutdown's time is left: by then another should have started.
        assert leaving - args["shutdown_grace_s"] >= (60 if component == "frontend" else 600)
        assert spec["terminationGracePeriodSeconds"] >= leaving + 30 + margin
    environment = only(manifests, "ConfigMap", "x-captioner-ray")["data"]
    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest + margin
    assert only(manifests, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] >= longest + margin


def test_an_engine_outlives_the_start_of_the_one_in_its_place(helm: Path) -> None:
    """Leaving has time for another engine to load the model, and then for its own longest request."""
    for profile in PROFILES:
        manifests = template(helm, {}, profile)
        spec = group(manifests, "engine")["template"]["spec"]
        args = serve_config(manifests)["applications"][0]["args"]
        load = budget(spec["containers"][0]["startupProbe"])
        assert told_to_leave(spec) >= load - 10 + args["shutdown_grace_s"]


def test_without_ray_a_pod_stops_in_order(helm: Path) -> None:
    """Out of the Service, then the shutdown with its grace, then the kill."""
    manifests = template(helm, COMBINATIONS["without Ray"])
    spec = only(manifests, "Deployment")["spec"]["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    told = tomllib.loads(only(manifests, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"])
    assert sleep >= 5
    assert told["shutdown_grace_s"] > told["stream_timeout_s"]
    assert spec["terminationGracePeriodSeconds"] >= sleep + told["shutdown_grace_s"] + 30 + MARGIN


def test_ingress_and_route_wait_as_long_as_the_longest_request(helm: Path) -> None:
    """Time-outs above it, no buffering, and room for the largest request."""
    ingress = only(template(helm, COMBINATIONS["an Ingress"]), "Ingress")
    told = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    longest = 1200
    assert int(told["proxy-read-timeout"]) > longest
    assert int(told["proxy-send-timeout"]) > longest
    assert told["proxy-buffering"] == told["proxy-request-buffering"] == "off"
    assert int(told["proxy-body-size"]) >= Settings.model_fields["max_body_bytes"].default
    large = COMBINATIONS["an Ingress"] | {"settings": {"max_upload_bytes": 200_000_000}}
    told = only(template(helm, large), "Ingress")["metadata"]["annotations"]
    assert int(told["nginx.ingress.kubernetes.io/proxy-body-size"]) > 200_000_000
    route = only(template(helm, COMBINATIONS["an HTTPRoute"]), "HTTPRoute")
    for rule in route["spec"]["rules"]:
        assert all(int(rule["timeouts"][each].rstrip("s")) > longest for each in ("request", "backendRequest"))


def test_what_is_reached_from_outside_is_what_callers_need(helm: Path) -> None:
    """The dialects' paths and uploads; not metrics, health, Ray's dashboard or the administration."""
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
def test_a_slow_load_is_not_taken_for_a_failure(helm: Path, profile: str) -> None:
    """No probe of a Ray pod asks the engine, and starting may take as long as a load at the slowest reading."""
    manifests = template(helm, {}, profile)
    for component in ("head", "frontend", "engine"):
        container = group(manifests, component)["template"]["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert budget(container["livenessProbe"]) >= 60
        if component != "head":
            assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    if profile != "cpu-embedded":
        probe = group(manifests, "engine")["template"]["spec"]["containers"][0]["startupProbe"]
        assert budget(probe) > 60 * 1024 / 100


def test_without_ray_the_start_up_probe_outlasts_the_load(helm: Path) -> None:
    """It asks whether captions can be made; liveness asks only whether a restart would help."""
    container = only(template(helm, COMBINATIONS["without Ray"]), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["startupProbe"]["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert budget(container["startupProbe"]) > 60 * 1024 / 100
    slow = COMBINATIONS["without Ray"] | {"model": {"readMiBPerSecond": 20}}
    container = only(template(helm, slow), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert budget(container["startupProbe"]) > 60 * 1024 / 20


@pytest.mark.parametrize(("least", "spare"), [(1, None), (2, 1), (4, 3)])
def test_a_budget_lets_a_node_be_drained_and_keeps_the_service(helm: Path, least: int, spare: int | None) -> None:
    """One pod may go; where there is only one there is no budget, which would stop the drain for ever."""
    replicas = {"replicas": {"min": least, "max": 8}}
    manifests = template(helm, {"frontend": replicas, "engine": replicas})
    budgets = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == (set() if spare is None else {"x-captioner-frontend", "x-captioner-engine"})
    for component in ("frontend", "engine") if spare else ():
        spec = budgets[f"x-captioner-{component}"]
        # Of pods that belong to no Deployment Kubernetes knows no share and no maximum.
        assert spec["minAvailable"] == spare
        assert "maxUnavailable" not in spec
        labels = group(manifests, component)["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        other = group(manifests, "head")["template"]["metadata"]["labels"]
        assert not spec["selector"]["matchLabels"].items() <= other.items()


@pytest.fixture(scope="module")
def read_by_ray(helm: Path) -> dict[str, Any]:
    """Every profile as Ray reads it."""
    releases = {profile: template(helm, COMBINATIONS["big numbers"], profile) for profile in PROFILES}
    given = {
        profile: {"cluster": only(each, "RayService")["spec"]["rayClusterConfig"], "serve": serve_config(each)}
        for profile, each in releases.items()
    }
    environment = os.environ | {"CAPTIONER_UPLOAD_SECRET": "s", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chart.ray_reads"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("profile", PROFILES)
def test_frontends_and_engines_find_their_own_nodes_and_no_others(
    helm: Path, profile: str, read_by_ray: dict[str, Any]
) -> None:
    """By Ray's own reading: what each deployment asks for fits one kind of node, and one of it in each pod."""
    nodes, wants = read_by_ray[profile]["nodes"], read_by_ray[profile]["wants"]
    for name in ("frontend", "engine"):
        fits = [
            kind
            for kind, node in nodes.items()
            if all(node["resources"].get(what, 0) >= need for what, need in wants[name].items())
        ]
        assert fits == [name]
        assert min(nodes[name]["resources"][what] // need for what, need in wants[name].items()) == 1
    args = serve_config(template(helm, {}, profile))["applications"][0]["args"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in nodes["frontend"]["resources"]
    assert wants["engine"].get("GPU", 0) == (args["tensor_parallel"] if args["engine_on_gpu"] else 0)
    assert (nodes["frontend"]["max_workers"], nodes["engine"]["max_workers"]) == (
        args["max_frontends"],
        args["max_engine_replicas"],
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_the_serve_config_is_one_that_ray_and_the_service_take(
    helm: Path, profile: str, read_by_ray: dict[str, Any]
) -> None:
    """By Ray's schema and by building the application (see `read_by_ray`); numbers are whole numbers."""
    assert set(read_by_ray[profile]["wants"]) == {"frontend", "engine", "membership"}
    args = serve_config(template(helm, COMBINATIONS["big numbers"], profile))["applications"][0]["args"]
    assert Settings(**args).max_upload_bytes == 10485759
    assert isinstance(args["max_upload_bytes"], int)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_that_of_the_service_with_its_arithmetic(profile: str) -> None:
    """The same settings as the TOML file for one machine, under the same comment."""
    text = (CHART / "profiles" / f"{profile}.yaml").read_text()
    toml = (ROOT / "deploy" / "profiles" / f"{profile}.toml").read_text()
    values, told = yaml.safe_load(text), tomllib.loads(toml)
    for line in toml.splitlines():
        if "GiB" in line or "KV cache" in line or "weights" in line:
            assert line in text
    if told["tensor_parallel"] > 1:
        assert values["engine"]["gpus"] == told["tensor_parallel"]
    for name in set(told) - {"model", "tensor_parallel", "min_engine_replicas", "max_engine_replicas", "engine_on_gpu"}:
        assert values["settings"][name] == told[name]


def test_shared_memory_is_memory_and_fits_the_container(helm: Path) -> None:
    """It is a volume in memory, smaller than the container's limit, and Ray's object store fits in."""
    for profile in PROFILES:
        for component in ("head", "frontend", "engine"):
            spec = pod_of({}, helm, component, profile)
            (volume,) = [each["emptyDir"] for each in spec["volumes"] if each["name"] == "shm"]
            assert {"name": "shm", "mountPath": SHM} in spec["containers"][0]["volumeMounts"]
            assert volume["medium"] == "Memory"
            limit = spec["containers"][0]["resources"]["limits"]["memory"]
            assert 268435456 < size(volume["sizeLimit"]) < size(limit)


def size(quantity: str) -> float:
    """Bytes."""
    units = {"Mi": 2**20, "Gi": 2**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


def test_scheduling_is_passed_on(helm: Path) -> None:
    """Whatever Kubernetes has for it, in every group; spreading is a list."""
    manifests = template(helm, COMBINATIONS["scheduling of all"])
    for component in ("head", "frontend", "engine"):
        spec = group(manifests, component)["template"]["spec"]
        for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
            assert spec[key] == COMBINATIONS["scheduling of all"][component][key]
        assert isinstance(spec.get("topologySpreadConstraints", []), list)
        container = spec["containers"][0]
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
        assert {"name": "ca", "mountPath": "/etc/ca", "readOnly": True} in container["volumeMounts"]
        assert group(manifests, component)["template"]["metadata"]["labels"]["team"] == "audio"


def test_frontends_and_engines_are_spread(helm: Path) -> None:
    """Over zones and nodes, each kind by itself, where that is possible."""
    for component in ("frontend", "engine"):
        template_ = group(template(helm), component)["template"]
        constraints = template_["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in constraints} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        for each in constraints:
            assert each["whenUnsatisfiable"] == "ScheduleAnyway"
            assert each["labelSelector"]["matchLabels"].items() <= template_["metadata"]["labels"].items()


def test_secrets_reach_who_needs_them(helm: Path) -> None:
    """Never as text; the callers' secrets are in no engine and no head; the administration's token is only its own."""
    for values in ({}, COMBINATIONS["external stores"], COMBINATIONS["administration"]):
        manifests = template(helm, values | {"secrets": {"values": {"api-keys": "sk-hidden"}}})
        for who, spec in pods(manifests):
            names = {each["name"] for container in spec["containers"] for each in container.get("env", [])}
            knows = bool(
                names & {"CAPTIONER_DATABASE_URL", "CAPTIONER_REDIS_URL", "CAPTIONER_KEY_PEPPER", "CAPTIONER_API_KEYS"}
            )
            assert knows == who.endswith((" frontend", "-admin", "-tenants")), who
            assert ("CAPTIONER_ADMIN_TOKEN" in names) == who.endswith("-admin"), who
        assert not any("sk-hidden" in json.dumps(each) for each in manifests if each["kind"] != "Secret")


def test_external_stores_are_told_by_secret_references(helm: Path) -> None:
    """Host and user in the URL, the password by a variable from the Secret; nothing of the chart's own is made."""
    manifests = template(helm, COMBINATIONS["external stores"])
    assert not [each for each in manifests if each["kind"] == "StatefulSet"]
    env = {each["name"]: each for each in group(manifests, "frontend")["template"]["spec"]["containers"][0]["env"]}
    assert env["CAPTIONER_DATABASE_URL"]["value"] == (
        "postgresql+psycopg://captioner:$(DATABASE_PASSWORD)@db.example.com:5432/captioner?sslmode=verify-full"
    )
    assert env["DATABASE_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "db", "key": "password"}
    assert env["CAPTIONER_REDIS_URL"]["value"] == "rediss://:$(REDIS_SECRET)@cache.example.com:6380/0"
    assert list(env).index("DATABASE_PASSWORD") < list(env).index("CAPTIONER_DATABASE_URL")  # else it is not filled in
    assert list(env).index("REDIS_SECRET") < list(env).index("CAPTIONER_REDIS_URL")
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "rediss://cache.example.com:6380"


def test_a_database_may_be_told_by_its_url_alone(helm: Path) -> None:
    """The whole of it from a Secret: neither host nor password is asked for, and the chart's own is not used."""
    manifests = template(helm, COMBINATIONS["a database by its URL"])
    env = {each["name"]: each for each in group(manifests, "frontend")["template"]["spec"]["containers"][0]["env"]}
    assert env["CAPTIONER_DATABASE_URL"]["valueFrom"]["secretKeyRef"] == {"name": "db", "key": "database-url"}
    assert "DATABASE_PASSWORD" not in env


def test_haproxy_answers_in_the_callers_dialect(helm: Path) -> None:
    """Ray starts our program in its place, from where both images have it; that of another image can be named."""

    def told(values: dict[str, Any]) -> str:
        manifests = template(helm, values)
        for component in ("head", "frontend", "engine"):
            (container,) = group(manifests, component)["template"]["spec"]["containers"]
            assert {"configMapRef": {"name": "x-captioner-ray"}} in container["envFrom"]
        return str(only(manifests, "ConfigMap", "x-captioner-ray")["data"]["RAY_SERVE_HAPROXY_BINARY_PATH"])

    path = told({})
    app, _, inside = path.partition("/serving/")
    assert os.access(ROOT / "serving" / inside, os.X_OK)
    for build in ("cpu", "cuda"):
        lines = (ROOT / "deploy" / "docker" / f"{build}.Dockerfile").read_text().splitlines()
        assert any(line.strip().startswith(f"--target {app} .") for line in lines)
        assert f"&& chmod 0755 {path}" in [line.strip() for line in lines]  # Ray refuses what is none
    assert told({"ray": {"env": {"RAY_SERVE_HAPROXY_BINARY_PATH": "/app/haproxy.py"}}}) == "/app/haproxy.py"


def test_the_test_asks_where_callers_do(helm: Path) -> None:
    """At the Service, which KubeRay does not make for incremental upgrades: there only where it is told to."""

    def asked(values: dict[str, Any]) -> str:
        (container,) = only(template(helm, values), "Pod")["spec"]["containers"]
        return str(container["command"][2])

    assert asked({}) == "http://x-captioner-serve-svc.captions.svc:8000"
    assert asked({"workload": "deployment"}) == "http://x-captioner.captions.svc:8000"
    assert asked(COMBINATIONS["incremental upgrades"]) == ""  # which the test tells, see test_scripts.py
    gateway = {"test": {"url": "http://gateway.example.com"}}
    assert asked(COMBINATIONS["incremental upgrades"] | gateway) == gateway["test"]["url"]


def test_a_head_has_no_name_of_its_own(helm: Path) -> None:
    """A fixed name of its Service stops the second cluster of an upgrade."""
    assert "headService" not in only(template(helm), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("name", "first", "verb"),
    [
        ("defaults", [], "wait"),
        ("model on a claim that is there", [], "verify"),
        ("model on the host", [], "verify"),
        ("model from an object store", ["fetch-model"], "verify"),
    ],
)
def test_an_engine_starts_with_a_whole_checkpoint(helm: Path, name: str, first: list[str], verb: str) -> None:
    """It waits for the download, or checks the sums itself, before vLLM reads from where the settings say."""
    manifests = template(helm, COMBINATIONS[name])
    spec = group(manifests, "engine")["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == [*first, "check-model"]
    model = serve_config(manifests)["applications"][0]["args"]["model"]
    assert spec["initContainers"][-1]["command"] == ["python", "/etc/captioner/model.py", verb, model]
    mounts = {each["name"]: each for each in spec["containers"][0]["volumeMounts"]}
    assert model.startswith(mounts["model"]["mountPath"] + "/")
    assert mounts["model"]["readOnly"]


def test_the_claim_has_room_for_another_model(helm: Path) -> None:
    """An upgrade downloads the next one while engines read the first; or as much as is asked for."""

    def claimed(**model: Any) -> int:
        claim = only(template(helm, {"model": model}), "PersistentVolumeClaim", "x-captioner-model")
        return int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))

    assert claimed() > 2 * 60
    assert claimed(sizeGiB=100) > 2 * 100
    assert claimed(pvc={"sizeGiB": 70}) == 70


def test_another_model_is_another_job(helm: Path) -> None:
    """A Job cannot be changed, so its name changes with all that it is told; with nothing else."""

    def job(values: dict[str, Any]) -> tuple[str, str]:
        manifests = template(helm, values)
        (found,) = [each for each in manifests if each["kind"] == "Job" and "-model-" in each["metadata"]["name"]]
        return found["metadata"]["name"], json.dumps(found["spec"], sort_keys=True)

    plain = job({})
    for values in ({}, {"settings": {"max_num_seqs": 128}}, {"model": {"sizeGiB": 64, "pvc": {"sizeGiB": 256}}}):
        assert job(values) == plain
    told_by_files = [{"model": {"checksums": {"a": "0" * 64}}}]
    in_its_pod: list[dict[str, Any]] = [
        {"model": {"revision": "2"}},
        {"model": {"directory": "other"}},
        {"model": {"pvc": {"existingClaim": "weights"}}},
        {"model": {"resources": {"limits": {"memory": "8Gi"}}}},
        {"model": {"download": {"tokenSecret": {"name": "hub"}}}},
        {"model": {"download": {"env": [{"name": "HF_ENDPOINT", "value": "https://hub.example.com"}]}}},
        {"model": {"download": {"deadlineSeconds": 60}}},
        {"model": {"download": {"nodeSelector": {"pool": "cpu"}}}},
        {"model": {"download": {"tolerations": [{"operator": "Exists"}]}}},
        {"model": {"download": {"affinity": SCHEDULED["affinity"]}}},
        {"image": {"tag": "2"}},
        {"image": {"pullPolicy": "Always"}},
        {"image": {"pullSecrets": ["pull"]}},
        {"priorityClass": {"name": "system"}},
        {"podSecurityContext": {"runAsUser": 12345}},
        {"securityContext": {"privileged": False}},
    ]
    jobs = [plain, *map(job, in_its_pod)]
    assert len({spec for _, spec in jobs}) == len(jobs)  # each did change the Job
    assert len({name for name, _ in [*jobs, *map(job, told_by_files)]}) == len(jobs) + 1


def test_rules_and_dashboards_are_shipped(helm: Path) -> None:
    """Every file of `deploy/`, whole."""
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


def test_keda_scales_what_can_be_scaled(helm: Path) -> None:
    """The Deployment, between the bounds; which then has no number of its own."""
    manifests = template(helm, COMBINATIONS["without Ray, with KEDA"])
    scaled, deployment = only(manifests, "ScaledObject")["spec"], only(manifests, "Deployment")
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 9)
    assert "replicas" not in deployment["spec"]
