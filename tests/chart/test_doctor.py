"""The doctor's init containers: which pods have one, what they see, and which of them can stop a pod."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from serving.cli.main import main
from serving.config import Settings
from tests.chart.combinations import COMBINATIONS, SOLO
from tests.chart.conftest import installed
from tests.chart.rendering import RefusedError, group, only, pod_templates, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path

GPU = {"nvidia.com/gpu": 1}


def doctors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the doctor's containers of a pod by name."""
    return {each["name"]: each for each in spec.get("initContainers", []) if each["name"].startswith("doctor-")}


@pytest.mark.parametrize("values", [{}, SOLO], ids=["rayservice", "deployment"])
def test_an_engine_is_checked_before_it_loads(helm: Path, values: dict[str, Any]) -> None:
    """The last check of an engine's pod has the GPUs, memory and volumes of the engine, and may fail the pod."""
    manifests = template(helm, values)
    spec = group(manifests, "engine")["template"]["spec"] if not values else only(manifests, "Deployment")["spec"]
    spec = spec if not values else spec["template"]["spec"]
    check, engine = doctors(spec)["doctor-engine"], spec["containers"][0]
    assert check["command"][:3] == ["captioner", "doctor", "--part=engine"]
    assert "--exit-zero" not in check["command"]
    assert check["image"] == engine["image"]
    assert check["resources"] == engine["resources"]
    assert check["resources"]["limits"].items() >= GPU.items()
    seen = {each["mountPath"] for each in check["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/models", "/etc/captioner-settings"} <= seen  # noqa: S108 - the pod's
    # No database, no keys: an engine's pod knows no callers.
    assert not {"CAPTIONER_DATABASE_URL", "CAPTIONER_API_KEYS"} & {each["name"] for each in check["env"]}


@pytest.mark.parametrize("values", [{}, SOLO], ids=["rayservice", "deployment"])
def test_a_frontend_starts_in_any_case(helm: Path, values: dict[str, Any]) -> None:
    """A frontend's check knows database and Redis, and an outage of either only shows in its log."""
    manifests = template(helm, values)
    spec = group(manifests, "frontend")["template"]["spec"] if not values else None
    spec = spec or only(manifests, "Deployment")["spec"]["template"]["spec"]
    check, frontend = doctors(spec)["doctor-frontend"], spec["containers"][0]
    assert check["command"][2] == "--part=frontend"
    assert check["command"][-1] == "--exit-zero"
    names = {each["name"] for each in check["env"]}
    assert {"CAPTIONER_DATABASE_URL", "CAPTIONER_REDIS_URL", "CAPTIONER_KEY_PEPPER"} <= names
    assert {"/var/lib/captioner/data", "/var/lib/captioner/uploads"} <= {m["mountPath"] for m in check["volumeMounts"]}
    assert check["resources"]["limits"]["memory"] == frontend["resources"]["limits"]["memory"]
    assert not GPU.keys() & check["resources"]["limits"].keys()


def test_the_mode_is_a_choice(helm: Path) -> None:
    """`report` never stops a pod, `off` renders no check and no settings for it, and another word is refused."""
    reported = template(helm, {"doctor": {"mode": "report"}})
    commands = [check["command"] for _, pod in pod_templates(reported) for check in doctors(pod["spec"]).values()]
    assert len(commands) == 2
    assert all(command[-1] == "--exit-zero" for command in commands)
    off = template(helm, {"doctor": {"mode": "off"}})
    assert not any(doctors(pod["spec"]) for _, pod in pod_templates(off))
    assert not [each for each in off if each["metadata"]["name"] == "x-captioner-settings"]
    with pytest.raises(RefusedError):
        template(helm, {"doctor": {"mode": "on"}})
    with pytest.raises(RefusedError):
        template(helm, {"doctor": {"enabled": True}})


def test_a_change_of_settings_needs_no_new_cluster(helm: Path) -> None:
    """The doctor reads the settings from a ConfigMap that no pod template has a sum of."""
    before, after = (template(helm, {"settings": {"max_num_seqs": count}}) for count in (64, 128))
    for component in ("frontend", "engine"):
        assert group(before, component) == group(after, component)
    assert serve_config(before) != serve_config(after)
    texts = [only(each, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"] for each in (before, after)]
    assert [tomllib.loads(text)["max_num_seqs"] for text in texts] == [64, 128]


SETTINGS = {
    "max_upload_bytes": 10_485_759,
    "max_url_bytes": 1 << 30,
    "gpu_memory_utilization": 0.87,
    "enforce_eager": True,
    "fetch_allow": ["media.internal:9000", "10.1.0.0/16"],
    "served_model_name": 'a "quoted" name \\ ü',
}


@pytest.mark.parametrize("version", ["3.17", "4.3"])
def test_the_file_has_the_values_as_they_are(version: str) -> None:
    """Integers stay integers in both versions of Helm, and texts and lists are what was given."""
    text = only(template(installed(version), {"settings": SETTINGS}), "ConfigMap", "x-captioner-settings")
    found = tomllib.loads(text["data"]["captioner.toml"])
    assert {name: found[name] for name in SETTINGS} == SETTINGS
    assert {name: type(found[name]) for name in SETTINGS} == {name: type(value) for name, value in SETTINGS.items()}
    assert type(found["tensor_parallel"]) is int


def test_the_doctor_gets_the_engines_arguments(helm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine_args` arrives as the service reads it."""
    arguments = {"kv_cache_dtype": "fp8", "compilation_config": {"level": 3}}
    manifests = template(helm, {"settings": {"engine_args": arguments}})
    file = tmp_path / "captioner.toml"
    file.write_text(only(manifests, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"])
    monkeypatch.setenv("CAPTIONER_CONFIG", str(file))
    assert Settings().engine_args == arguments


def test_only_pods_that_serve_are_checked(helm: Path) -> None:
    """Head, databases, administration and Jobs load no model and have no such check."""
    manifests = template(helm, COMBINATIONS["defaults"])
    found = {who for who, pod in pod_templates(manifests) if doctors(pod["spec"])}
    assert found == {"RayService x-captioner frontend", "RayService x-captioner engine"}


def test_the_rendered_command_runs(
    helm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor accepts the rendered command and settings; on a machine without the checkpoint it is an error."""
    manifests = template(helm)
    check = doctors(group(manifests, "engine")["template"]["spec"])["doctor-engine"]
    settings = tmp_path / "captioner.toml"
    settings.write_text(only(manifests, "ConfigMap", "x-captioner-settings")["data"]["captioner.toml"])
    monkeypatch.setenv("CAPTIONER_CONFIG", "")  # `--config` sets it; the fixture restores it
    command = [each.replace("/etc/captioner-settings", str(tmp_path)) for each in check["command"][1:]]
    model = "/models/qwen3-omni-30b-a3b-captioner"
    assert main(command) == 1
    report = capsys.readouterr().out
    assert "ok       settings  the settings are valid" in report
    assert f"error    weights   model: the directory {model} does not exist" in report
    assert main([*command, "--exit-zero"]) == 0
