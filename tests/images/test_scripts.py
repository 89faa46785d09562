"""Scripts and the CI example: lint, pinned versions, dry runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
SCRIPTS = sorted((ROOT / "deploy").rglob("*.sh"))
UP = ROOT / "deploy" / "kind" / "up.sh"
EXAMPLE = ROOT / "deploy" / "ci" / "example.yml"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    """It finds nothing in any script of `deploy/`."""
    shell = ["--shell=sh"] if path.name == "profile.sh" else []
    subprocess.run([PROGRAMS / "shellcheck", *shell, path], check=True)


def planned(*arguments: str, **variables: str) -> list[list[str]]:
    """Return the commands that `up.sh --dry-run` prints."""
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run([UP, "--dry-run", *arguments], env=environment, check=True, capture_output=True, text=True)
    return [line[2:].split() for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_kind_prints_its_commands() -> None:
    """The order is: build the image, create the cluster, load the image, install operator and chart, wait, test."""
    commands = planned()
    assert [command[:2] for command in commands] == [
        ["docker", "build"],
        ["kind", "create"],
        ["kind", "load"],
        ["helm", "upgrade"],
        ["helm", "upgrade"],
        ["kubectl", "--context"],
        ["helm", "test"],
    ]
    for command in commands[3:]:
        assert "kind-captioner" in command, "another cluster would be changed"
    operator, chart = commands[3], commands[4]
    assert re.fullmatch(r"\d+\.\d+\.\d+", operator[operator.index("--version") + 1])
    assert "helm/captioner/profiles/cpu-embedded.yaml" in chart


def test_kind_uses_one_image_throughout() -> None:
    """The built image is loaded and passed to the chart."""
    build, _, load, _, chart, *_ = planned(IMAGE="somewhere/captioner:mine")
    assert build[build.index("-t") + 1] == load[load.index("docker-image") + 1] == "somewhere/captioner:mine"
    assert {"image.repository=somewhere/captioner", "image.tag=mine"} <= set(chart)


@pytest.mark.parametrize("failing", ["docker", "kind", "helm", "kubectl"])
def test_kind_stops_at_the_first_failure(tmp_path: Path, failing: str) -> None:
    """With substitutes for the four programs, no command runs after one has failed."""
    log = tmp_path / "log"
    for program in ("docker", "kind", "helm", "kubectl"):
        path = tmp_path / program
        ending = "exit 1" if program == failing else "exit 0"
        path.write_text(f'#!/bin/sh\necho {program} "$@" >> {log}\n{ending}\n')
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([UP], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    calls = log.read_text().splitlines()
    queries = ("docker image inspect", "kind get clusters")
    changes = [call for call in calls if not call.startswith(queries)]
    assert changes[-1].startswith(failing)
    assert len([call for call in changes if call.startswith(failing)]) == 1


def test_kind_names_a_missing_program(tmp_path: Path) -> None:
    """A missing program is named before any command runs."""
    for program in ("bash", "dirname", "sed"):
        found = shutil.which(program)
        assert found
        (tmp_path / program).symlink_to(found)
    done = subprocess.run([UP], env={"PATH": str(tmp_path)}, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "missing: docker\n"


def test_the_ci_example_is_valid() -> None:
    """It matches the schema of GitHub's workflows; expressions are not evaluated."""
    subprocess.run([PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", EXAMPLE], check=True)


def test_the_ci_example_is_pinned_with_minimal_permissions() -> None:
    """Actions are pinned by commit, tools by version; only signing has more than read permission."""
    workflow = yaml.safe_load(EXAMPLE.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert set(job.get("permissions", {})) <= {"contents", "id-token"}, name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    for tool in ("SYFT", "GRYPE", "COSIGN", "HELM"):
        assert re.search(r":v?\d+\.\d+\.\d+", workflow["env"][tool])


def test_the_ci_example_tests_scans_and_signs() -> None:
    """Tests run first; each image is started, listed, scanned with a failing threshold, and signed only on release."""
    jobs = yaml.safe_load(EXAMPLE.read_text())["jobs"]
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["make test"]
    assert jobs["image"]["needs"] == "test"
    assert set(jobs["image"]["strategy"]["matrix"]["build"]) == {"cpu", "cuda", "frontend"}
    steps = {step.get("name", step.get("uses")): step for step in jobs["image"]["steps"]}
    assert "--fail-on high" in steps["Scan the image"]["run"]
    assert "spdx-json" in steps["List the contents"]["run"]
    assert steps["Push, sign, attest"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    for step in [*jobs["image"]["steps"], *jobs["chart"]["steps"]]:
        if "run" in step:  # each step is a shell script
            script = re.sub(r"\$\{\{.*?\}\}", "X", step["run"])
            subprocess.run([PROGRAMS / "shellcheck", "--shell=bash", "-"], input=script, text=True, check=True)
    assert not any("push" in step.get("run", "") for name, step in steps.items() if name != "Push, sign, attest")
