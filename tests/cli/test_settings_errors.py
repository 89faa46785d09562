"""Errors in settings: one line for each, with the remedy, and never with a secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.cli.settings_errors import SETTINGS_ERRORS, problems
from serving.config import Settings

SECRET = "hunter2-short"  # noqa: S105
"""Below the 16 characters that peppers and admin tokens need."""

COMMANDS = (["serve"], ["cluster"], ["admin"], ["tenants", "list"])


def problems_of(*flags: str) -> list[str]:
    """Return the lines for what these flags, and the environment, set wrongly."""
    with pytest.raises(SETTINGS_ERRORS) as raised:
        Settings.load(flags)
    return list(problems(raised.value))


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a subprocess."""
    captioner = Path(sys.executable).with_name("captioner")
    environment = os.environ | {"CAPTIONER_CONFIG": ""} | variables
    return subprocess.run(
        [captioner, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", ["key_pepper", "admin_token"])
def test_a_bad_secret_is_not_printed(command: list[str], name: str) -> None:
    """A secret that is too short is named by its setting alone, whatever command reads it; the exit status is 2."""
    ended = run(command, **{f"CAPTIONER_{name.upper()}": SECRET})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"captioner: {name}: must be a secret, 16 characters or more; "
        f"set --{name.replace('_', '-')} or CAPTIONER_{name.upper()}\n"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_secrets_stay_hidden_when_other_settings_are_wrong(command: list[str], tmp_path: Path) -> None:
    """Neither a wrong port nor an error of all settings together prints the API keys, the pepper or a token."""
    keys = {"CAPTIONER_API_KEYS": SECRET, "CAPTIONER_KEY_PEPPER": SECRET * 2, "CAPTIONER_METRICS_TOKEN": SECRET}
    data = {"CAPTIONER_DATA_DIR": str(tmp_path)}
    for wrong in ({"CAPTIONER_PORT": "http"}, {"CAPTIONER_ADMIN_PORT": "8100"}):
        ended = run(command, **keys, **data, **wrong)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert len(ended.stderr.splitlines()) == 1
        assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    "flags", [["--admin-tokn=" + SECRET], ["--admin-tokn", SECRET], ["--api-keys=a", SECRET]], ids=str
)
def test_a_mistyped_flag_does_not_print_its_value(flags: list[str]) -> None:
    """The value of an unknown flag may be a secret."""
    ended = run(["serve", *flags])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("captioner: ")
    assert len(ended.stderr.splitlines()) == 1
    assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prot=9"], "--prot: not a setting (did you mean --port?); `captioner settings` lists all settings"),
        (["--colour=red"], "--colour: not a setting; `captioner settings` lists all settings"),
        (["-p", "9"], "-p: not a setting; `captioner settings` lists all settings"),
        (["9000"], "command line: unexpected value without a flag; write --SETTING=VALUE"),
        (["--port"], "port: --port needs a value; it must be a whole number, 0 to 65535"),
        (["--config"], "config: --config needs a value; it must be a path"),
        (["--auth=no"], "auth: --auth takes no value; write --auth or --no-auth"),
        (["--port=http"], "port: must be a whole number, 0 to 65535, not 'http'; set --port or CAPTIONER_PORT"),
        (["--port=70000"], "port: must be a whole number, 0 to 65535, not '70000'; set --port or CAPTIONER_PORT"),
        (["--engine=foo"], "engine: must be one of vllm, fake, not 'foo'; set --engine or CAPTIONER_ENGINE"),
        (["--fetch-ports=1,x"],
         "fetch_ports: must be whole numbers separated by commas, not 'x'; set --fetch-ports or CAPTIONER_FETCH_PORTS"),
        (["--max-body-bytes=16 MB"],
         ("max_body_bytes: must be a size such as 10MiB or 10485760, 1KiB or more, not '16 MB'; "
          "set --max-body-bytes or CAPTIONER_MAX_BODY_BYTES")),
        (["--no-auth", "--host=0.0.0.0"],
         ("auth: can be switched off only on a loopback address, and host is 0.0.0.0; "
          "set host to 127.0.0.1 or leave auth on")),
        (["--min-frontends=9"], "min_frontends: 9 is above max_frontends 8; lower it or raise max_frontends"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_problem_is_one_line(flags: list[str], expected: str) -> None:
    """The line names the setting, the value and the remedy."""
    assert problems_of(*flags) == [expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f'{{"hf_token": "{SECRET}"}}',
         "engine_args: hf_token is set by the service; use the variable HF_TOKEN: a token is no setting"),
        (f'{{"--gpu-memory-utilization": "{SECRET}"}}',
         "engine_args: gpu_memory_utilization is set by the service; use gpu_memory_utilization"),
        (f'{{"tensor_parallel_size": "{SECRET}"}}',
         "engine_args: tensor_parallel_size is set by the service; use tensor_parallel"),
        ('{"enable_prefix_caching": true}',
         ("engine_args: enable_prefix_caching is set by the service; use nothing: it is off, so that no tenant sees "
          "from timing what another sent")),
        (f"{{{SECRET}", ('engine_args: must be a table, or JSON such as {"name": "value"}; set --engine-args or '
         "CAPTIONER_ENGINE_ARGS")),
        (f'["{SECRET}"]', ('engine_args: must be a table, or JSON such as {"name": "value"}; set --engine-args or '
         "CAPTIONER_ENGINE_ARGS")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["variable", "flag", "file", "secrets"])
def test_wrong_engine_arguments_show_no_value(
    value: str, expected: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument that the service sets is named with the setting to use; a value, perhaps a secret, is not shown."""
    flags = []
    match source:
        case "variable":
            monkeypatch.setenv("CAPTIONER_ENGINE_ARGS", value)
        case "flag":
            flags = [f"--engine-args={value}"]
        case "file":
            (tmp_path / "c.toml").write_text(f"engine_args = '{value}'")
            flags = [f"--config={tmp_path / 'c.toml'}"]
            monkeypatch.setenv("CAPTIONER_CONFIG", "")
        case _:
            (tmp_path / "captioner_engine_args").write_text(value)
            monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path))
    assert problems_of(*flags) == [expected]


def test_engine_arguments_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a file, or JSON in a flag or a variable, which come before the file."""
    file = tmp_path / "c.toml"
    file.write_text('port = 9\n[engine_args]\nkv_cache_dtype = "fp8"\n[engine_args.compilation_config]\nmode = 3\n')
    monkeypatch.setenv("CAPTIONER_CONFIG", str(file))
    assert Settings.load([]).engine_args == {"kv_cache_dtype": "fp8", "compilation_config": {"mode": 3}}
    monkeypatch.setenv("CAPTIONER_ENGINE_ARGS", '{"block_size": 64}')
    assert Settings.load([]).engine_args == {"block_size": 64}
    assert Settings.load(["--engine-args", '{"block_size": 32}']).engine_args == {"block_size": 32}


def test_vllm_refuses_engine_arguments_before_a_cluster_starts() -> None:
    """`captioner cluster` ends with status 2 and the argument's name, before Ray is imported."""
    ended = run(["cluster"], CAPTIONER_ENGINE_ARGS=f'{{"kv_cache_dtpe": "{SECRET}"}}')
    expected = (
        "captioner: engine_args: kv_cache_dtpe: vLLM 0.32.0 has no such argument (did you mean kv_cache_dtype?)\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", expected)


def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong value has a line."""
    monkeypatch.setenv("CAPTIONER_TRACE_RATIO", "2")
    monkeypatch.setenv("CAPTIONER_AUTH", "perhaps")
    assert problems_of() == [
        "auth: must be true or false, not 'perhaps'; set --auth or CAPTIONER_AUTH",
        "trace_ratio: must be a number, 0 to 1, not '2'; set --trace-ratio or CAPTIONER_TRACE_RATIO",
    ]


def test_a_wrong_secrets_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is shown only if the setting is no secret."""
    (tmp_path / "captioner_port").write_text("http\n")
    (tmp_path / "captioner_admin_token").write_text(SECRET)
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path))
    assert problems_of() == [
        "port: must be a whole number, 0 to 65535, not 'http'; set --port or CAPTIONER_PORT",
        "admin_token: must be a secret, 16 characters or more; set --admin-token or CAPTIONER_ADMIN_TOKEN",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 9", "prot: not a setting (did you mean port?); remove it from {path}"),
        (f'admin_tokn = "{SECRET}"', "admin_tokn: not a setting (did you mean admin_token?); remove it from {path}"),
        (f'[admin]\ntoken = "{SECRET}"', "admin: not a setting"),
        ("port = [9]", "port: must be a whole number, 0 to 65535, not [9]; set --port or CAPTIONER_PORT"),
        (f'api_keys = ["{SECRET}", 5]',
         "api_keys: must be secrets separated by commas; set --api-keys or CAPTIONER_API_KEYS"),
        (f'admin_token = ["{SECRET}"]',
         "admin_token: must be a secret, 16 characters or more; set --admin-token or CAPTIONER_ADMIN_TOKEN"),
        (f'admin_token = "{SECRET}', "config: {path} is not a TOML file: "),
    ],
    ids=lambda value: value.split(" ")[0],
)  # fmt: skip
def test_a_wrong_file(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown keys are named with the file; values of secrets, and of keys that may be secrets, are not shown."""
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    path = tmp_path / "file.toml"
    path.write_text(text)
    (line,) = problems_of("--config", str(path))
    assert line.startswith(expected.format(path=path))
    assert SECRET not in line


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a file that is not text, and a missing directory of secrets have a line each."""
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    assert problems_of(f"--config={tmp_path}/none.toml") == [f"config: the file {tmp_path}/none.toml does not exist"]
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in problems_of(f"--config={tmp_path}/binary.toml")[0]
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path / "none"))
    assert problems_of() == [f"CAPTIONER_SECRETS_DIR: the directory {tmp_path}/none does not exist"]


def test_pydantics_own_message_has_no_input() -> None:
    """A `ValidationError` that is logged elsewhere shows no value, for it may be a secret."""
    with pytest.raises(ValidationError) as raised:
        Settings(admin_token=SECRET, port=-7)
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(raised.value)
    assert "-7" not in str(raised.value)
