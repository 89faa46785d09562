"""The volume of compiled kernels: shared by all engines, kept across pods, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.chart.combinations import SOLO
from tests.chart.rendering import RefusedError, containers, only, pods, template

if TYPE_CHECKING:
    from pathlib import Path

NAME = "x-captioner-compile-cache"


def engines(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the specs of pods that have the volume."""
    specs = [spec for _, spec in pods(manifests)]
    return [spec for spec in specs if any(each["name"] == "compile-cache" for each in spec.get("volumes", []))]


@pytest.mark.parametrize("values", [{}, SOLO], ids=["rayservice", "deployment"])
def test_engines_share_a_claim(helm: Path, values: dict[str, Any]) -> None:
    """The engine's caches are in the claim, which outlives its pod; other pods do not have it."""
    manifests = template(helm, {"model": {"source": "pvc"}, **values})
    claim = only(manifests, "PersistentVolumeClaim", NAME)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (spec,) = engines(manifests)
    (volume,) = [each for each in spec["volumes"] if each["name"] == "compile-cache"]
    assert volume["persistentVolumeClaim"] == {"claimName": NAME}
    engine = spec["containers"][0]
    (mount,) = [each for each in engine["volumeMounts"] if each["name"] == "compile-cache"]
    assert mount == {"name": "compile-cache", "mountPath": "/var/cache/captioner"}
    (root,) = [each["value"] for each in engine["env"] if each["name"] == "VLLM_CACHE_ROOT"]
    assert root.startswith("/var/cache/captioner/")
    assert [each["name"] for each in containers(spec) if "VLLM_CACHE_ROOT" in str(each.get("env"))] == [engine["name"]]


def test_another_storage(helm: Path) -> None:
    """An existing claim is used as it is; `emptyDir` needs none; what is no storage is refused."""

    def volume(**cache: Any) -> tuple[dict[str, Any], bool]:
        manifests = template(helm, {"model": {"source": "pvc"}, "engine": {"compileCache": cache}})
        (spec,) = engines(manifests)
        (found,) = [each for each in spec["volumes"] if each["name"] == "compile-cache"]
        return found, any(each["metadata"]["name"] == NAME for each in manifests)

    named, claimed = volume(existingClaim="kernels")
    assert (named["persistentVolumeClaim"]["claimName"], claimed) == ("kernels", False)
    assert volume(storage="emptyDir", size="5Gi") == (
        {"name": "compile-cache", "emptyDir": {"sizeLimit": "5Gi"}},
        False,
    )
    refused: list[dict[str, Any]] = [
        {"storage": "hostPath"},
        {"size": "large"},
        {"accessModes": []},
        {"path": "/var"},
    ]
    assert volume(storage="auto")[1]
    for wrong in refused:
        with pytest.raises(RefusedError):
            template(helm, {"engine": {"compileCache": wrong}})


@pytest.mark.parametrize("model", [{"source": "embedded"}, {"source": "hostPath"}])
def test_without_shared_storage_each_pod_compiles(helm: Path, model: dict[str, Any]) -> None:
    """By default there is no claim where the model needs none; with `pvc`, or an existing claim, there is one."""

    def kinds(**cache: Any) -> set[str]:
        (spec,) = engines(template(helm, {"model": model, "engine": {"compileCache": cache}}))
        (found,) = [each for each in spec["volumes"] if each["name"] == "compile-cache"]
        return set[str](found) - {"name"}

    assert kinds() == {"emptyDir"}
    assert kinds(storage="pvc") == {"persistentVolumeClaim"}
    assert kinds(existingClaim="kernels") == {"persistentVolumeClaim"}


def test_the_trial_needs_no_claim(helm: Path) -> None:
    """The embedded stand-in on a CPU compiles nothing; its profile makes no claim."""
    manifests = template(helm, {}, "cpu-embedded")
    assert not [each for each in manifests if each["kind"] == "PersistentVolumeClaim"]
