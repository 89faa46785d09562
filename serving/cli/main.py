"""`captioner …`: dispatch of the command line."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """usage: captioner serve [--config FILE] [settings …]   start the service; --help lists every setting
       captioner cluster [--config FILE] [settings …] start it on Ray Serve, on this machine
       captioner doctor [--json] [--config FILE] [settings …]
                                                      check this machine before anything is loaded
       captioner leave --instance NAME --within-s SECONDS
                                                      take this node out of its Ray cluster, losing no request
       captioner admin [settings …]                   the administration's HTTP API alone, for a cluster
       captioner tenants|keys|plans|prices|usage|invoice|sums|audit …
                                                      administration; --help lists the verbs
       captioner settings [--toml]                    list every setting, or print an example file of them
       captioner version"""

_COMMANDS = {
    "serve": ("serving.cli.serve", "serve"),
    "cluster": ("serving.cli.cluster", "cluster"),
    "doctor": ("serving.cli.doctor.command", "doctor"),
    "leave": ("serving.cli.cluster", "leave"),
    "admin": ("serving.cli.administration", "serve_api"),
    "settings": ("serving.cli.settings_help", "main"),
    **dict.fromkeys(
        ("tenants", "keys", "plans", "prices", "usage", "invoice", "sums", "audit"),
        ("serving.cli.administration", "main"),
    ),
}
"""Module and function of each command; a module is imported only for its command, since some take seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    match command:
        case "version" | "--version":
            print(version("captioner"))  # noqa: T201
            return 0
        case "help" | "--help" | "-h":
            print(USAGE)  # noqa: T201
            return 0
        case _ if command not in _COMMANDS:
            print(f"captioner: there is no command {command!r}\n{USAGE}", file=sys.stderr)  # noqa: T201
            return 2
    module, function = _COMMANDS[command]
    try:
        status: int = getattr(importlib.import_module(module), function)([command, *rest])
        sys.stdout.flush()
    except BrokenPipeError:  # `captioner usage | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter reports it at its end
        return 0
    return status
