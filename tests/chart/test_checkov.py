"""What checkov finds in the chart, and why we leave it. In an environment of its own: its pins are not ours."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.chart.combinations import COMBINATIONS
from tests.chart.rendering import ROOT, pod_templates, template

VERSION = "3.3.30"
CACHE = ROOT / ".cache" / "checkov"

ARGUED = {
    "CKV_K8S_11": "a limit would slow audio workers and vLLM down while the node idles; requests share it fairly",
    "CKV_K8S_15": "tags are pinned, and images have gigabytes: `Always` would tie each start to the registry",
    "CKV_K8S_35": "Ray's processes and PostgreSQL's image read secrets from variables",
    "CKV_K8S_43": "a digest can be given (`image.digest`); the default names what the operator has built",
}
"""Left everywhere."""

ARGUED_FOR = {
    ("CKV_K8S_40", "postgresql"): "the image's own user, 999, owns its files",
    ("CKV_K8S_40", "redis"): "the image's own user, 999, owns its files",
    ("CKV_K8S_8", "test"): "runs once and ends",
    ("CKV_K8S_9", "test"): "runs once and ends",
}
"""Left for one component."""


def checkov() -> Path:
    """The program, installed once. Fails if it cannot be had."""
    program = CACHE / VERSION / "bin" / "checkov"
    CACHE.mkdir(parents=True, exist_ok=True)
    uv = Path(sys.executable).with_name("uv")
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            python = ["--python", str(CACHE / VERSION / "bin" / "python")]
            for command in (
                [uv, "venv", "--quiet", CACHE / VERSION],
                [uv, "pip", "install", "--quiet", *python, f"checkov=={VERSION}"],
            ):
                done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.fail(f"checkov is needed to test the chart and could not be installed:\n{done.stderr}")
    return program


def test_checkov_finds_only_what_is_argued(helm: Path, tmp_path: Path) -> None:
    """Of all that the chart can make, Ray's pods too; and each argument is still needed."""
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
        each["metadata"]["namespace"] = "captions"  # where Helm is told to put them
    path = tmp_path / "chart.yaml"
    path.write_text(yaml.safe_dump_all([*manifests, *rays]))
    command = [
        checkov(),
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
    told = json.loads(done.stdout)
    assert told["summary"]["parsing_errors"] == 0
    assert told["summary"]["passed"] > 500
    found = {
        (each["check_id"], each["resource"].rpartition("-")[2].rpartition(".")[2]): each
        for each in told["results"]["failed_checks"]
    }
    left = [key for key in found if key[0] not in ARGUED and key not in ARGUED_FOR]
    assert left == [], [found[key]["check_name"] for key in left]
    assert {check for check, _ in found} >= ARGUED.keys()
    assert found.keys() >= ARGUED_FOR.keys()
