"""A short fuzzing run of each target, and everything that longer runs have found. `make harden` tries 10⁶ inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.hardening import fuzz
from tests.hardening.targets import TARGETS, Target

if TYPE_CHECKING:
    from pathlib import Path

FOUND = sorted(path for path in fuzz.CORPUS.rglob("*") if path.is_file())
SHORT_RUN = {"audio": 60, "journal": 300}


@pytest.mark.parametrize("path", FOUND, ids=[f"{path.parent.name}-{path.name}" for path in FOUND])
def test_what_was_found_stays_mended(path: Path) -> None:
    """An input that once broke a promise keeps it now."""
    assert fuzz.fault(path.parent.name, path.read_bytes()) == ""


@pytest.mark.parametrize("target", TARGETS)
def test_intact_inputs_are_accepted(target: str) -> None:
    """The inputs from which others are made hold every promise: the fuzzer starts where the parsers go deep."""
    for seed in TARGETS[target].seeds():
        assert fuzz.fault(target, seed) == ""


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run_finds_nothing(target: str) -> None:
    """Some hundred damaged inputs hold every promise, none takes two seconds."""
    result = fuzz.run(target, range(SHORT_RUN.get(target, 1500)))
    assert result.faults == {}


def test_a_broken_promise_is_found() -> None:
    """A parser that fails for some inputs is noticed, with the number from which such an input is made again."""
    target = TARGETS["openai"]

    def check(data: bytes) -> None:
        if data.endswith(b"}"):
            raise ZeroDivisionError

    broken = Target("openai", check, target.seeds, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "openai", broken)
        result = fuzz.run("openai", range(50))
    assert 0 < len(result.faults) <= 50
    number, problem = next(iter(result.faults.items()))
    assert "ZeroDivisionError" in problem
    assert fuzz.made("openai", number, target.seeds()).endswith(b"}")
