"""Environment of Ray's processes. Free of ray, which reads these variables when it is imported."""

from __future__ import annotations

import os

HOST_VARIABLE = "CAPTIONER_CLUSTER_HOST"
"""Environment variable with the `host` of `captioner cluster`, for its HAProxy and for its metrics ports."""
_EVERY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on

RAY_ENVIRONMENT = {
    # HAProxy in front of the frontends, and no thread or process between HAProxy and the application.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # After each change of the frontends the old HAProxy process keeps its streams: wait until the longest has ended.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.cluster.ingress_middleware:middlewares",
    # Ray's default of 15 would put the service behind everything else on the machine.
    "RAY_worker_niceness": "0",
    # A request whose frontend dies before it has answered anything goes to another frontend, if it fits into HAProxy's
    # buffer (16 kB: audio by its URL does).
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # HAProxy's own default is three retries.
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    # Ray's default of 5 s is too short for HAProxy to start on a busy machine; Ray would restart it again and again.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray's default of 0.1 takes twice the CPU when idle; at 0.5 new and lost replicas are noticed soon enough.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray checks three times before it restarts a lost HAProxy: 28 s with its default of 10.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Serve's processes need not wake ten times a second for counts that are exported every ten seconds.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    # Ray's records of each call are not used.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""Variables that Ray's processes need, by name. `deploy/serve/ray.env` has the same for clusters."""


def serve_host(host: str) -> str:
    """Return the address of Serve's own listeners for `host`: loopback, unless `host` is every address.

    HAProxy reaches the frontends of its machine by 127.0.0.1, on which they must listen.
    """
    return host if host in _EVERY_ADDRESS else "127.0.0.1"


def host_variables(host: str) -> dict[str, str]:
    """Return variables by which HAProxy listens on `host`, and Ray on loopback unless `host` is every address.

    Ray listens on every address where the node's address is not loopback. It makes any other address of loopback,
    except where it supports no clusters of several machines, which is what its variable says.
    """
    loopback = {} if host in _EVERY_ADDRESS else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return {HOST_VARIABLE: host} | loopback


def own_host() -> str | None:
    """Return the one address on which `captioner cluster` listens. None: the node's."""
    host = os.environ.get(HOST_VARIABLE, "")
    return None if host in _EVERY_ADDRESS else host
