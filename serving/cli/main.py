"""`captioner …`: dispatch of the command line."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """usage: captioner serve [--config FILE] [settings …]   start the service; --help lists every setting
       captioner cluster [--config FILE] [settings …] start it on Ray Serve, on this machine
       captioner leave --instance NAME --within-s SECONDS
                                                      take this node out of its Ray cluster, losing no request
       captioner admin [settings …]                   the administration's HTTP API alone, for a cluster
       captioner tenants|keys|plans|prices|usage|invoice|audit …
                                                      administration; --help lists the verbs
       captioner settings [--toml]                    list every setting, or print an example file of them
       captioner version"""

RAY_ENVIRONMENT = {
    # HAProxy before the frontends, and no thread or process between it and our application.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # An old HAProxy goes on with its streams after each change of the frontends: let it until the longest has ended.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.cluster.ingress_middleware:middlewares",
    # Ray's own default of 15 would put the whole service behind anything else on the machine.
    "RAY_worker_niceness": "0",
    # A request whose frontend dies before it has answered anything goes to another one, if it fits into HAProxy's buffer
    # (16 kB: audio by its URL does).
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Once: HAProxy's own default is three times.
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    # Five seconds for HAProxy to start are too little on a busy machine, and Ray would begin anew again and again.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray's own default of 0.1 takes twice the CPU when idle; new replicas and lost ones are seen soon enough.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray looks three times before it starts a lost HAProxy anew: 28 s with its own default of 10.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Serve's processes need not wake ten times a second for counts that are told every ten seconds.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    # Nobody reads Ray's records of each call.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""What Ray's processes must find in their environment; `deploy/` has the same for clusters."""

_COMMANDS = {
    "serve": ("serving.cli.serve", "serve"),
    "cluster": ("serving.cli.cluster", "cluster"),
    "leave": ("serving.cli.cluster", "leave"),
    "admin": ("serving.cli.administration", "serve_api"),
    "settings": ("serving.cli.settings_help", "main"),
    **dict.fromkeys(
        ("tenants", "keys", "plans", "prices", "usage", "invoice", "audit"), ("serving.cli.administration", "main")
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
    status: int = getattr(importlib.import_module(module), function)([command, *rest])
    return status
