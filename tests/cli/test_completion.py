"""Completion of commands, verbs and options in a shell."""

from __future__ import annotations

import subprocess

import pytest

from serving.cli import completion
from serving.cli import main as cli


def completed(line: str) -> list[str]:
    """Return what bash proposes at the end of a command line."""
    words = line.rstrip() + (" ''" if line.endswith(" ") else "")
    script = (
        f"{completion._bash()}\nCOMP_WORDS=({words})\n"
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_captioner\nprintf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail"], input=script, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("captioner ca", ["caption"]),
        ("captioner caption --fo", ["--format"]),
        ("captioner caption clip.wav --jo", ["--jobs"]),
        ("captioner tenants ", ["list", "show", "create", "set", "suspend", "activate"]),
        ("captioner tenants set acme --pl", ["--plan"]),
        ("captioner serve --max-url", ["--max-url-bytes"]),
        ("captioner doctor --js", ["--json"]),
        ("captioner usage --si", ["--since"]),
        ("captioner completion z", ["zsh"]),
        ("captioner fly --x", []),
        ("captioner caption ./cl", []),
    ],
)
def test_bash_proposes_the_words_of_this_version(line: str, proposed: list[str]) -> None:
    """The script proposes what fits; file names are left to bash."""
    assert completed(line) == proposed


def test_every_command_is_proposed() -> None:
    """No command of the dispatch table is missing, and each has its words."""
    words = completion.words()
    assert set(words[""]) >= set(cli._COMMANDS)
    assert set(cli._COMMANDS) <= {name.partition(" ")[0] for name in words}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell has a script that names commands and options; another shell is a line on standard error."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "tenants" in script
    assert "max-url-bytes" in script
    assert cli.main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "captioner: completion: no script for 'tcsh'; choose from bash, zsh, fish\n"
