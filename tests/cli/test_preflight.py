"""Problems of a start, each one line before anything is loaded; unknown variables; the stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.cli.main import main
from serving.cli.preflight import warn_of_unknown_variables
from serving.config import Settings
from tests.support.service import RunningService

SAMPLE = Path(__file__).parents[2] / "serving" / "embedded" / "sample.mp3"
CAPTIONER = Path(sys.executable).with_name("captioner")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the state's directory `data` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize("command", ["serve", "cluster"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=/gone"], "model: the directory /gone does not exist; set --model or CAPTIONER_MODEL"),
        (["--model=./gone"], "model: the directory ./gone does not exist; set --model or CAPTIONER_MODEL"),
        (["--model=a/b/c"], "model: the directory a/b/c does not exist; set --model or CAPTIONER_MODEL"),
        (["--model=empty"],
         "model: the directory empty has no config.json, so it is no checkpoint; set --model or CAPTIONER_MODEL"),
        (["--model=file"], "model: the directory file does not exist; set --model or CAPTIONER_MODEL"),
        (["--data-dir=file"],
         "data_dir: cannot write in file: File exists (file); set --data-dir or CAPTIONER_DATA_DIR"),
        (["--data-dir=/proc/gone"],
         ("data_dir: cannot write in /proc/gone: No such file or directory (/proc/gone); "
          "set --data-dir or CAPTIONER_DATA_DIR")),
        (["--host=192.0.2.1"],
         "host: cannot listen on 192.0.2.1: Cannot assign requested address; set it to an address of this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_start_that_must_fail_is_one_line(
    command: str, flags: list[str], message: str, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the setting, the value and the remedy; the exit status is 2."""
    (fresh / "empty").mkdir()
    (fresh / "file").touch()
    assert main([command, *flags]) == 2
    assert capsys.readouterr() == ("", f"captioner: {message}\n")


@pytest.mark.parametrize("flag", ["port", "admin-port"])
@pytest.mark.parametrize("command", ["serve", "cluster"])
def test_a_port_in_use_is_one_line(
    flag: str, command: str, fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not loaded for a port that another program has."""
    monkeypatch.setenv("CAPTIONER_ADMIN_TOKEN", "0123456789abcdef")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main([command, *({"--port=0"} if flag == "admin-port" else ()), f"--{flag}={port}"]) == 2
    variable = f"CAPTIONER_{flag.upper().replace('-', '_')}"
    assert capsys.readouterr().err == (
        f"captioner: {flag.replace('-', '_')}: another program listens on 127.0.0.1:{port}; "
        f"stop it, or set --{flag} or {variable}\n"
    )


def test_a_broken_file_is_named_with_its_line(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line and column of the first error are those of the file."""
    (fresh / "c.toml").write_text("port = 9\nhost = 127.0.0.1\n")
    assert main(["serve", "--config=c.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("captioner: config: c.toml is not a TOML file: ")
    assert error.endswith("(at line 2, column 13)\n")
    del os.environ["CAPTIONER_CONFIG"]


def test_unknown_variables_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped variable has no effect, which a line says; those of Kubernetes and of the client are left out."""
    names = ["CAPTIONER_PROT", "CAPTIONER_APIKEYS", "CAPTIONER_XYZ", "CAPTIONER_PORT", "CAPTIONER_URL", "HOME"]
    names += ["CAPTIONER_SERVICE_HOST", "CAPTIONER_PORT_8000_TCP_ADDR", "CAPTIONER_REDIS_SERVICE_PORT_METRICS"]
    warn_of_unknown_variables(names)
    rest = "and has no effect; `captioner settings` lists all"
    assert capsys.readouterr().err.splitlines() == [
        f"captioner: CAPTIONER_APIKEYS is not a setting (did you mean CAPTIONER_API_KEYS?) {rest}",
        f"captioner: CAPTIONER_PROT is not a setting (did you mean CAPTIONER_PORT?) {rest}",
        f"captioner: CAPTIONER_XYZ is not a setting {rest}",
    ]


def test_logs_are_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person reads text; a file or a pipe gets JSON."""
    for terminal, expected in ((True, "text"), (False, "json")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert Settings().log_format == expected


def test_a_service_without_keys_warns() -> None:
    """Every request would be refused; with a key, or without authentication, there is no warning."""
    warning = "nobody has a key, so every request is refused: `captioner tenants create`, then `keys create`"
    with RunningService("--engine=fake", "--auth") as service:
        _wait_for(service, warning)
    with RunningService("--engine=fake", "--api-keys=sk-1") as service:
        assert warning not in service.log()


def test_a_second_interrupt_ends_running_captions() -> None:
    """The first one waits for running captions and says so; the second ends them, in order: the exit status is 0."""
    flags = ("--engine=fake", "--fake-tpot-s=0.5", "--fake-tokens=100", "--log-format=text")
    with RunningService(*flags) as service:
        command = [str(CAPTIONER), "caption", "--url", service.url, str(SAMPLE)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.read(4) == "This"
            service.process.send_signal(signal.SIGINT)
            _wait_for(service, "stopping, finishing 1 captions; press Ctrl-C again to end them now")
            service.process.send_signal(signal.SIGINT)
            assert service.process.wait(20) == 0
            assert client.wait(20) == 1
        log = service.log()
    assert "requests cancelled, a second signal came count=1" in log
    assert "Traceback" not in log
    assert re.search(r"outcome=cancelled", log)


def _wait_for(service: RunningService, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in service.log():
        assert time.monotonic() < deadline, service.log()
        time.sleep(0.05)
