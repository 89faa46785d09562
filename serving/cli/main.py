"""`captioner …`: dispatch of the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from serving.cli.terminal import fail, similar
from serving.cli.version import described, version

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """usage: captioner caption FILE|DIR|URL …               describe audio: by a running service, or by its own
       captioner serve [--config FILE] [settings …]   start the service; --help lists every setting
       captioner cluster [--config FILE] [settings …] start it on Ray Serve, on this machine
       captioner doctor [--json] [--config FILE] [settings …]
                                                      check this machine before anything is loaded
       captioner leave --instance NAME --within-s SECONDS
                                                      take this node out of its Ray cluster, losing no request
       captioner admin [settings …]                   the administration's HTTP API alone, for a cluster
       captioner tenants|keys|plans|prices|batches|usage|invoice|sums|audit …
                                                      administration; --help lists the verbs
       captioner settings [--toml]                    list every setting, or print an example file of them
       captioner completion bash|zsh|fish             print a script that completes commands and options in a shell
       captioner version                              also --version, with the commit where it is known"""

_SETTINGS_HELP = ("serving.cli.settings_help", "help_of")
_COMMANDS = {
    "caption": ("serving.cli.caption.command", "main"),
    "serve": ("serving.cli.serve", "serve"),
    "cluster": ("serving.cli.cluster", "cluster"),
    "doctor": ("serving.cli.doctor.command", "doctor"),
    "leave": ("serving.cli.cluster", "leave"),
    "admin": ("serving.cli.administration", "serve_api"),
    "settings": ("serving.cli.settings_help", "main"),
    "completion": ("serving.cli.completion", "main"),
    **dict.fromkeys(
        ("tenants", "keys", "plans", "prices", "batches", "usage", "invoice", "sums", "audit"),
        ("serving.cli.administration", "main"),
    ),
}
"""Module and function of each command; a module is imported only for its command, since some take seconds."""

_HELP = dict.fromkeys(("serve", "cluster", "admin"), _SETTINGS_HELP)
"""Module and function of a command's help, where the command's own module takes long to import."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    match command:
        case "version":
            print(version())  # noqa: T201
            return 0
        case "--version" | "-V":
            print(f"captioner {described()}")  # noqa: T201
            return 0
        case "help" | "--help" | "-h":
            print(USAGE)  # noqa: T201
            return 0
        case _ if command not in _COMMANDS:
            known = [*_COMMANDS, "version", "help"]
            return fail(f"there is no command {command!r}{similar(command, known)}; `captioner --help` lists them")
    asks_for_help = "--help" in rest or "-h" in rest
    module, function = (_HELP.get(command) if asks_for_help else None) or _COMMANDS[command]
    try:
        status: int = getattr(importlib.import_module(module), function)([command, *rest])
        sys.stdout.flush()
    except BrokenPipeError:  # `captioner usage | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter reports it at its end
        return 0
    return status
