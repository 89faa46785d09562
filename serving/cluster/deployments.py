"""The service on Ray Serve: frontends, engine replicas, and the membership by which they find each other.

    client ─► HAProxy ─► Frontend (HTTP, fetch, decode, log-mel) ═ a socket each ═► EngineReplica (vLLM)
                              └─ every 2 s ───► Membership ◄──── every 2 s ─┘

A frontend is the same application as on one machine (`create_app`), with `ClusterEngine` in place of the engine. Ray
places the processes, replaces them, scales them and updates them; requests and tokens do not pass through Ray, so they
go on while Ray's own parts restart. The only module of the application that imports ray, except `node_drain.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle  # noqa: TC002 - Ray resolves annotations

from serving.api.app import create_app, make_engine
from serving.api.collectors import bind_replica_metrics
from serving.api.uvicorn_protocol import use_everywhere
from serving.cluster import autoscaling
from serving.cluster.cluster_engine import ClusterEngine
from serving.cluster.local_ray import start_local_ray
from serving.cluster.membership import HEARTBEAT_S, Member, Membership
from serving.cluster.ray_env import own_host, serve_host
from serving.config import Settings
from serving.engine.remote.server import EngineServer
from serving.observability import logging as logs
from serving.observability.cpu_time import Busy
from serving.observability.metrics import Gauges
from serving.observability.service_discovery import MetricsListener
from serving.private_process import forbid_inspection

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from serving.observability.metrics import Metrics
    from serving.observability.service_discovery import Target

log = logging.getLogger(__name__)

_METRICS_INTERVAL_S = 2.0
_RAY_START_TIMEOUT_S = 300.0
_RAY_START_ATTEMPTS = 4

_NO_LIMIT = 1_000_000
"""Ray's own bound, never reached: Ray would refuse requests in neither dialect. The service's bounds are lower."""

Overrides = dict[str, Any]
"""Settings by name, as in a file. Each process takes other settings from its environment: secrets, above all."""


def _ray_targets() -> list[Target]:
    """Return the metrics targets of Ray's nodes and of HAProxy on each of them."""
    addresses = [
        (node["NodeManagerAddress"], node["MetricsExportPort"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["MetricsExportPort"]
    ]
    haproxy_port = os.environ.get("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
    roles = {"ray": addresses, "haproxy": [(own_host() or host, haproxy_port) for host, _ in addresses]}
    return [
        {"targets": [f"{host}:{port}"], "labels": {"role": role}}
        for role, addresses in roles.items()
        for host, port in addresses
    ]


_serve_replica: Any = importlib.import_module("ray.serve._private.replica")
_add_port = _serve_replica.add_port_to_grpc_server


def _add_own_port(server: Any, address: str) -> int:
    """Bind Serve's gRPC server of a replica to loopback where the cluster has one host. Ray binds it to `[::]`."""
    return int(_add_port(server, address if own_host() is None else address.replace("[::]", "127.0.0.1")))


# Every replica imports this module before its server starts.
_serve_replica.add_port_to_grpc_server = _add_own_port


class EngineReplica:
    """One loaded engine behind a socket. Ray starts it, reads its health and load, and drains it before it stops."""

    # Ray awaits it.
    async def __init__(self, overrides: Overrides, membership: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        """Return when the engine has loaded and the frontends have connected to it.

        From then on Ray counts the replica as running, and in an update stops an older replica.
        """
        forbid_inspection()
        settings = Settings(**overrides)
        _configure_logs(settings)
        self._member = Member(membership, "engine")
        self._engine = make_engine(settings)
        self._server = EngineServer(settings, self._engine, lambda: self._member.view.secret)
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        await self._engine.start()
        await self._server.start(host)
        metrics = Gauges()
        bind_replica_metrics(metrics, self._engine, settings)
        self._metrics = MetricsListener(
            partial(metrics.expose, self._engine.check_health),
            settings.metrics_token,
            lambda: self._member.view.targets,
        )
        metrics_address = await self._metrics.start(own_host() or host, settings.metrics_port or 0)
        serving_address = f"{host}:{self._server.port}"
        self._member.start(metrics_address, serving_address)
        await self._wait_until_listed(serving_address)

    async def check_health(self) -> None:
        """Raise once the engine has failed: Ray then replaces this replica."""
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load for `WorkPolicy`."""
        return {"work": self._engine.load.audio_s, "wait_s": self._engine.longest_wait_s}

    async def wake(self) -> None:
        """Do nothing: the waiting call itself makes Ray start a replica where there is none."""

    async def __del__(self) -> None:
        """Accept no further clips, finish those that run, then stop the engine."""
        await self._member.stop_serving()
        await self._server.drain()
        await self._server.stop()
        await self._member.stop()
        await self._metrics.stop()
        await self._engine.stop()

    async def _wait_until_listed(self, serving_address: str) -> None:
        """Wait until the membership lists this replica, and frontends have had the time to read that and to connect.

        The membership actor is replaced in each update, too, and lists no engines until it may know all of them.
        """
        while serving_address not in (self._member.view.engines or ()):
            await asyncio.sleep(HEARTBEAT_S / 10)
            await self._member.beat()
        await asyncio.sleep(2 * HEARTBEAT_S)


@serve.ingress()
class Frontend:
    """The service as on one machine, with the engine replicas of the cluster as its engine."""

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, overrides: Overrides, membership: DeploymentHandle[Any], engines: DeploymentHandle[Any]
    ) -> None:
        """Return when this frontend has found the engines: from then on Ray sends it requests."""
        forbid_inspection()
        # The engine replicas set the pace already.
        settings = Settings(**overrides | {"stream_flush_interval_s": 0})
        _configure_logs(settings)
        connections = use_everywhere(settings)
        self._settings, self._busy = settings, Busy()
        self._member = Member(membership, "frontend")
        engine = ClusterEngine(self._member, engines)
        self._service = create_app(
            settings,
            engine,
            on_not_ready=engine.wake,
            targets=self._targets,
            connections=connections,
        )
        metrics: Metrics = self._service.state.components.metrics
        metrics.bind("captioner_replicas_lost_total", lambda: self._member.view.lost)
        expose = partial(metrics.expose, self._service.state.components.check_ready)
        self._metrics = MetricsListener(expose, settings.metrics_token, self._targets)
        host = own_host() or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._member.start(await self._metrics.start(host, settings.metrics_port or 0))
        await engine.start()

    async def __del__(self) -> None:
        """Deregister, and close the metrics port."""
        await self._member.stop()
        await self._metrics.stop()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application to Ray."""
        return self._service

    def _targets(self) -> list[Target]:
        return self._member.view.targets

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load for `WorkPolicy`: clips in work, or the event loop, whichever is closer to its limit."""
        workers = self._service.state.components.workers
        loop = self._busy.share() * self._settings.audio_workers
        return {"work": max(float(workers.busy + workers.queued), loop), "wait_s": workers.longest_wait_s}


class WorkPolicy:
    """Autoscaling policy of Ray Serve's that is `autoscaling.target_replicas`."""

    def __init__(self, **rule: Any) -> None:
        self._rule = autoscaling.ScalingRule(**rule)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas to have, and the state for the next call."""
        history = autoscaling.NeedHistory(tuple(tuple(each) for each in context.policy_state.get("needed", ())))
        count, history = autoscaling.target_replicas(
            self._rule,
            autoscaling.load_reports(context.aggregated_metrics or {}, "work", "wait_s"),
            current=context.target_num_replicas,
            unserved=context.total_queued_requests if context.current_num_replicas == 0 else 0,
            now_s=context.current_time or time.time(),
            history=history,
        )
        return count, {"needed": history.needed}


def build(overrides: Overrides) -> serve.Application:
    """Return the application, for `serve.run` and for the `import_path` of `serve deploy`.

    `overrides` are settings by name. Raises `ValidationError` for settings that are not valid, and `ValueError` for
    several frontends without `CAPTIONER_UPLOAD_SECRET`.
    """
    settings = Settings(**overrides)
    if settings.max_frontends > 1 and settings.upload_secret is None:
        raise ValueError(
            f"CAPTIONER_UPLOAD_SECRET is required with max_frontends={settings.max_frontends}, the same on all nodes"
        )
    membership = serve.deployment(name="membership", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_NO_LIMIT)(
        Membership
    ).bind(_ray_targets)
    gpus = settings.tensor_parallel if settings.engine_on_gpu else 0
    frontend_node, engine_node = ({"frontend": 1}, {"engine": 1}) if settings.pin_roles_to_nodes else ({}, {})
    engines = serve.deployment(
        name="engine",
        # One bundle is placed on one machine: tensor parallelism needs the fast links within it.
        placement_group_bundles=[{"CPU": settings.engine_cpus} | ({"GPU": gpus} if gpus else {}) | engine_node],
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": settings.engine_cpus, "num_gpus": gpus, "resources": engine_node},
        **_replicas(
            settings,
            settings.min_engine_replicas,
            settings.max_engine_replicas,
            settings.target_audio_seconds_per_engine,
        ),
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
        health_check_period_s=_METRICS_INTERVAL_S,
    )(EngineReplica).bind(overrides, membership)
    return serve.deployment(
        name="frontend",
        ray_actor_options={"num_cpus": settings.frontend_cpus, "resources": frontend_node},
        **_replicas(
            settings,
            settings.min_frontends,
            settings.max_frontends,
            settings.target_clips_per_audio_worker * settings.audio_workers,
        ),
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
    )(Frontend).bind(overrides, membership, engines)


def _replicas(settings: Settings, min_replicas: int, max_replicas: int, work_per_replica: float) -> dict[str, Any]:
    """Return the options of a deployment for its number of replicas; a fixed number needs no autoscaling."""
    if min_replicas == max_replicas:
        return {"num_replicas": min_replicas}
    rule = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "work_per_replica": work_per_replica,
        "scale_down_after_s": settings.scale_down_after_s,
    }
    config = AutoscalingConfig(
        min_replicas=min_replicas,
        initial_replicas=max(min_replicas, 1),
        max_replicas=max_replicas,
        metrics_interval_s=_METRICS_INTERVAL_S,
        look_back_period_s=2 * _METRICS_INTERVAL_S,
        # Ray applies delays to any policy, by default 30 s up and 600 s down; `WorkPolicy` sets the pace alone.
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function="serving.cluster.deployments:WorkPolicy", policy_kwargs=rule
        ),
    )
    return {"autoscaling_config": config}


def _configure_logs(settings: Settings) -> None:
    """Log to the process's own standard error, which Ray has replaced with a buffered log."""
    sys.stderr = sys.__stderr__
    logs.configure(settings.log_level, settings.log_format)


@contextmanager
def _local_ray(first_port: int | None) -> Iterator[None]:
    """Run Ray on this machine, connected to."""
    with ExitStack() as stack:
        for attempts_left in reversed(range(_RAY_START_ATTEMPTS)):
            process, address = start_local_ray(ray.util.get_node_ip_address(), first_port)  # type: ignore[no-untyped-call]
            stack.callback(process.terminate)
            if _connect(address, process):
                break
            process.terminate()
            if not attempts_left:
                raise RuntimeError(f"Ray did not start in {_RAY_START_ATTEMPTS} attempts")
            log.warning("Ray did not start in time; starting it again", extra={"attempts_left": attempts_left})
        stack.callback(ray.shutdown)
        yield


def _connect(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Connect to Ray; return whether it has started."""
    started_s = time.monotonic()
    while process.poll() is None and time.monotonic() - started_s < _RAY_START_TIMEOUT_S:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError):
            time.sleep(1)
        else:
            return True
    return False


class _StartStopped(KeyboardInterrupt):
    """A signal during the start, which waits for frontends, and they for engines and the database."""


def up(settings: Settings, overrides: Overrides, ready: Callable[[str], None]) -> None:
    """Run the whole cluster on this machine until SIGINT or SIGTERM.

    `ready` is called with the origin once the cluster serves. Captions that run at the signal are finished, for at most
    `shutdown_grace_s`; a second signal ends them at once. A signal before the cluster serves ends the start.
    """
    stop, started = threading.Event(), threading.Event()

    def on_signal(*_: object) -> None:
        stop.set()
        if not started.is_set():
            raise _StartStopped

    with suppress(_StartStopped), _local_ray(settings.ray_first_port):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        options = {"host": serve_host(settings.host), "port": settings.port, "request_timeout_s": None}
        serve.start(http_options=options)
        try:
            with suppress(_StartStopped):
                serve.run(build(overrides), name="captioner", route_prefix="/")
                started.set()
                ready(f"http://{settings.host}:{settings.port}")
                stop.wait()
            if not started.is_set() and not _is_serving():
                raise _StartStopped
            started.set()
            stop.clear()
            _drain(settings.shutdown_grace_s, stop)
        finally:
            if started.is_set() or not stop.is_set():  # else it would wait 30 s for processes that are starting
                serve.shutdown()  # type: ignore[no-untyped-call]


def _is_serving() -> bool:
    """Return whether a frontend serves: it does a moment before Serve says that the application runs."""
    application = serve.status().applications.get("captioner")
    frontend = application.deployments.get("frontend") if application else None
    return frontend is not None and any(state == "RUNNING" for state in frontend.replica_states)


def _drain(within_s: float, hurry: threading.Event) -> None:
    """Let frontends and engines finish what they have: `serve.shutdown` alone would kill HAProxy and its streams."""
    started_s = time.monotonic()
    serve.delete("captioner", _blocking=False)
    while "captioner" in serve.status().applications and time.monotonic() - started_s < within_s:
        if hurry.wait(0.2):
            return
