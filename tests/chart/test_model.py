"""The checkpoint of the engines: its init containers, its claim, its download Job."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from tests.chart.combinations import COMBINATIONS, SCHEDULED
from tests.chart.rendering import PROFILES, RefusedError, containers, group, only, pods, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "first", "verb"),
    [
        ("model in a shared claim", [], "wait"),
        ("model on an existing claim", [], "verify"),
        ("model on the host", [], "verify"),
        ("model from an object store", ["fetch-model"], "verify"),
    ],
)
def test_an_engine_starts_with_a_complete_checkpoint(helm: Path, name: str, first: list[str], verb: str) -> None:
    """It waits for the download, or verifies the sums, before vLLM reads from the path in the settings."""
    manifests = template(helm, COMBINATIONS[name])
    spec = group(manifests, "engine")["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == [*first, "check-model", "doctor-engine"]
    model = serve_config(manifests)["applications"][0]["args"]["model"]
    assert spec["initContainers"][-2]["command"] == ["python", "/etc/captioner/model.py", verb, model]
    mounts = {each["name"]: each for each in spec["containers"][0]["volumeMounts"]}
    assert model.startswith(mounts["model"]["mountPath"] + "/")
    assert mounts["model"]["readOnly"]


@pytest.mark.parametrize(
    ("name", "volume"),
    [
        ("defaults", {"emptyDir": {"sizeLimit": "70Gi"}}),
        (
            "a copy of the model for each engine",
            {
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": ["ReadWriteOnce"],
                            "storageClassName": "fast",
                            "resources": {"requests": {"storage": "70Gi"}},
                        }
                    }
                }
            },
        ),
        ("a copy of the model for each node", {"hostPath": {"path": "/var/lib/models", "type": "Directory"}}),
    ],
)
def test_an_engines_pod_downloads(helm: Path, name: str, volume: dict[str, Any]) -> None:
    """Its first container downloads and verifies what vLLM then reads; no Job and no shared claim is needed."""
    manifests = template(helm, COMBINATIONS[name])
    spec = group(manifests, "engine")["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["fetch-model", "doctor-engine"]
    fetch = spec["initContainers"][0]
    model = serve_config(manifests)["applications"][0]["args"]["model"]
    values = ["Qwen/Qwen3-Omni-30B-A3B-Captioner", "main"]
    assert fetch["command"] == ["python", "/etc/captioner/model.py", "fetch", model, *values]
    assert {"name": "model", "mountPath": "/models"} in fetch["volumeMounts"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert [each for each in spec["volumes"] if each["name"] == "model"] == [{"name": "model", **volume}]
    disk = fetch["resources"]["requests"].get("ephemeral-storage")
    assert disk == ("70Gi" if "emptyDir" in volume else None)  # or a node without the disk gets the pod, and evicts it
    secrets = [each["name"] for each in fetch["env"] if "valueFrom" in each]
    assert secrets == (["HF_TOKEN"] if name == "a copy of the model for each engine" else [])
    assert not [each for each in manifests if each["kind"] == "Job"]


def test_the_defaults_need_no_shared_storage(helm: Path) -> None:
    """With the values that every installation sets, each claim of the defaults and of each profile is one pod's."""
    for profile in (None, *PROFILES):
        manifests = template(helm, {}, *([profile] if profile else []))
        assert "ReadWriteMany" not in json.dumps(manifests), profile
        images = {each["image"] for _, spec in pods(manifests) for each in containers(spec)}
        ours = {image for image in images if image.startswith("registry.example.com/captioner:")}
        assert len(ours) == 1, profile
        assert all("@sha256:" in image for image in images - ours), profile


def test_the_claim_has_room_for_another_model(helm: Path) -> None:
    """By default it is large enough for two, because an upgrade downloads one while engines read the other."""

    def claimed(**model: Any) -> int:
        claim = only(template(helm, {"model": {"source": "pvc"} | model}), "PersistentVolumeClaim", "x-captioner-model")
        return int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))

    assert claimed() > 2 * 60
    assert claimed(sizeGiB=100) > 2 * 100
    assert claimed(pvc={"sizeGiB": 70}) == 70


def test_another_model_is_another_job(helm: Path) -> None:
    """A Job is immutable, so its name changes with everything that it depends on, and with nothing else."""

    def job(values: dict[str, Any]) -> tuple[str, str]:
        manifests = template(helm, values | {"model": {"source": "pvc"} | values.get("model", {})})
        (found,) = [each for each in manifests if each["kind"] == "Job" and "-model-" in each["metadata"]["name"]]
        return found["metadata"]["name"], json.dumps(found["spec"], sort_keys=True)

    plain = job({})
    for values in ({}, {"settings": {"max_num_seqs": 128}}, {"model": {"sizeGiB": 64, "pvc": {"sizeGiB": 256}}}):
        assert job(values) == plain
    in_its_files = [{"model": {"checksums": {"a": "0" * 64}}}]
    in_its_pod: list[dict[str, Any]] = [
        {"model": {"revision": "2"}},
        {"model": {"hub": "modelscope"}},
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
    assert len({name for name, _ in [*jobs, *map(job, in_its_files)]}) == len(jobs) + 1


def test_a_download_from_modelscope(helm: Path) -> None:
    """The Job gets the variable that vLLM reads too, and its token under ModelScope's name; the claim is the same."""
    values = {"model": {"source": "pvc", "hub": "modelscope", "download": {"tokenSecret": {"name": "hub"}}}}
    (job,) = [
        each for each in template(helm, values) if each["kind"] == "Job" and "-model-" in each["metadata"]["name"]
    ]
    assert job["spec"]["template"]["spec"]["containers"][0]["env"] == [
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - a container's own
        {"name": "VLLM_USE_MODELSCOPE", "value": "True"},
        {"name": "MODELSCOPE_CACHE", "value": "/tmp/modelscope"},  # noqa: S108
        {"name": "MODELSCOPE_API_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
    ]
    with pytest.raises(RefusedError, match=r"model\.hub: modelscope requires the cuda image"):
        template(helm, {"model": {"hub": "modelscope"}, "image": {"variant": "cpu"}, "engine": {"gpus": 0}})


@pytest.mark.parametrize("workload", ["rayservice", "deployment"])
def test_engine_arguments_reach_the_service(helm: Path, workload: str) -> None:
    """The service reads the table as it is in the values, large numbers included."""
    table = {"kv_cache_dtype": "fp8", "max_cudagraph_capture_size": 10485759, "compilation_config": {"mode": 3}}
    table |= {"load_format": "runai_streamer", "model_loader_extra_config": {"concurrency": 16}}
    manifests = template(helm, {"workload": workload, "settings": {"engine_args": table}})
    if workload == "rayservice":
        given = serve_config(manifests)["applications"][0]["args"]
    else:
        given = tomllib.loads(only(manifests, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"])
    assert Settings(engine_args=given["engine_args"]).engine_args == table


@pytest.mark.parametrize("name", ["model", "enable_prefix_caching", "tensor_parallel_size", "hf_token"])
def test_an_engine_argument_that_the_service_sets_is_refused(helm: Path, name: str) -> None:
    """The schema of the values has the service's list."""
    with pytest.raises(RefusedError, match=f"/settings/engine_args/{name}'"):
        template(helm, {"settings": {"engine_args": {name: 1}}})
