"""deploy/systemd: the unit is valid, hardened, and agrees with the settings; the settings load; the log is bounded."""

from __future__ import annotations

import re
import shutil
import subprocess
from configparser import RawConfigParser
from typing import TYPE_CHECKING

import pytest

from serving.config import Settings
from tests.support.language import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DIRECTORY = ROOT / "deploy" / "systemd"
UNIT = (DIRECTORY / "captioner.service").read_text()
README = (DIRECTORY / "README.md").read_text()
ANALYZE = shutil.which("systemd-analyze")
analyzed = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


class _Unit(RawConfigParser):
    """A unit's sections; a directive that is repeated has its last value here."""

    def __init__(self, text: str) -> None:
        super().__init__(strict=False, delimiters=("=",), interpolation=None)
        self.read_string(text)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


SERVICE = _Unit(UNIT)["Service"]


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `systemd-analyze`."""
    assert ANALYZE
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, check=False, timeout=60)


@analyzed
@pytest.mark.parametrize("drop_ins", [(), ("gpu.conf",), ("log-file.conf",)], ids=["unit", "gpu", "log-file"])
def test_systemd_accepts_the_unit(tmp_path: Path, drop_ins: tuple[str, ...]) -> None:
    """Every directive is known, with and without each drop-in."""
    program = re.search(r"^ExecStart=(\S+)", UNIT, re.MULTILINE)
    assert program
    (tmp_path / "captioner.service").write_text(UNIT.replace(program[1], "/bin/true"))
    (tmp_path / "captioner.service.d").mkdir()
    for name in drop_ins:
        shutil.copy(DIRECTORY / name, tmp_path / "captioner.service.d")
    done = analyze("verify", str(tmp_path / "captioner.service"))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@analyzed
def test_the_unit_is_hardened() -> None:
    """The rating of the exposure by systemd (0 is none, 10 all) is at most 2."""
    done = analyze("security", "--offline=true", str(DIRECTORY / "captioner.service"))
    rating = re.search(r"exposure level for captioner.service: ([\d.]+)", done.stdout)
    assert rating, done.stdout + done.stderr
    assert float(rating[1]) <= 2


def test_the_unit_agrees_with_the_service() -> None:
    """It waits longer than a graceful stop, signals the service alone, and leaves dead workers to it."""
    assert float(SERVICE["TimeoutStopSec"].removesuffix("s")) > Settings().shutdown_grace_s
    assert (SERVICE["KillMode"], SERVICE["KillSignal"], SERVICE["OOMPolicy"]) == ("mixed", "SIGTERM", "continue")
    assert int(SERVICE["LimitNOFILE"]) > 2304  # what the doctor wants for the default of max_concurrent_requests
    assert SERVICE["RestartPreventExitStatus"] == "2"  # refused settings
    # The first stops compiled kernels, the second hides audio workers, which are not dumpable, from the service.
    assert not {"MemoryDenyWriteExecute", "ProtectProc"} & set(SERVICE)
    for call in ("seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"):
        assert re.search(rf"^SystemCallFilter=.*\b{call}\b", UNIT, re.MULTILINE)
    assert SERVICE["ExecStart"].endswith(" serve --config /etc/captioner/captioner.toml")


def test_the_settings_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has only settings that exist; state is in the unit's state directory."""
    for name in ("CAPTIONER_SECRETS_DIR", "CAPTIONER_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    settings = Settings.load([f"--config={DIRECTORY / 'captioner.toml'}"])
    assert (settings.host, settings.port, settings.log_format) == ("127.0.0.1", 8000, "json")
    assert str(settings.data_dir) == f"/var/lib/{SERVICE['StateDirectory']}"
    assert settings.public_url == "https://captions.example.com"


def test_the_log_is_bounded_and_complete() -> None:
    """The journal has a size and an age, and drops no line; the file is cut in place, and its name is the drop-in's."""
    assert SERVICE["LogNamespace"] == "captioner"
    assert SERVICE["LogRateLimitIntervalSec"] == "0"
    journal = _Unit((DIRECTORY / "journald@captioner.conf").read_text())["Journal"]
    assert (journal["SystemMaxUse"], journal["MaxRetentionSec"], journal["RateLimitIntervalSec"]) == (
        "5G",
        "30day",
        "0",
    )
    rotation = (DIRECTORY / "logrotate.conf").read_text()
    file = _Unit((DIRECTORY / "log-file.conf").read_text())["Service"]["StandardError"].removeprefix("append:")
    assert f"\n{file} {{\n" in rotation
    assert "\n    copytruncate\n" in rotation


def test_every_file_is_on_the_page_and_installed() -> None:
    """The page names every file of the directory; its commands parse, and what is installed is removed again."""
    for path in DIRECTORY.iterdir():
        assert f"]({path.name})" in README or path.name == "README.md"
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for place in ("/opt/captioner", "/etc/captioner", "/var/lib/captioner", "/var/cache/captioner"):
        assert re.search(rf"\b(install|venv) .*{place}\b", "\n".join(blocks[:-1]))
        assert re.search(rf"rm -rf .*{place}\b", blocks[-1])
