"""checkov's findings in the chart, and the reason for each accepted finding.

It runs in an environment that uv makes and keeps, because its pins conflict with ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.chart.combinations import COMBINATIONS
from tests.chart.rendering import pod_templates, template

VERSION = "3.3.30"

ACCEPTED = {
    "CKV_K8S_11": "a limit would slow audio workers and vLLM on an idle node; requests share the CPU fairly",
    "CKV_K8S_15": "tags are pinned, and with `Always` each start of a large image would need the registry",
    "CKV_K8S_35": "Ray's processes and PostgreSQL's image read secrets from environment variables",
    "CKV_K8S_43": "a digest can be set (`image.digest`); the default is the image that the operator has built",
}
"""Accepted everywhere, with the reason."""

ACCEPTED_FOR = {
    ("CKV_K8S_40", "postgresql"): "the image's user, 999, owns its files",
    ("CKV_K8S_40", "redis"): "the image's user, 999, owns its files",
    ("CKV_K8S_40", "backup"): "the image's user, 999, owns its files",
    ("CKV_K8S_40", "restore"): "the image's user, 999, owns its files",
    ("CKV_K8S_8", "test"): "runs once to completion",
    ("CKV_K8S_9", "test"): "runs once to completion",
}
"""Accepted for one component, with the reason."""


def test_checkov_finds_only_what_is_accepted(helm: Path, tmp_path: Path) -> None:
    """All objects of the chart, including Ray's pods, have only accepted findings, and each exception is needed."""
    values = COMBINATIONS["administration"] | COMBINATIONS["monitoring"]
    manifests = template(helm, values) + template(helm, COMBINATIONS["without Ray"], name="solo")
    rays = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": each["metadata"] | {"name": who.split()[-1]},
            "spec": each["spec"],
        }
        for who, each in pod_templates(manifests)
        if who.startswith("RayService")
    ]
    assert len(rays) == 3
    for each in [*manifests, *rays]:
        each["metadata"]["namespace"] = "captions"  # the namespace of the release
    path = tmp_path / "chart.yaml"
    path.write_text(yaml.safe_dump_all([*manifests, *rays]))
    uv = Path(sys.executable).with_name("uv")
    command = [
        *(uv, "tool", "run", "--quiet", "--python", sys.executable, "--from", f"checkov=={VERSION}", "checkov"),
        "--file",
        path,
        "--framework",
        "kubernetes",
        "--compact",
        "--quiet",
        "--skip-download",
        "--output",
        "json",
    ]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, timeout=280)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["summary"]["parsing_errors"] == 0
    assert result["summary"]["passed"] > 500
    found = {
        (each["check_id"], each["resource"].rpartition("-")[2].rpartition(".")[2]): each
        for each in result["results"]["failed_checks"]
    }
    unexpected = [key for key in found if key[0] not in ACCEPTED and key not in ACCEPTED_FOR]
    assert unexpected == [], [found[key]["check_name"] for key in unexpected]
    assert {check for check, _ in found} >= ACCEPTED.keys()
    assert found.keys() >= ACCEPTED_FOR.keys()
