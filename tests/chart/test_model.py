"""The checkpoint of the engines: its init containers, its claim, its download Job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.chart.combinations import COMBINATIONS, SCHEDULED
from tests.chart.rendering import group, only, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "first", "verb"),
    [
        ("defaults", [], "wait"),
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


def test_the_claim_has_room_for_another_model(helm: Path) -> None:
    """By default it is large enough for two, because an upgrade downloads one while engines read the other."""

    def claimed(**model: Any) -> int:
        claim = only(template(helm, {"model": model}), "PersistentVolumeClaim", "x-captioner-model")
        return int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))

    assert claimed() > 2 * 60
    assert claimed(sizeGiB=100) > 2 * 100
    assert claimed(pvc={"sizeGiB": 70}) == 70


def test_another_model_is_another_job(helm: Path) -> None:
    """A Job is immutable, so its name changes with everything that it depends on, and with nothing else."""

    def job(values: dict[str, Any]) -> tuple[str, str]:
        manifests = template(helm, values)
        (found,) = [each for each in manifests if each["kind"] == "Job" and "-model-" in each["metadata"]["name"]]
        return found["metadata"]["name"], json.dumps(found["spec"], sort_keys=True)

    plain = job({})
    for values in ({}, {"settings": {"max_num_seqs": 128}}, {"model": {"sizeGiB": 64, "pvc": {"sizeGiB": 256}}}):
        assert job(values) == plain
    in_its_files = [{"model": {"checksums": {"a": "0" * 64}}}]
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
    assert len({name for name, _ in [*jobs, *map(job, in_its_files)]}) == len(jobs) + 1
