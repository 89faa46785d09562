"""The chart as the CI example publishes it: its steps, unchanged, with the real Helm and a substitute for Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.chart.rendering import CHART, ROOT

if TYPE_CHECKING:
    from pathlib import Path

WORKFLOW = yaml.safe_load((ROOT / "deploy" / "ci" / "example.yml").read_text())
STEPS = {step.get("name"): step for step in WORKFLOW["jobs"]["chart"]["steps"]}
DIGEST = "sha256:" + "5" * 64

DOCKER = """#!/usr/bin/env bash
# docker run … HELM_IMAGE ARGUMENTS runs Helm here; a push and a signature are written to the log.
set -euo pipefail
echo "$@" >> LOG
case $1 in
login) cat > /dev/null; exit ;;
run) ;;
*) exit 64 ;;
esac
while [ "$1" != HELM_IMAGE ]; do
  [ "$1" != COSIGN_IMAGE ] || exit 0
  shift
done
shift
if [ "$1" = push ]; then
  test -f "${2#/}"
  printf 'Pushed: example/charts/captioner:0.2.0\\nDigest: DIGEST\\n' >&2
else
  exec HELM_PROGRAM "$@"
fi
"""


@pytest.fixture
def published(helm: Path, tmp_path: Path) -> Path:
    """Directory in which the steps of the job ran, as on a release."""
    shutil.copytree(CHART, tmp_path / "helm" / "captioner")
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    replaced = {
        "LOG": str(tmp_path / "log"),
        "HELM_IMAGE": WORKFLOW["env"]["HELM"],
        "COSIGN_IMAGE": WORKFLOW["env"]["COSIGN"],
        "DIGEST": DIGEST,
        "HELM_PROGRAM": str(helm),
    }
    program.write_text(re.sub("|".join(replaced), lambda found: replaced[found[0]], DOCKER))
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "REGISTRY": "registry.example.com:5000/team",
        "REGISTRY_TOKEN": "t",
        **{name: WORKFLOW["env"][name] for name in ("HELM", "COSIGN")},
    }
    for step in STEPS.values():
        if "run" in step:
            script = f"set -eo pipefail\n{step['run']}"
            done = subprocess.run(
                ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path


def test_the_published_chart_names_the_published_images(published: Path, helm: Path) -> None:
    """It renders without `image.registry`, and its images are in the registry; profiles are in the package."""
    (package,) = (published / "out").glob("captioner-*.tgz")
    command = [
        str(helm),
        "template",
        "x",
        str(package),
        "--set=objectStore.url=s3://captions",
        "--set=image.frontendTag=f",
    ]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    images = set(re.findall(r'^ *image: "(.*)"$', rendered, re.MULTILINE))
    ours = {image for image in images if "@sha256:" not in image}
    assert ours == {f"registry.example.com:5000/team/captioner:{tag}" for tag in ("0.2.0-cuda", "f")}
    subprocess.run(["tar", "--extract", "--file", package, "--directory", published], check=True)
    assert (published / "captioner" / "profiles" / "1xh100-80g.yaml").is_file()
    assert not (published / "captioner" / "ci").exists()
    assert "registry.example.com:5000/team/captioner:0.2.0-cuda" in (published / "out" / "images.txt").read_text()


def test_the_published_chart_is_signed_by_digest(published: Path) -> None:
    """It is pushed to the registry's `charts`, and what is signed is the digest that the push has reported."""
    calls = (published / "log").read_text().splitlines()
    (push,) = [call for call in calls if " push " in call]
    assert push.endswith(
        "push /out/captioner-0.2.0.tgz --registry-config /.docker/config.json oci://registry.example.com:5000/team/charts"
    )
    assert calls[-1].endswith(f"sign --yes registry.example.com:5000/team/charts/captioner@{DIGEST}")
