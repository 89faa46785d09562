"""Compose files: merged by podman-compose, valid by the schema, with minimal privileges."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
PROGRAMS = Path(sys.executable).parent

Project = dict[str, Any]


def merged(tmp_path_factory: pytest.TempPathFactory, *files: str, **variables: str) -> Project:
    """Return the files merged by podman-compose, with variables expanded. It calls podman only for its version."""
    directory = tmp_path_factory.mktemp("bin")
    podman = directory / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    podman.chmod(0o755)
    arguments = [argument for name in files for argument in ("-f", str(COMPOSE / name))]
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", "HOME": str(directory), **variables}
    command = [sys.executable, str(PROGRAMS / "podman-compose"), *arguments, "config"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (directory / "merged.yaml").write_text(done.stdout)
    subprocess.run(
        [PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", directory / "merged.yaml"],
        check=True,
    )
    project: Project = yaml.safe_load(done.stdout)
    return project


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Project for a machine with GPUs."""
    return merged(tmp_path_factory, "compose.yaml")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Project for a machine without a GPU."""
    return merged(tmp_path_factory, "compose.yaml", "compose.cpu.yaml")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Project with uploads in a bucket."""
    variables = {"CAPTIONER_OBJECT_STORE_URL": "s3://captions/production"}
    return merged(tmp_path_factory, "compose.yaml", "compose.objects.yaml", **variables)


@pytest.fixture(params=["gpu", "cpu", "objects"])
def project(request: pytest.FixtureRequest) -> Project:
    """Each of the projects in turn."""
    found: Project = request.getfixturevalue(request.param)
    return found


def services(project: Project) -> list[tuple[str, dict[str, Any]]]:
    """Return the services with their names."""
    return list(project["services"].items())


def test_all_services_are_defined(project: Project) -> None:
    """The project has the service, its two stores, and monitoring."""
    assert set(project["services"]) == {"captioner", "postgres", "redis", "prometheus", "alertmanager", "grafana"}


def test_containers_have_minimal_privileges(project: Project) -> None:
    """Each has a read-only root, no capabilities, no way to gain any, and limits; stores do not run as root."""
    for name, service in services(project):
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service.get("network_mode") != "host", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert service["restart"] == "unless-stopped", name
    for name in ("postgres", "redis"):
        assert project["services"][name]["user"] == "999:999"


def test_every_container_has_a_health_check(project: Project) -> None:
    """Each has a health check, and the service waits until its stores are healthy."""
    for name, service in services(project):
        assert service["healthcheck"]["test"], name
    captioner = project["services"]["captioner"]
    assert "/readyz" in captioner["healthcheck"]["test"][-1]
    assert {name: each["condition"] for name, each in captioner["depends_on"].items()} == {
        "postgres": "service_healthy",
        "redis": "service_healthy",
    }


def test_ports_are_on_loopback(project: Project) -> None:
    """By default nothing is published to a network, and the stores are never published."""
    published = {name: service["ports"] for name, service in services(project) if service.get("ports")}
    assert set(published) == {"captioner", "prometheus", "alertmanager", "grafana"}
    for ports in published.values():
        assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_the_service_can_be_published(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A variable publishes the service, and only the service."""
    project = merged(tmp_path_factory, "compose.yaml", CAPTIONER_BIND="0.0.0.0", CAPTIONER_PORT="80")  # noqa: S104
    assert project["services"]["captioner"]["ports"] == ["0.0.0.0:80:8000"]
    assert project["services"]["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_the_stores_have_no_external_access(project: Project) -> None:
    """PostgreSQL and Redis are only in the internal network."""
    assert project["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "redis"):
        assert set(project["services"][name]["networks"]) == {"inside"}


def test_images_are_pinned(project: Project) -> None:
    """Each has a full version, and the stores a digest; the service's image is built locally."""
    for name, service in services(project):
        tag, _, digest = service["image"].rpartition("/")[2].partition(":")[2].partition("@")
        assert re.match(r"v?\d+\.\d+(\.\d+)?", tag) or name == "captioner", service["image"]
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest) or name not in {"postgres", "redis"}, service["image"]


def test_an_image_can_be_changed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The image's variable replaces version and digest."""
    pinned = "redis:8.10.2-trixie@sha256:" + "0" * 64
    assert merged(tmp_path_factory, "compose.yaml", REDIS_IMAGE=pinned)["services"]["redis"]["image"] == pinned


def test_secrets_are_files(project: Project) -> None:
    """Every named secret is a file and is used by a service; no variable contains a secret."""
    used = {secret for _, service in services(project) for secret in service.get("secrets", [])}
    assert used == set(project["secrets"])
    for secret in project["secrets"].values():
        assert set(secret) == {"file"}
    for name, service in services(project):
        for variable, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|TOKEN|PEPPER|KEY", variable):
                assert not value or str(value).startswith("/run/secrets"), f"{name}: {variable}"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/deploy/compose/secrets/" in ignored


def test_scrapes_have_the_token(project: Project) -> None:
    """The service requires the token that Prometheus sends, so metrics name tenants, for discovery and for scrapes."""
    for name in ("captioner", "prometheus"):
        assert "captioner_metrics_token" in project["services"][name]["secrets"], name
    (job,) = [
        job
        for job in yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
        if job["job_name"] == "captioner"
    ]
    sent = {"type": "Bearer", "credentials_file": "/run/secrets/captioner_metrics_token"}
    assert [job["authorization"], *(each["authorization"] for each in job["http_sd_configs"])] == [sent, sent]


def test_variables_are_settings(project: Project) -> None:
    """Each variable `CAPTIONER_<NAME>` and each secret `captioner_<name>` is a setting that exists."""
    captioner = project["services"]["captioner"]
    names = {
        name.removeprefix("CAPTIONER_").lower() for name in captioner["environment"] if name.startswith("CAPTIONER_")
    }
    names |= {name.removeprefix("captioner_") for name in captioner["secrets"]}
    assert names - {"secrets_dir", "region", "redis_url", "key_pepper"} <= set(Settings.model_fields)


def test_mounted_files_exist(project: Project) -> None:
    """Every mounted file and directory of the repository exists, and is mounted read-only."""
    count = 0
    for _, service in services(project):
        for volume in service.get("volumes", []):
            source, options = volume.split(":")[0], volume.split(":")[-1]
            if source.startswith(".."):
                count += 1
                assert (COMPOSE / source).exists(), volume
                assert options == "ro", volume
    assert count >= 6


def test_running_requests_finish_before_the_container_is_killed(project: Project) -> None:
    """The container may stop for longer than the service's grace period."""
    grace = re.fullmatch(r"(\d+)s", project["services"]["captioner"]["stop_grace_period"])
    assert grace
    assert int(grace[1]) > Settings.model_fields["shutdown_grace_s"].default


def test_only_the_cuda_image_reserves_gpus(gpu: Project, cpu: Project) -> None:
    """The CUDA image reserves all GPUs of the machine; the CPU image none, and it has the CPU profile."""
    resources = {name: project["services"]["captioner"] for name, project in (("gpu", gpu), ("cpu", cpu))}
    (devices,) = resources["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices["capabilities"] == ["gpu"]
    assert devices["count"] == "all"
    assert not resources["cpu"]["deploy"]["resources"].get("reservations")
    assert resources["gpu"]["build"]["dockerfile"] == "deploy/docker/cuda.Dockerfile"
    assert resources["cpu"]["build"]["dockerfile"] == "deploy/docker/cpu.Dockerfile"
    assert any("cpu-embedded.toml" in volume for volume in resources["cpu"]["volumes"])
    assert not any("1xh100" in volume for volume in resources["cpu"]["volumes"])


def test_uploads_can_be_in_a_bucket(objects: Project) -> None:
    """The bucket is a variable; its keys are secrets of the service alone."""
    captioner = objects["services"]["captioner"]
    assert captioner["environment"]["CAPTIONER_OBJECT_STORE_URL"] == "s3://captions/production"
    keys = {"captioner_object_store_access_key_id", "captioner_object_store_secret_key"}
    assert keys <= set(captioner["secrets"])
    assert all(keys.isdisjoint(each.get("secrets", [])) for name, each in services(objects) if name != "captioner")


def test_every_profile_can_be_chosen(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A variable selects the profile by name."""
    project = merged(tmp_path_factory, "compose.yaml", CAPTIONER_PROFILE="2xa100-80g")
    (profile,) = [volume for volume in project["services"]["captioner"]["volumes"] if "profile.toml" in volume]
    assert (COMPOSE / profile.split(":")[0]).is_file()


def test_secrets_are_created_once(tmp_path: Path) -> None:
    """Named secrets are random and kept by a second run; URLs contain the passwords; other users have no access."""
    script = [COMPOSE / "secrets.sh", tmp_path / "secrets"]
    subprocess.run(script, check=True, capture_output=True)
    created = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    project = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    assert set(created) == set(project["secrets"])
    assert len(created["captioner_key_pepper"].strip()) == 64
    assert f":{created['postgres_password'].strip()}@postgres:" in created["captioner_database_url"]
    password = re.search("requirepass (.*)", created["redis_conf"])
    assert password
    assert f":{password[1]}@redis:" in created["captioner_redis_url"]
    assert len(set(created.values())) == len(created)
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    (tmp_path / "secrets" / "captioner_upload_secret").unlink()
    subprocess.run(script, check=True, capture_output=True)
    again = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {name for name in created if again[name] != created[name]} == {"captioner_upload_secret"}


def test_compiled_kernels_outlive_the_container(project: Project) -> None:
    """The directory of the engine's caches is in a named volume."""
    captioner = project["services"]["captioner"]
    root = captioner["environment"]["VLLM_CACHE_ROOT"]
    kept = [each.split(":")[1] for each in captioner["volumes"] if each.split(":")[0] in project["volumes"]]
    assert any(root.startswith(f"{target}/") for target in kept)
