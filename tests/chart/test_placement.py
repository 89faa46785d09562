"""Placement of the pods: Ray's resources, scheduling, spreading, shared memory, scaling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from tests.chart.combinations import COMBINATIONS
from tests.chart.rendering import PROFILES, ROOT, Manifest, group, only, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path

SHM = "/dev/shm"  # noqa: S108 - a mount's name


def pod_of(values: dict[str, Any], helm: Path, component: str, *profiles: str) -> Manifest:
    """Return the pod of one component."""
    spec: Manifest = group(template(helm, values, *profiles), component)["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def read_by_ray(helm: Path) -> dict[str, Any]:
    """Node types and requested resources of every profile, as read by Ray's code."""
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
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("profile", PROFILES)
def test_frontends_and_engines_fit_only_their_nodes(helm: Path, profile: str, read_by_ray: dict[str, Any]) -> None:
    """By Ray's code, the resources that each deployment requests fit one node type, once per pod."""
    nodes, requested = read_by_ray[profile]["nodes"], read_by_ray[profile]["requested"]
    for name in ("frontend", "engine"):
        fits = [
            kind
            for kind, node in nodes.items()
            if all(node["resources"].get(what, 0) >= need for what, need in requested[name].items())
        ]
        assert fits == [name]
        assert min(nodes[name]["resources"][what] // need for what, need in requested[name].items()) == 1
    args = serve_config(template(helm, {}, profile))["applications"][0]["args"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in nodes["frontend"]["resources"]
    assert requested["engine"].get("GPU", 0) == (args["tensor_parallel"] if args["engine_on_gpu"] else 0)
    assert (nodes["frontend"]["max_workers"], nodes["engine"]["max_workers"]) == (
        args["max_frontends"],
        args["max_engine_replicas"],
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_ray_and_the_service_accept_the_serve_config(helm: Path, profile: str, read_by_ray: dict[str, Any]) -> None:
    """Ray's schema accepts it and the application can be built (see `read_by_ray`); integers stay integers."""
    assert set(read_by_ray[profile]["requested"]) == {"frontend", "engine", "membership"}
    args = serve_config(template(helm, COMBINATIONS["big numbers"], profile))["applications"][0]["args"]
    assert Settings(**args).max_upload_bytes == 10485759
    assert isinstance(args["max_upload_bytes"], int)


def test_shared_memory_is_memory_and_fits_the_container(helm: Path) -> None:
    """It is a volume in memory, smaller than the container's limit and larger than Ray's object store."""
    for profile in PROFILES:
        for component in ("head", "frontend", "engine"):
            spec = pod_of({}, helm, component, profile)
            (volume,) = [each["emptyDir"] for each in spec["volumes"] if each["name"] == "shm"]
            assert {"name": "shm", "mountPath": SHM} in spec["containers"][0]["volumeMounts"]
            assert volume["medium"] == "Memory"
            limit = spec["containers"][0]["resources"]["limits"]["memory"]
            assert 268435456 < size(volume["sizeLimit"]) < size(limit)


def size(quantity: str) -> float:
    """Return a quantity in bytes."""
    units = {"Mi": 2**20, "Gi": 2**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


def test_scheduling_is_passed_on(helm: Path) -> None:
    """Every group passes on all of Kubernetes' scheduling fields; spreading is a list."""
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
    """Pods of each component are spread over zones and nodes where that is possible."""
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


def test_a_head_has_no_fixed_name(helm: Path) -> None:
    """A fixed name of its Service would block the second cluster of an upgrade."""
    assert "headService" not in only(template(helm), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]


def test_keda_scales_the_deployment(helm: Path) -> None:
    """KEDA scales the Deployment between the bounds; the Deployment then sets no number of replicas."""
    manifests = template(helm, COMBINATIONS["without Ray, with KEDA"])
    scaled, deployment = only(manifests, "ScaledObject")["spec"], only(manifests, "Deployment")
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 9)
    assert "replicas" not in deployment["spec"]
