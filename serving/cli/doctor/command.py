"""`captioner doctor`: run every probe that the settings call for, print the findings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from serving.cli.doctor import fit, gpu, host, services, weights
from serving.cli.doctor.findings import Finding, Level, Probe, error, ok, run_all
from serving.cli.engine_args_check import engine_args_problem
from serving.cli.settings_errors import SETTINGS_ERRORS, problems
from serving.config import Settings
from serving.observability.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEADLINE_S = 15.0
_HIDDEN = "[redacted]"

USAGE = """usage: captioner doctor [--json] [--part all|engine|frontend] [--exit-zero] [--config FILE] [settings …]

Check this machine before anything is loaded: GPUs, driver, memory, disks, weights, services, clock, limits. Takes the
settings of `captioner serve` (`captioner serve --help` lists them). Changes nothing and prints no secret.

  --json       print {"ok": …, "findings": [{"probe", "level", "message", "remedy"}, …]}
  --part       `engine` or `frontend`: the checks of that part of a cluster. Default: all
  --exit-zero  report errors, but exit with 0: for a check that must not keep a pod from starting

Exit status: 0 without errors (warnings are allowed), 1 with an error, also in the settings, 2 for a wrong use of these
options."""


def doctor(argv: Sequence[str]) -> int:
    """Run `doctor …`; return the exit status."""
    if {"-h", "--help"} & set(argv[1:]):
        print(USAGE)  # noqa: T201
        return 0
    flags = argparse.ArgumentParser("captioner doctor", allow_abbrev=False, add_help=False)
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--exit-zero", action="store_true")
    flags.add_argument("--part", choices=("all", "engine", "frontend"), default="all")
    own, rest = flags.parse_known_args(argv[1:])
    try:
        settings = Settings.load(rest)
    except SETTINGS_ERRORS as failure:
        secrets: tuple[str, ...] = ()
        found = [error("settings", each, "correct the settings") for each in problems(failure)]
    else:
        secrets = _secrets(settings)
        found = run_all(_probes(settings, own.part), _DEADLINE_S)
        # Not within the deadline: vLLM's import alone may take as long.
        if own.part != "frontend" and (problem := engine_args_problem(settings)):
            found.append(error("settings", problem, "correct engine_args"))
    found = [replace(each, message=_without(secrets, each.message)) for each in found]
    print(_as_json(found) if own.json else _as_text(found), flush=True)  # noqa: T201
    return int(not own.exit_zero and any(finding.level is Level.ERROR for finding in found))


def _probes(settings: Settings, part: str) -> list[Probe]:
    runs_model = part != "frontend" and settings.engine == "vllm"
    serves = part != "engine"
    probes = [Probe("settings", lambda: [ok("settings", "the settings are valid")])]
    if runs_model:
        probes += [
            Probe("gpu", partial(gpu.probe, settings)),
            Probe("memory", partial(fit.probe, settings)),
            Probe("shm", partial(host.shared_memory, settings)),
            Probe("weights", partial(weights.probe, settings)),
        ]
    probes.append(Probe("ram", partial(host.memory, settings, engine=runs_model, frontend=serves)))
    if serves:
        probes += [
            Probe("disk", partial(host.directories, settings)),
            Probe("database", partial(services.database, settings)),
            Probe("redis", partial(services.counters, settings)),
            Probe("bucket", partial(services.bucket, settings)),
            Probe("files", partial(host.descriptors, settings)),
        ]
    if part == "all":
        probes.append(Probe("port", partial(host.port, settings)))
    return [*probes, Probe("traces", partial(services.traces, settings))]


def _as_json(found: list[Finding]) -> str:
    passed = not any(finding.level is Level.ERROR for finding in found)
    return json.dumps({"ok": passed, "findings": [asdict(finding) for finding in found]}, indent=1)


def _as_text(found: list[Finding]) -> str:
    lines = []
    for finding in found:
        lines.append(f"{finding.level:8} {finding.probe:9} {finding.message}")
        if finding.remedy:
            lines.append(f"{'':18} remedy: {finding.remedy}")
    errors, warnings = (sum(finding.level is level for finding in found) for level in (Level.ERROR, Level.WARNING))
    return "\n".join([*lines, "", f"{errors} errors, {warnings} warnings"])


def _secrets(settings: Settings) -> tuple[str, ...]:
    """Return the texts that must not be printed: secrets, the passwords in addresses, and tokens of hubs."""
    values = [*settings.secrets.values(), *(os.environ.get(name, "") for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"))]
    for value in settings.secrets.values():
        try:
            password = urlsplit(value).password
        except ValueError:
            continue
        values += [password, unquote(password)] if password else []
    return tuple(sorted({value for value in values if len(value) > 3}, key=len, reverse=True))  # noqa: PLR2004


def _without(secrets: tuple[str, ...], text: str) -> str:
    """Return a message without secrets. It has none by design; this is the second line of defence."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return redact(text)
