"""`captioner cluster` and `captioner leave`: the service on Ray Serve."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import secrets
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.engine_args_check import engine_args_problem
from serving.cli.first_request import print_first_request, with_development_key
from serving.cli.preflight import problem_of_start, warn_of_unknown_variables
from serving.cli.settings_errors import SETTINGS_ERRORS, report
from serving.cli.settings_help import printed_help
from serving.cli.terminal import fail
from serving.cluster.local_ray import serve_ports
from serving.cluster.ray_env import RAY_ENVIRONMENT, host_variables
from serving.config import Settings
from serving.observability import logging as logs
from serving.private_process import forbid_inspection
from serving.tenancy.database import UnusableDatabase, failure
from serving.tenancy.key_hashing import Pepper

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

_HAPROXY_FILES = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "SERVER_STATE_BASE": "",
    "SERVER_STATE_FILE": "server-state",
    "METRICS_SOCKET_PATH": "metrics.sock",
}
"""Files of HAProxy by the variable of their path, which Ray puts into a directory for the node. Its default is in /tmp,
where another user may have been first."""


def cluster(argv: Sequence[str]) -> int:
    """Run `cluster SETTINGS…` until a signal; return the exit status."""
    if printed_help(argv):
        return 0
    try:
        settings = Settings.load(argv[1:])
    except SETTINGS_ERRORS as error:
        return report(error)
    warn_of_unknown_variables()
    if problem := problem_of_start(settings) or engine_args_problem(settings):
        return fail(problem)
    # HAProxy's files and its admin socket, whose path is short: at most 107 bytes.
    directory = tempfile.TemporaryDirectory(prefix="captioner-", ignore_cleanup_errors=True)
    try:
        settings = with_development_key(settings)
        os.environ.update(_environment(settings, Path(directory.name)))
    except UnusableDatabase as error:
        return fail(str(error))
    except OSError as error:  # of the pepper, which is made at the first start
        return fail(f"data_dir cannot be used: {failure(error)}", 3)
    logs.configure(settings.log_level, settings.log_format)
    forbid_inspection()
    hidden = {"config", "host", "port", *settings.secrets}
    overrides = settings.model_dump(mode="json", exclude_unset=True, exclude=hidden)
    overrides["log_format"] = settings.log_format  # whose default depends on this process's terminal

    def ready(origin: str) -> None:
        log.info("ready on %s", origin)
        print_first_request(origin, settings)

    deployments = importlib.import_module("serving.cluster.deployments")  # takes seconds, and reads the environment
    with directory:
        deployments.up(settings, overrides, ready)
    return 0


def _environment(settings: Settings, directory: Path) -> dict[str, str]:
    """Return variables that Ray reads on import and its processes inherit, secrets among them: not for Ray's store."""
    private = {
        "CAPTIONER_UPLOAD_SECRET": secrets.token_hex(),
        "CAPTIONER_KEY_PEPPER": Pepper.of(settings).secret,
    } | {f"CAPTIONER_{name.upper()}": value for name, value in settings.secrets.items()}
    # Ray's parts authenticate to each other by a token. The one that Ray keeps in the home directory is made too late.
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
    haproxy = {"RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy_program(directory))}
    haproxy |= {f"RAY_SERVE_HAPROXY_{name}": str(directory / file) for name, file in _HAPROXY_FILES.items()}
    ports = serve_ports(settings.haproxy_metrics_port, settings.haproxy_stats_port, settings.ray_first_port)
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    inherited = RAY_ENVIRONMENT | haproxy | ports | dict(os.environ)
    return inherited | host_variables(settings.host) | private | token | path


def _haproxy_program(directory: Path) -> Path:
    """Return the program that Ray starts in the place of HAProxy.

    An installer may have made the wrapper a file that cannot be run: then a script in `directory` starts it.
    """
    program = Path(__file__).parents[1] / "cluster" / "haproxy_wrapper.py"
    if os.access(program, os.X_OK):
        return program
    script = directory / "haproxy"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P {shlex.quote(str(program))} "$@"\n')
    script.chmod(0o700)
    return script


def leave(argv: Sequence[str]) -> int:
    """Run `leave …`: drain this node of a Ray cluster; return the exit status."""
    flags = argparse.ArgumentParser("captioner leave", allow_abbrev=False)
    flags.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="address of the cluster; RAY_ADDRESS")
    flags.add_argument("--instance", required=True, help="value of RAY_CLOUD_INSTANCE_ID when this node was started")
    flags.add_argument("--within-s", type=float, required=True, help="time for it in seconds")
    given = flags.parse_args(argv[1:])
    if not given.address:
        flags.error("--address or RAY_ADDRESS must name the address of the cluster")
    logs.configure("info", "json")
    node = importlib.import_module("serving.cluster.node_drain")
    return 0 if asyncio.run(node.leave(given.address, given.instance, given.within_s)) else 1
