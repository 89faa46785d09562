"""The list of settings, and the example file made from it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving.cli import settings_help
from serving.cli.main import main
from serving.cli.setting_headings import GROUPS, Group
from serving.config import Settings

EXAMPLE = Path(__file__).parents[2] / "deploy" / "settings.example.toml"
NAMES = list(Settings.model_fields)


def entry(name: str) -> str:
    """Return the lines of one setting in the help, joined."""
    (found,) = [
        part for part in settings_help.help_text("serve").split("\n\n") if f" {settings_help.variable(name)}\n" in part
    ]
    return " ".join(found.split())


def test_each_setting_is_in_one_group() -> None:
    """No setting is missing from the groups, and none is in two."""
    grouped = [name for group in GROUPS for name in group.fields.model_fields]
    assert sorted(grouped) == sorted(NAMES)
    assert list(settings_help.FIELDS) == NAMES == grouped


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_setting_is_for_people(name: str) -> None:
    """The flag is real, and the text has a default or what unset means, but nothing of Python."""
    text = entry(name)
    assert text.startswith(settings_help.flag(name))
    assert ("Default: " in text) != ("Unset: " in text)
    assert not re.search(r"None|lambda|Posix|Settings|\bfunction\b|/serving/", text)
    if Settings.model_fields[name].default is None:
        assert "Unset: " in text


@pytest.mark.parametrize(
    "text",
    [
        "--port NUMBER TCP port to listen on; 0 picks a free one. Range: 0 to 65535. Default: 8000.",
        "--max-body-bytes SIZE Largest request body in bytes. Range: 1KiB or more. Default: 16MiB.",
        "--vllm-metrics, --no-vllm-metrics vLLM's metrics in addition to the service's. Default: on.",
        "--log-level debug|info|warning|error Lowest level that is logged. Default: info.",
        "--fetch-ports NUMBER,… TCP ports that downloads may use. Default: 80,443,8000,8080,8443.",
    ],
    ids=lambda text: text[:9],
)
def test_help_shows_values_as_people_write_them(text: str) -> None:
    """Sizes have units, choices and lists are spelled out, and the true default is given."""
    name = text.split(maxsplit=1)[0][2:].removesuffix(",").replace("-", "_")
    assert entry(name).replace(f" {settings_help.variable(name)}", "") == text


@pytest.mark.parametrize("command", ["serve", "cluster", "admin", "settings"])
def test_every_command_with_settings_prints_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists the groups with an example each, whatever other flags are given, and exits with 0."""
    assert main([command, *(["--port=x"] if command != "settings" else []), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: captioner {command} [")
    for group in GROUPS:
        assert f"\n{group.title}: " in out
        assert f"\n  Example: {group.example}\n" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_the_example_of_a_group_works(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables and flags load, and set something of the group."""
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    words = shlex.split(group.example)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, command, *flags = words
    assert program == "captioner"
    assert command in {"serve", "cluster"}
    assert Settings.load(flags).model_fields_set & set(group.fields.model_fields)


def test_settings_alone_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    """`captioner settings` prints the same list as `--help`; other words are refused."""
    assert main(["settings"]) == 0
    assert capsys.readouterr().out == settings_help.help_text("settings") + "\n"
    assert main(["settings", "--yaml"]) == 2
    assert capsys.readouterr().err == "captioner: settings: takes only --toml\n"


def test_the_example_file_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """`deploy/settings.example.toml` is what `captioner settings --toml` prints: make it with that command."""
    assert main(["settings", "--toml"]) == 0
    assert capsys.readouterr().out == EXAMPLE.read_text()


def uncommented(text: str) -> str:
    """Return the file with every setting set."""
    return re.sub(r"(?m)^# (?=\w+ = )", "", text)


def test_the_example_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set as it is; uncommented it has every setting, at its default where it has one."""
    text = EXAMPLE.read_text()
    assert tomllib.loads(text) == {}
    path = tmp_path / "all.toml"
    path.write_text(uncommented(text))
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    settings = Settings.load(["--config", str(path)])
    assert set(tomllib.loads(path.read_text())) == set(NAMES) - {"config"}
    computed = {"config", "model", "audio_workers", "data_dir", "engine_args", "log_format"}
    for name in set(NAMES) - computed:
        if (default := Settings.model_fields[name].default) is not None:
            assert getattr(settings, name) == default, name


def test_the_example_file_has_no_usable_secret() -> None:
    """Secrets are placeholders in angle brackets, addresses have no password, and lists of secrets are empty."""
    for name, value in tomllib.loads(uncommented(EXAMPLE.read_text())).items():
        if settings_help.is_secret(name):
            assert not value or value.startswith("<") or re.fullmatch(r"\w+://(\w+@)?\w+(:\d+)?/\w+", value), name


def test_a_reader_that_stops_early_ends_the_command_quietly() -> None:
    """`captioner serve --help | head -1` prints one line and no traceback."""
    captioner = Path(sys.executable).with_name("captioner")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{captioner} serve --help | head -n 1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
