"""Checks of settings against this machine before anything heavy is loaded; each problem is one line with its remedy."""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.settings_help import FIELDS, variable
from serving.cli.terminal import note, similar
from serving.tenancy.database import failure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.config import Settings

_OTHER_VARIABLES = frozenset({"CAPTIONER_SECRETS_DIR", "CAPTIONER_URL", "CAPTIONER_KEY"})
"""Variables that are no settings: of the settings' sources, and of `captioner caption`."""

_OF_KUBERNETES = re.compile(r"CAPTIONER_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?)")
"""Variables that Kubernetes sets for a Service whose name begins with `captioner`."""


def problem_of_start(settings: Settings) -> str | None:
    """Return the first problem of a start: of the model's directory, the state's directory, or the ports."""
    return _of_model(settings) or _of_data_dir(settings) or problem_of_ports(settings)


def problem_of_ports(settings: Settings) -> str | None:
    """Return the problem of a port on which the service cannot listen."""
    found = _of_port("port", "host", settings.host, settings.port)
    if found is None and settings.admin_port:
        found = _of_port("admin_port", "admin_host", settings.admin_host, settings.admin_port)
    return found


def warn_of_unknown_variables(names: Iterable[str] | None = None) -> None:
    """Print a line for each variable `CAPTIONER_…` of the environment that is no setting, and so has no effect.

    It is no error, because platforms set variables with the prefix of a service's name.
    """
    known = {variable(name): name for name in FIELDS}
    for name in sorted(os.environ if names is None else names):
        if not name.startswith("CAPTIONER_") or name in known or name in _OTHER_VARIABLES:
            continue
        if not _OF_KUBERNETES.fullmatch(name):
            meant = similar(name, known, prefix="CAPTIONER_")
            note(f"{name} is not a setting{meant} and has no effect; `captioner settings` lists all")


def _of_model(settings: Settings) -> str | None:
    """Return the problem of a model that is a path. A name on a hub has one slash at most, and not at its beginning."""
    model = settings.model
    path = Path(model).expanduser()
    if settings.engine == "fake" or (path.is_dir() and (path / "config.json").is_file()):
        return None
    if path.is_dir():
        return (
            f"model: the directory {model} has no config.json, so it is no checkpoint; set --model or CAPTIONER_MODEL"
        )
    if path.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        return f"model: the directory {model} does not exist; set --model or CAPTIONER_MODEL"
    return None


def _of_data_dir(settings: Settings) -> str | None:
    """Return the problem of a directory in which nothing can be written. It is created if it is missing."""
    directory = settings.data_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"data_dir: cannot write in {directory}: {failure(error)}; set --data-dir or CAPTIONER_DATA_DIR"


def _of_port(name: str, of_host: str, host: str, port: int) -> str | None:
    """Return the problem of an address on which nothing can listen."""
    where = f"set --{name.replace('_', '-')} or {variable(name)}"
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                with suppress(OSError):
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                return f"{name}: another program listens on {host}:{port}; stop it, or {where}"
            case errno.EACCES:
                return f"{name}: this user may not listen on port {port}; {where} to 1024 or more"
            case _:
                reason = error.strerror or str(error)
                return f"{of_host}: cannot listen on {host}: {reason}; set it to an address of this machine"
    return None
