"""Generator of the chart's README table, of `values.schema.json` and of the chart's copies of files of `deploy/`.

    python helm/generate.py           write every generated file
    python helm/generate.py --check   exit with 1 if a generated file is not current

Types and comments of `captioner/values.yaml` are the source of the table and the schema; `CHOICES`, `MORE` and
`BY_NAME` add what a default value does not show. Helm reads only files inside the chart, so the chart has copies of the
rules, the dashboards and Ray's environment.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from serving.config import Settings
from serving.settings.engine_args import RESERVED

HERE = Path(__file__).parent
CHART = HERE / "captioner"
DEPLOY = HERE.parent / "deploy"

COPIES = {
    "serve/ray.env": "files",
    "prometheus/captioner.*.yml": "files/prometheus",
    "grafana/dashboards/*.json": "files/dashboards",
}

DERIVED_SETTINGS = {
    "config",
    "host",
    "port",
    "model",
    "revision",
    "tensor_parallel",
    "shutdown_grace_s",
    "response_timeout_s",
    "stream_timeout_s",
    "min_frontends",
    "max_frontends",
    "frontend_cpus",
    "min_engine_replicas",
    "max_engine_replicas",
    "engine_cpus",
    "engine_on_gpu",
    "pin_roles_to_nodes",
    "object_store_url",
    "object_store_endpoint",
    "object_store_region",
    "object_store_virtual_host",
    "uploads_dir",
    "download_dir",
    "data_dir",
    "admin_host",
    "admin_port",
    "metrics_host",
    "metrics_port",
    "auth",
}
"""Settings that the chart derives from other values. The schema of `settings` rejects them, as it rejects secrets."""

MAP: dict[str, Any] = {"type": "object"}
WORDS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$"}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
        for name in ("requests", "limits")
    },
}
PEERS = {"type": "array", "items": {"type": "object", "minProperties": 1}}
NETWORKS = {"type": "array", "items": {"type": "string", "pattern": "/[0-9]+$"}, "minItems": 1}
DIGEST = "@sha256:[0-9a-f]{64}"
IMAGE = rf"^[a-z0-9][A-Za-z0-9./_-]*(:[0-9]+/[a-z0-9./_-]+)?(:[A-Za-z0-9_][A-Za-z0-9_.-]*({DIGEST})?|{DIGEST})$"
POSITIVE = {"type": "integer", "minimum": 1}
CHOICES = {
    "workload": ["rayservice", "deployment"],
    "image.variant": ["cuda", "cpu"],
    "image.pullPolicy": ["Always", "IfNotPresent", "Never"],
    "model.source": ["hub", "embedded", "pvc", "hostPath", "objectStore"],
    "doctor.mode": ["enforce", "report", "off"],
    "model.hub": ["huggingface", "modelscope"],
    "ray.autoscaler.upscalingMode": ["Default", "Conservative", "Aggressive"],
    "ray.upgrade.type": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"],
    "uploads.storage": ["pvc", "emptyDir"],
    "engine.compileCache.storage": ["auto", "pvc", "emptyDir"],
    "postgresql.mode": ["bundled", "external", "none"],
    "redis.mode": ["bundled", "external", "none"],
    "backup.storage": ["auto", "pvc", "objectStore", "none"],
    "ingress.controller": ["nginx", "haproxy", "alb", "other"],
    "priorityClass.preemptionPolicy": ["PreemptLowerPriority", "Never"],
}
SECRETS = (
    "upload-secret",
    "key-pepper",
    "admin-token",
    "database-password",
    "redis-password",
    "api-keys",
    "metrics-token",
)
MORE: dict[str, dict[str, Any]] = {
    "global": MAP,
    "commonLabels": WORDS,
    "fullnameOverride": {"type": "string", "maxLength": 40},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.frontendTag": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|[A-Za-z0-9_][A-Za-z0-9_.-]*)?$"},
    "image.repository": {"type": "string", "minLength": 1},
    "image.pullSecrets": {"type": "array", "items": {"type": "string"}},
    "model.directory": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"},
    "model.sizeGiB": POSITIVE,
    "model.readMiBPerSecond": POSITIVE,
    "model.checksums": {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}},
    "model.pvc.accessModes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "engine.compileCache.accessModes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "uploads.accessModes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "drain.longestRequestSeconds": {"type": "integer", "minimum": 30, "maximum": 86400},
    "drain.marginSeconds": {"type": "integer", "minimum": 5, "maximum": 600},
    "ray.version": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
    "ray.env": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
    "ray.upgrade.incremental.stepSizePercent": {"type": "integer", "minimum": 0, "maximum": 100},
    "ray.upgrade.incremental.maxSurgePercent": {"type": "integer", "minimum": 0, "maximum": 100},
    "ray.upgrade.incremental.intervalSeconds": POSITIVE,
    "frontend.replicas.min": POSITIVE,
    "frontend.replicas.max": POSITIVE,
    "frontend.cpus": POSITIVE,
    "engine.replicas.max": POSITIVE,
    "engine.cpus": POSITIVE,
    "secrets.values": {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": "string"} for name in SECRETS},
    },
    "deployment.rollingUpdate": {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": ["integer", "string"]} for name in ("maxSurge", "maxUnavailable")},
    },
    "tenants.list": {
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
                "plan": {"type": "string"},
                "region": {"enum": ["beijing", "singapore"]},
            },
        },
    },
    "backup.schedule": {"type": "string", "pattern": r"^(@[a-z]+|\S+( \S+){4})$"},
    "backup.keep": POSITIVE,
    "backup.deadlineSeconds": POSITIVE,
    "backup.image": {"type": "string", "pattern": f"^$|{IMAGE}"},
    "test.url": {"type": "string", "pattern": "^(https?://[A-Za-z0-9.-]+(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~/-]*)?)?$"},
    "ingress.paths": {"type": "array", "items": {"type": "string", "pattern": "^/"}, "minItems": 1},
    "httpRoute.hostnames": {"type": "array", "items": {"type": "string"}},
    "httpRoute.canary.weight": {"type": "integer", "minimum": 0, "maximum": 100},
    "networkPolicy.dns.ports": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    "networkPolicy.fetch.ports": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    "networkPolicy.fetch.exceptIPv4": NETWORKS,
    "networkPolicy.fetch.exceptIPv6": NETWORKS,
    "extraManifests": {"type": "array", "items": {"type": ["object", "string"]}},
}
BY_NAME: dict[str, dict[str, Any]] = {
    "resources": RESOURCES,
    **dict.fromkeys(("nodeSelector", "podLabels", "podAnnotations", "annotations", "labels"), WORDS),
    **dict.fromkeys(("affinity", "podSecurityContext", "securityContext"), MAP),
    **dict.fromkeys(
        ("callers", "operator", "prometheus", "kubernetesApi", "modelSource", "networks", "from", "to"), PEERS
    ),
    **dict.fromkeys(("scratchSize", "shmSize", "dataSize", "size"), QUANTITY),
    "image": {"type": "string", "pattern": IMAGE},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "modelPort": {"type": "integer", "minimum": 1, "maximum": 65535},
}


def schema_of(value: Any, path: str = "") -> dict[str, Any]:
    """Return the schema of the value at `path`, whose default is `value`."""
    name = path.rpartition(".")[2]
    if path == "image":
        name = ""  # the service's image is a map, not a reference as text
    if path in CHOICES:
        return {"enum": CHOICES[path]}
    if path == "settings":
        return settings_schema()
    if known := MORE.get(path) or BY_NAME.get(name):
        return known
    match value:
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer", "minimum": 0}
        case str():
            return {"type": "string"}
        case list():
            return {"type": "array", "items": {"type": "object"}}
        case dict() if value:
            inner = {key: schema_of(each, f"{path}.{key}".lstrip(".")) for key, each in value.items()}
            return {"type": "object", "additionalProperties": False, "properties": inner}
    raise SystemExit(f"values.yaml: the type of {path} is unknown; add its schema to MORE in generate.py")


def settings_schema() -> dict[str, Any]:
    """Return the schema of the service's settings, without derived settings (`DERIVED_SETTINGS`) and secrets."""
    full = Settings.model_json_schema()
    inner = {}
    for name, each in full["properties"].items():
        if name in DERIVED_SETTINGS or "password" in json.dumps(each):
            continue
        inner[name] = {key: part for key, part in each.items() if key not in {"default", "title", "$ref"}}
        if reference := each.get("$ref"):
            definition = full["$defs"][reference.removeprefix("#/$defs/")]
            inner[name] |= {key: part for key, part in definition.items() if key not in {"title", "description"}}
    # Not `propertyNames`: Helm's message has another place of the values then.
    inner["engine_args"]["properties"] = dict.fromkeys(sorted(RESERVED), False)
    if "$ref" in json.dumps(inner):
        raise SystemExit("a definition of a setting refers to another one ($ref), which generate.py does not support")
    return {"type": "object", "additionalProperties": False, "properties": inner}


def table(text: str) -> str:
    """Return the README's table: each described value, its description and its default."""
    values = yaml.safe_load(text)
    rows, path, description, covered = [], [], None, []
    for line in text.splitlines():
        if comment := re.match(r"\s*# -- (.*)", line):
            description = comment[1]
        if not (key := re.match(r"(\s*)([A-Za-z][\w]*):", line)):
            continue
        path = [*path[: len(key[1]) // 2], key[2]]
        name = ".".join(path)
        value: Any = values
        for part in path:
            value = value[part] if isinstance(value, dict) and part in value else None
        inside = any(name.startswith(f"{each}.") for each in covered)
        if description is not None:
            shown = json.dumps(value, ensure_ascii=False)
            rows.append(f"| `{name}` | {description.replace('|', '&#124;')} | `{shown}` |")
            covered.append(name)
        elif not inside and not (isinstance(value, dict) and value):
            raise SystemExit(f"values.yaml: {name} has no description")
        description = None
    return "\n".join(["| Value | | Default |", "|---|---|---|", *rows])


def generated() -> dict[Path, str]:
    """Return the text of every generated file, by path."""
    text = (CHART / "values.yaml").read_text()
    schema = {"$schema": "http://json-schema.org/draft-07/schema#"} | schema_of(yaml.safe_load(text))
    readme = CHART / "README.md"
    begin, end = "<!-- values: generated by generate.py -->\n", "\n<!-- /values -->"
    before, _, rest = readme.read_text().partition(begin)
    files = {
        CHART / "values.schema.json": json.dumps(schema, indent=1) + "\n",
        readme: before + begin + table(text) + end + rest.partition(end)[2],
    }
    for source, target in COPIES.items():
        for file in sorted(DEPLOY.glob(source)):
            files[CHART / target / file.name] = file.read_text()
    return files


def main() -> int:
    """Write the files that are not current; with `--check` list them instead. Return the exit status."""
    files = generated()
    kept = {path for target in COPIES.values() if target != "files" for path in (CHART / target).glob("*")}
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    left = sorted(kept - set(files))
    if "--check" in sys.argv[1:]:
        for path in [*stale, *left]:
            print(f"{path.relative_to(HERE.parent)} is not current: run `make chart`", file=sys.stderr)
        return 1 if stale or left else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path])
    for path in left:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
