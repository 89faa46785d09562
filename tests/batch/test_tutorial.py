"""OpenAI's batch tutorial with unmodified clients, and several clients that poll at the same time."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.batch.served import jsonl, line
from tests.sdk.environments import node_environment, python_environment
from tests.support.service import RunningService
from tests.support.wire import data_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
KEY = "sk-of-the-settings"
MIXED = [
    *(line(f"good-{number}") for number in range(6)),
    line("bad", data_url(b"no audio")),
    *(line(f"late-{number}") for number in range(3)),
]


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with a key of the settings."""
    with RunningService("--engine=fake", f"--api-keys={KEY}", "--fake-tpot-s=0.002") as running:
        yield running


def _tutorial(command: list[str], directory: Path, **variables: str) -> dict[str, Any]:
    (directory / "batchinput.jsonl").write_bytes(jsonl(MIXED))
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | variables
    ran = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)  # noqa: PLW1510
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def _check(answer: dict[str, Any]) -> None:
    batch = answer["batch"]
    assert (batch["status"], batch["metadata"]) == ("completed", {"description": "nightly eval job"})
    assert batch["request_counts"] == {"total": 10, "completed": 9, "failed": 1}
    assert sorted(each["custom_id"] for each in answer["lines"]) == sorted(
        each["custom_id"] for each in MIXED if each["custom_id"] != "bad"
    )
    assert all(each["response"]["body"]["choices"][0]["message"]["content"] for each in answer["lines"])
    assert batch["id"] in answer["listed"]
    assert {"batch", "batch_output"} <= {*answer["files"]}
    assert answer["deleted"] is True


@pytest.mark.parametrize("version", ["openai-3.54.0", "openai-1.52.2"])
def test_the_tutorial_in_python(service: RunningService, tmp_path: Path, version: str) -> None:
    """The current client and one that is two years old complete the tutorial with only the base URL changed."""
    python = python_environment(version) / "bin" / "python"
    _check(_tutorial([str(python), str(HERE / "tutorial.py"), f"{service.url}/v1", KEY], tmp_path))


@pytest.mark.parametrize("version", ["openai-npm-7.57.0", "openai-npm-4.104.0"])
def test_the_tutorial_in_node(service: RunningService, tmp_path: Path, version: str) -> None:
    """The Node clients complete it, too, on the path that Bailian's users have."""
    home = node_environment(version)
    shutil.copy(HERE / "tutorial.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(home / "node_modules")
    _check(_tutorial(["node", "tutorial.mjs", f"{service.url}/compatible-mode/v1", KEY], tmp_path))


def test_clients_that_poll_are_shown_one_batch(service: RunningService, tmp_path: Path) -> None:
    """Eight clients run batches and poll them at the same time; each gets its own lines, once."""
    python = python_environment("openai-3.54.0") / "bin" / "python"
    command = [str(python), str(HERE / "tutorial.py"), f"{service.url}/v1", KEY]
    directories = [tmp_path / str(number) for number in range(8)]
    for directory in directories:
        directory.mkdir()
    before = service.metric("captioner_batch_lines_total", outcome="completed")
    run: Callable[[Path], dict[str, Any]] = lambda directory: _tutorial(command, directory)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for answer in pool.map(run, directories):
            _check(answer)
    assert service.metric("captioner_batch_lines_total", outcome="completed") - before == 8 * 9
