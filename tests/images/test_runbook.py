"""The runbook: complete, and consistent with the rest of the repository."""

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
    "Repair the disk of the ledger",
    "Find the cause of dying downloads",
    "Lose a node",
    "Lose the head",
    "Change the model",
    "Uninstall",
)
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
BLOCKS = [match[1] for match in re.finditer(r"^ *```sh\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)]


def test_every_task_is_present_in_order() -> None:
    """Sections and table of contents are exactly the tasks."""
    assert tuple(SECTIONS) == TASKS
    assert re.findall(r"\[([^]]*)\]\(#", TEXT.partition("\n## ")[0]) == list(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_complete(task: str) -> None:
    """It says when to do it, which commands to run, how to check, and what users see."""
    section = SECTIONS[task]
    for word in ("**When", "**Check", "sers see**"):
        assert word in section or (task == "Roll back" and "**Check and users**" in section), word
    assert "```sh" in section


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_commands_are_shell(number: int) -> None:
    """Each block parses as shell."""
    subprocess.run(["bash", "-n"], input=BLOCKS[number], text=True, check=True)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_is_for_one_platform(number: int) -> None:
    """No block has commands of two platforms, and none defines a function twice: each can be pasted as it is."""
    block = BLOCKS[number]
    platforms = (r"\$K\b|\bkubectl\b|^helm ", r"\bdocker compose\b", r"\bsystemctl\b|\bjournalctl\b")
    assert sum(bool(re.search(pattern, block, re.MULTILINE)) for pattern in platforms) <= 1
    functions = re.findall(r"^([a-z]+)\(\)", block, re.MULTILINE)
    assert len(functions) == len(set(functions))


def test_every_platform_has_the_functions_that_pages_use() -> None:
    """Each platform's block defines `captioner` and `logs` once, and Prometheus' address."""
    for block in BLOCKS[:3]:
        assert {"captioner", "logs"} <= set(re.findall(r"^([a-z]+)\(\)", block, re.MULTILINE))
        assert "PROMETHEUS=http://" in block
    assert not any(re.search(r"^(captioner|logs)\(\)", block, re.MULTILINE) for block in BLOCKS[3:])


def test_links_lead_somewhere() -> None:
    """Each link is to a file of the repository, or to a heading of the page or file."""
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
    """Every alert it names is defined."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "captioner.alerts.yml").read_text())
    known = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    named = set(re.findall(r"`(Captioner[A-Za-z]+)`", TEXT))
    assert named
    assert named <= known


def test_metrics_exist() -> None:
    """Every metric it names is in the source."""
    files = [*(ROOT / "serving").rglob("*.py"), *(ROOT / "deploy" / "grafana").glob("*.py")]
    source = "".join(path.read_text() for path in files)
    named = set(re.findall(r"`(captioner_[a-z_]+)`", TEXT)) - {"captioner_state", "captioner_postgres"}  # volumes
    assert named
    assert {name for name in named if not re.search(rf"\b{name}\b", source)} == set()


def test_volumes_exist() -> None:
    """The volumes it names are those of the compose project."""
    project = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    assert {"state", "postgres"} <= set(project["volumes"])
    assert project["name"] == "captioner"
