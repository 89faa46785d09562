"""The runbook: complete, and true where the rest of the tree can tell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PATH = ROOT / "deploy" / "runbook.md"
TEXT = PATH.read_text()
TASKS = (
    "Install",
    "Upgrade",
    "Roll back",
    "Scale",
    "Rotate keys",
    "Back up the ledger",
    "Restore the ledger",
    "Lose a node",
    "Lose the head",
    "Change the model",
)
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
BLOCKS = [match[1] for match in re.finditer(r"^ *```sh\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)]


def test_every_task_is_there_in_order() -> None:
    """No more and no less, as the list of contents at its head says."""
    assert tuple(SECTIONS) == TASKS
    assert re.findall(r"\[([^]]*)\]\(#", TEXT.partition("\n## ")[0]) == list(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_what_one_needs_to_know(task: str) -> None:
    """When to do it, what to type, how to check, what users see."""
    section = SECTIONS[task]
    for word in ("**When", "**Check", "sers see**"):
        assert word in section or (task == "Roll back" and "**Check and users**" in section), word
    assert "```sh" in section


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_commands_are_shell(number: int) -> None:
    """Each block is what a shell can read."""
    subprocess.run(["bash", "-n"], input=BLOCKS[number], text=True, check=True)


def test_links_lead_somewhere() -> None:
    """To a file of this tree, or to a heading of this page or of that file."""
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        file, _, anchor = link.partition("#")
        path = PATH.parent / file if file else PATH
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {heading.strip().lower().replace(" ", "-") for heading in headings}, link


def test_alerts_exist() -> None:
    """Those on which it says to act do fire."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "captioner.alerts.yml").read_text())
    known = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    named = set(re.findall(r"`(Captioner[A-Za-z]+)`", TEXT))
    assert named
    assert named <= known


def test_metrics_exist() -> None:
    """Those that it says to look at are the service's."""
    files = [*(ROOT / "serving").rglob("*.py"), *(ROOT / "deploy" / "grafana").glob("*.py")]
    source = "".join(path.read_text() for path in files)
    named = set(re.findall(r"`(captioner_[a-z_]+)`", TEXT)) - {"captioner_state", "captioner_postgres"}  # volumes
    assert named
    assert {name for name in named if not re.search(rf"\b{name}\b", source)} == set()


def test_volumes_exist() -> None:
    """Those of compose that it says to keep are compose's."""
    project = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    assert {"state", "postgres"} <= set(project["volumes"])
    assert project["name"] == "captioner"
