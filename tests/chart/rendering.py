"""The chart, rendered by real Helm, and what a strict API server would say to it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils as kubernetes_schemas

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "captioner"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))

SHARED = Path(os.environ.get("CHART_SHARED", ROOT.parent / "shared"))
"""Beside the checkout: `crds/`, definitions of custom resources, and `tools/`, the API in memory. Not ours to ship."""

KUBERNETES = ("1.30.0", "1.31.0", "1.32.0", "1.33.0", "1.34.0")

# It reads a version's schemas, megabytes, for each manifest.
kubernetes_schemas.schema_contents = functools.cache(kubernetes_schemas.schema_contents)

Manifest = dict[str, Any]
Values = dict[str, Any]


class Refused(Exception):  # noqa: N818 - what Helm does
    """Helm did not render: schema or the chart's own checks."""


def shared(part: str) -> Path:
    """A file or directory beside the checkout. Raises `FileNotFoundError`."""
    path = SHARED / part
    if not path.exists():
        raise FileNotFoundError(f"{path} is needed: put it beside the checkout, or name its directory in CHART_SHARED")
    return path


def template(
    helm: Path, values: Values | None = None, *profiles: str, name: str = "x", kubernetes: str = KUBERNETES[-1]
) -> list[Manifest]:
    """Every manifest of a release. Raises `Refused`."""
    command = [
        str(helm),
        "template",
        name,
        str(CHART),
        "--namespace=captions",
        f"--kube-version={kubernetes}",
        "--include-crds",
    ]
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
        raise Refused(done.stderr)
    return [each for each in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if each]


def lint(helm: Path, *profiles: str) -> None:
    """`helm lint --strict`. Raises `Refused`."""
    values = [f"--values={CHART / 'profiles' / profile}.yaml" for profile in profiles]
    done = subprocess.run([helm, "lint", "--strict", CHART, *values], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stdout + done.stderr)


def _closed(schema: Any) -> Any:
    """A definition's schema in which a field that it does not know is an error; a server would drop it in silence."""
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
    """Validators of the custom resources, by version and kind."""
    found = {}
    for path in shared("crds").glob("*.yaml"):
        for definition in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
                kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[kind] = Draft202012Validator(schema)
    return found


def errors_of(manifest: Manifest, kubernetes: str = KUBERNETES[-1]) -> list[str]:
    """What a server would refuse: unknown fields, wrong types, what is missing; custom resources, too."""
    return _errors_of(json.dumps(manifest), kubernetes)


@functools.cache
def _errors_of(text: str, kubernetes: str) -> list[str]:
    manifest = json.loads(text)
    kind = (manifest["apiVersion"], manifest["kind"])
    who = f"{manifest['kind']} {manifest['metadata']['name']}"
    if custom := _crds().get(kind):
        return [f"{who}: {error.json_path}: {error.message[:200]}" for error in custom.iter_errors(manifest)]
    try:
        kubernetes_validate.validate(manifest, kubernetes.rpartition(".")[0], strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{who}: {list(error.path)}: {error.message[:200]}"]
    return []


def all_errors(manifests: list[Manifest], kubernetes: str = KUBERNETES[-1]) -> list[str]:
    """What is wrong with a release: by the schemas, and by what no schema sees."""
    found = [error for manifest in manifests for error in errors_of(manifest, kubernetes)]
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    found += [f"{kind} {name} twice" for kind, name in set(names) if names.count((kind, name)) > 1]
    found += [f"{kind} {name}: too long" for kind, name in names if len(name) > (47 if kind == "RayService" else 63)]
    for who, spec in pods(manifests):
        # A custom resource's definition of a pod is looser than a pod's own.
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": who.lower().replace(" ", "-")}, "spec": spec}
        found += errors_of(pod, kubernetes)
        for container in containers(spec):
            if ":" not in container.get("image", "") or container["image"].endswith(":"):
                found.append(f"{who}: {container['name']} has no whole image: {container.get('image')!r}")
            found += [
                f"{who}: variable {each['name']} is no text" for each in container.get("env", []) if not is_text(each)
            ]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            volumes = {volume["name"] for volume in spec.get("volumes", [])}
            if "StatefulSet" not in who:
                found += [f"{who}: {container['name']} mounts {each}, which is not there" for each in mounts - volumes]
    return found


def is_text(variable: Mapping[str, Any]) -> bool:
    """Whether a container's variable has a text, or says where it comes from."""
    return isinstance(variable.get("value"), str) or "valueFrom" in variable


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template, with whose it is; a bare pod is its own."""
    for manifest in manifests:
        who = f"{manifest['kind']} {manifest['metadata']['name']}"
        match manifest["kind"]:
            case "Pod":
                yield who, manifest
            case "Deployment" | "StatefulSet" | "Job":
                yield who, manifest["spec"]["template"]
            case "RayService":
                cluster = manifest["spec"]["rayClusterConfig"]
                yield f"{who} head", cluster["headGroupSpec"]["template"]
                for group in cluster["workerGroupSpecs"]:
                    yield f"{who} {group['groupName']}", group["template"]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod's spec, with whose it is."""
    for who, each in pod_templates(manifests):
        yield who, each["spec"]


def containers(spec: Manifest) -> list[Manifest]:
    """Containers of a pod, those that run first too."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one manifest of a kind (and name)."""
    (found,) = [each for each in manifests if each["kind"] == kind and name in {None, each["metadata"]["name"]}]
    return found


def group(manifests: list[Manifest], component: str) -> Manifest:
    """A worker group of the RayService, or its head's."""
    cluster: Manifest = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    if component == "head":
        return dict(cluster["headGroupSpec"])
    (found,) = [each for each in cluster["workerGroupSpecs"] if each["groupName"] == component]
    return dict(found)


def serve_config(manifests: list[Manifest]) -> Manifest:
    """What Ray Serve is told."""
    config: Manifest = yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])
    return config
