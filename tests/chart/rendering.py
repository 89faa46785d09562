"""Rendering of the chart by Helm, and validation of manifests as a strict API server does it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils as kubernetes_schemas

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "captioner"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))

REQUIRED = CHART / "ci" / "required-values.yaml"
"""Values that every installation must set."""

CRDS = Path(os.environ.get("CRDS_DIR", ROOT.parent / "shared" / "crds"))
"""Directory of the custom resources' definitions, which belong to other projects and are not in this repository."""

CUSTOM_API_VERSIONS = {
    "ray.io/v1",
    "monitoring.coreos.com/v1",
    "keda.sh/v1alpha1",
    "gateway.networking.k8s.io/v1",
}

KUBERNETES = ("1.30.0", "1.31.0", "1.32.0", "1.33.0", "1.34.0")

# Without the cache it reads all schemas of a version, several megabytes, for each manifest.
kubernetes_schemas.schema_contents = functools.cache(kubernetes_schemas.schema_contents)

Manifest = dict[str, Any]
Values = dict[str, Any]


class RefusedError(Exception):
    """Helm rejected the values, by the schema or by the chart's checks."""


def crd_files() -> list[Path]:
    """Return the files of the custom resources' definitions. Skip the test if they are not available."""
    files = sorted(CRDS.glob("*.yaml"))
    if not files:
        pytest.skip("the CRDs of KubeRay, Prometheus Operator, KEDA and the Gateway API are not here: set CRDS_DIR")
    return files


def template(
    helm: Path, values: Values | None = None, *profiles: str, name: str = "x", kubernetes: str = KUBERNETES[-1]
) -> list[Manifest]:
    """Return all manifests of a release. Raises `RefusedError`."""
    command = [
        str(helm),
        "template",
        name,
        str(CHART),
        "--namespace=captions",
        f"--kube-version={kubernetes}",
        "--include-crds",
    ]
    command += [f"--values={REQUIRED}"]
    command += [f"--api-versions={each}" for each in ("ray.io/v1", "monitoring.coreos.com/v1")]
    command += [f"--values={CHART / 'profiles' / profile}.yaml" for profile in profiles]
    done = subprocess.run(
        [*command, "--values=-"],
        input=json.dumps(values or {}, ensure_ascii=False),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RefusedError(done.stderr)
    return [each for each in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if each]


def lint(helm: Path, *profiles: str) -> None:
    """Run `helm lint --strict`. Raises `RefusedError`."""
    values = [f"--values={CHART / 'profiles' / profile}.yaml" for profile in profiles]
    done = subprocess.run([helm, "lint", "--strict", CHART, *values], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(done.stdout + done.stderr)


def _closed(schema: Any) -> Any:
    """Return a copy of a definition's schema that rejects unknown fields, which a server would drop silently."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _closed(each) for key, each in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and schema.get("properties") and not open_ended:
        schema["additionalProperties"] = False
    return schema


@functools.cache
def _crds() -> dict[tuple[str, str], Draft202012Validator]:
    """Return validators of the custom resources, by API version and kind. Skip the test without definitions."""
    found = {}
    for path in crd_files():
        for definition in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
                kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[kind] = Draft202012Validator(schema)
    return found


def errors_of(manifest: Manifest, kubernetes: str = KUBERNETES[-1]) -> list[str]:
    """Return what a server would reject in a built-in or custom resource: unknown, mistyped and missing fields."""
    return _errors_of(json.dumps(manifest), kubernetes)


@functools.cache
def _errors_of(text: str, kubernetes: str) -> list[str]:
    manifest = json.loads(text)
    kind = (manifest["apiVersion"], manifest["kind"])
    who = f"{manifest['kind']} {manifest['metadata']['name']}"
    if manifest["apiVersion"] in CUSTOM_API_VERSIONS:
        return [f"{who}: {error.json_path}: {error.message[:200]}" for error in _crds()[kind].iter_errors(manifest)]
    try:
        kubernetes_validate.validate(manifest, kubernetes.rpartition(".")[0], strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{who}: {list(error.path)}: {error.message[:200]}"]
    return []


def all_errors(manifests: list[Manifest], kubernetes: str = KUBERNETES[-1]) -> list[str]:
    """Return the errors of a release: by the schemas, and by rules that no schema expresses.

    Custom resources come last: without their definitions the test is skipped, unless something else is wrong.
    """
    custom = [each for each in manifests if each["apiVersion"] in CUSTOM_API_VERSIONS]
    found = [error for each in manifests if each not in custom for error in errors_of(each, kubernetes)]
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    found += [f"{kind} {name}: duplicate" for kind, name in set(names) if names.count((kind, name)) > 1]
    found += [f"{kind} {name}: too long" for kind, name in names if len(name) > (47 if kind == "RayService" else 63)]
    for who, spec in pods(manifests):
        # A custom resource's definition of a pod is looser than a pod's own.
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": who.lower().replace(" ", "-")}, "spec": spec}
        found += errors_of(pod, kubernetes)
        for container in containers(spec):
            if ":" not in container.get("image", "") or container["image"].endswith(":"):
                found.append(f"{who}: {container['name']} has an image without a tag: {container.get('image')!r}")
            found += [
                f"{who}: variable {each['name']} is not text" for each in container.get("env", []) if not is_text(each)
            ]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            volumes = {volume["name"] for volume in spec.get("volumes", [])}
            if "StatefulSet" not in who:
                found += [
                    f"{who}: {container['name']} mounts {each}, which is not a volume" for each in mounts - volumes
                ]
    return found or [error for each in custom for error in errors_of(each, kubernetes)]


def is_text(variable: Mapping[str, Any]) -> bool:
    """Return whether a container's variable has a text or a reference as its value."""
    return isinstance(variable.get("value"), str) or "valueFrom" in variable


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield every pod template with the name of its owner; a bare pod is its own template."""
    for manifest in manifests:
        who = f"{manifest['kind']} {manifest['metadata']['name']}"
        match manifest["kind"]:
            case "Pod":
                yield who, manifest
            case "Deployment" | "StatefulSet" | "Job":
                yield who, manifest["spec"]["template"]
            case "CronJob":
                yield who, manifest["spec"]["jobTemplate"]["spec"]["template"]
            case "RayService":
                cluster = manifest["spec"]["rayClusterConfig"]
                yield f"{who} head", cluster["headGroupSpec"]["template"]
                for group in cluster["workerGroupSpecs"]:
                    yield f"{who} {group['groupName']}", group["template"]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield every pod's spec with the name of its owner."""
    for who, each in pod_templates(manifests):
        yield who, each["spec"]


def containers(spec: Manifest) -> list[Manifest]:
    """Return the init containers and containers of a pod."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """Return the only manifest of a kind (and name)."""
    (found,) = [each for each in manifests if each["kind"] == kind and name in {None, each["metadata"]["name"]}]
    return found


def group(manifests: list[Manifest], component: str) -> Manifest:
    """Return a worker group of the RayService, or its head group."""
    cluster: Manifest = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    if component == "head":
        return dict(cluster["headGroupSpec"])
    (found,) = [each for each in cluster["workerGroupSpecs"] if each["groupName"] == component]
    return dict(found)


def serve_config(manifests: list[Manifest]) -> Manifest:
    """Return Ray Serve's configuration."""
    config: Manifest = yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])
    return config
