"""Converter of the chart's Deployment (without Ray) to a manifest that `podman play kube` can run.

    helm template … --set workload=deployment | playable.py PORT SECRET.json > pod.yaml

The pod stays as the chart renders it, with two exceptions: its port is published on loopback, and `/dev/shm` is
podman's default, because podman 4 lets only root write to an `emptyDir` there. The Secret's data is written to a
separate file as one JSON object, the format of podman 4 (`podman secret create NAME SECRET.json`).
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import yaml

SHM = "/dev/shm"  # noqa: S108 - a mount's name


def main() -> None:
    """Convert standard input to standard output; print the Secret's name on standard error."""
    port, secret_file = int(sys.argv[1]), Path(sys.argv[2])
    documents = [document for document in yaml.safe_load_all(sys.stdin) if document]
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    for container in pod["containers"]:
        for each in container.get("ports", []):
            each |= {"hostPort": port, "hostIP": "127.0.0.1"}
        container["volumeMounts"] = [each for each in container["volumeMounts"] if each["mountPath"] != SHM]
    mounted = {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
    settings = [document for document in documents if document["kind"] == "ConfigMap" and named(document) in mounted]
    (secret,) = [document for document in documents if document["kind"] == "Secret"]
    data = dict(secret.get("data", {}))
    data |= {key: base64.b64encode(value.encode()).decode() for key, value in secret.get("stringData", {}).items()}
    secret_file.write_text(json.dumps(data))
    yaml.safe_dump_all([*settings, deployment], sys.stdout)
    print(named(secret), file=sys.stderr)


def named(document: dict[str, dict[str, str]]) -> str:
    """Return the name of an object."""
    return document["metadata"]["name"]


if __name__ == "__main__":
    main()
