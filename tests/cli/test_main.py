"""Dispatch of commands."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from serving.cli import main as cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`version` prints the version of the package."""
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{version('captioner')}\n"


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]], ids=str)
def test_usage_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The usage has each command of the dispatch table."""
    assert cli.main(words) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in cli._COMMANDS)


def test_an_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the command, and the one that was meant."""
    assert cli.main(["sreve"]) == 2
    assert cli.main(["fly"]) == 2
    assert capsys.readouterr() == (
        "",
        (
            "captioner: there is no command 'sreve' (did you mean serve?); `captioner --help` lists them\n"
            "captioner: there is no command 'fly'; `captioner --help` lists them\n"
        ),
    )
