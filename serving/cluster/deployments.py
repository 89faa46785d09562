"""The service on Ray Serve: frontends, engine replicas, and the directory by which they find each other.

    client ─► HAProxy ─► Frontend (HTTP, fetch, decode, log-mel) ═ a socket each ═► EngineReplica (vLLM)
                              └─ every 2 s ────► Directory ◄──── every 2 s ─┘

A frontend is the same application as on one machine (`create_app`), with `RemoteEngine` in the engine's place. Ray places
the processes, replaces them, scales them and updates them; requests and tokens do not pass through it, so they go on
while Ray's own parts restart. The only file of the application that imports ray (`node.py` does to leave a cluster).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle  # noqa: TC002 - Ray resolves annotations

from serving.api.app import create_app, make_engine
from serving.api.collectors import watch_replica
from serving.api.uvicorn_protocol import use_everywhere
from serving.cluster import autoscaling as scaling
from serving.cluster.local_ray import start_head
from serving.cluster.membership import EVERY_S, ClusterEngine, Directory, told
from serving.config import Settings
from serving.engine.remote.server import EngineServer
from serving.observability import logging as logs
from serving.observability.cpu_time import Busy
from serving.observability.metrics import Gauges
from serving.observability.service_discovery import MetricsListener, Presence

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from serving.observability.metrics import Metrics
    from serving.observability.service_discovery import Target

log = logging.getLogger(__name__)

_METRICS_EVERY_S = 2.0
_RAY_START_S = 300.0
_RAY_TRIES = 4

_NO_LIMIT = 1_000_000
"""Ray is not to refuse requests: it would in no dialect. The service's own bounds come first."""

Overrides = dict[str, Any]
"""Settings by name, as in a file. What they leave out each process takes from its environment: secrets, above all."""


def _presence(directory: DeploymentHandle[Any], settings: Settings, expose: Any) -> Presence:
    """This process to Prometheus, by way of the directory."""
    return Presence(
        MetricsListener(expose, settings.metrics_token),
        lambda target, process: told(directory.observe.remote(target, process)),
        lambda address: told(directory.unobserve.remote(address)),
    )


def _ray_targets() -> list[Target]:
    """Where Ray's nodes, and HAProxy on each, tell their own metrics."""
    addresses = [
        (node["NodeManagerAddress"], node["MetricsExportPort"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["MetricsExportPort"]
    ]
    haproxy_port = os.environ.get("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
    roles = {"ray": addresses, "haproxy": [(host, haproxy_port) for host, _ in addresses]}
    return [
        {"targets": [f"{host}:{port}"], "labels": {"role": role}}
        for role, addresses in roles.items()
        for host, port in addresses
    ]


class EngineReplica:
    """One engine, loaded, behind a socket. Ray starts it, asks for health and load, and drains it before it ends."""

    # Ray awaits it.
    async def __init__(self, overrides: Overrides, directory: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        """Return when the engine has loaded and the frontends know of it.

        From then on Ray counts the replica in, and in an update takes an older one away.
        """
        settings = Settings(**overrides)
        _configure_logs(settings)
        self._directory = directory
        self._secret = secrets.token_hex()  # nobody's, until the directory has told the right one
        self._engine = make_engine(settings)
        self._server = EngineServer(settings, self._engine, lambda: self._secret)
        self._host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        await self._engine.start()
        await self._server.start(self._host)
        self._registering = asyncio.create_task(self._register())
        metrics = Gauges()
        watch_replica(metrics, self._engine, settings)
        self._presence = _presence(directory, settings, partial(metrics.expose, self._engine.check_health))
        await self._presence.start(self._host, settings.metrics_port, "engine")
        await self._known()

    async def check_health(self) -> None:
        """Raise once the engine has failed: Ray then puts another replica in this one's place."""
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ByWork` decides by."""
        load = self._engine.load
        return {"work": load.audio_s, "wait_s": self._engine.longest_wait_s}

    async def wake(self) -> None:
        """Do nothing: that someone asks is what starts a replica where there are none."""

    async def __del__(self) -> None:
        """Take no more, let what runs end, then end the engine."""
        self._registering.cancel()
        await told(self._directory.forget.remote(self._address))
        await self._server.drain()
        await self._server.stop()
        await self._presence.stop()
        await self._engine.stop()

    @property
    def _address(self) -> str:
        return f"{self._host}:{self._server.port}"

    async def _register(self) -> None:
        while True:
            self._secret = await told(self._directory.register.remote(self._address)) or self._secret
            await asyncio.sleep(EVERY_S)

    async def _known(self) -> None:
        """Wait until the directory tells of this replica, and the frontends have had the time to ask and to connect.

        The directory is replaced in each update, too, and has to learn first.
        """
        known = False
        while not known:
            await asyncio.sleep(EVERY_S / 10)
            answer = await told(self._directory.replicas.remote())
            known = answer is not None and self._address in answer[0]
        await asyncio.sleep(2 * EVERY_S)


@serve.ingress()
class Frontend:
    """The service as on one machine, but for the engine."""

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, overrides: Overrides, directory: DeploymentHandle[Any], engines: DeploymentHandle[Any]
    ) -> None:
        """Return when it has found the engines: from then on Ray sends it requests."""
        # The replicas set the pace already.
        settings = Settings(**overrides | {"stream_flush_interval_s": 0})
        _configure_logs(settings)
        use_everywhere(settings)
        engine = ClusterEngine(directory, engines)
        self._settings, self._busy = settings, Busy()
        self._service = create_app(settings, engine, on_not_ready=engine.wake, targets=lambda: self._presence.targets)
        metrics: Metrics = self._service.state.service.metrics
        self._presence = _presence(directory, settings, partial(metrics.expose, engine.check_health))
        metrics.bind("captioner_replicas_lost_total", lambda: self._presence.lost)
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        await self._presence.start(host, settings.metrics_port, "frontend")
        await engine.start()

    async def __del__(self) -> None:
        """Prometheus need not ask any more."""
        await self._presence.stop()

    def __serve_build_asgi_app__(self) -> Any:
        """Hand Ray the application."""
        return self._service

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ByWork` decides by: clips in work, or the event loop, whichever is closer to its limit."""
        workers = self._service.state.service.workers
        loop = self._busy.share() * self._settings.audio_workers
        return {"work": max(float(workers.busy + workers.queued), loop), "wait_s": workers.longest_wait_s}


class ByWork:
    """`scaling.replicas` as a policy of Ray Serve's."""

    def __init__(self, **rule: Any) -> None:
        self._rule = scaling.Rule(**rule)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas to have, and what to remember."""
        history = scaling.History(tuple(tuple(each) for each in context.policy_state.get("needed", ())))
        count, history = scaling.replicas(
            self._rule,
            scaling.reports_of(context.aggregated_metrics or {}, "work", "wait_s"),
            current=context.target_num_replicas,
            unserved=context.total_queued_requests if context.current_num_replicas == 0 else 0,
            now_s=context.current_time or time.time(),
            history=history,
        )
        return count, {"needed": history.needed}


def build(overrides: Overrides) -> serve.Application:
    """The application, for `serve.run` and for the `import_path` of `serve deploy`. `overrides` are settings by name.

    Raises `ValidationError` for settings that do not fit.
    """
    settings = Settings(**overrides)
    if settings.max_frontends > 1 and settings.upload_secret is None:
        raise ValueError("several frontends need one CAPTIONER_UPLOAD_SECRET in the environment of all")
    directory = serve.deployment(name="directory", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_NO_LIMIT)(
        Directory
    ).bind(_ray_targets)
    gpus = settings.tensor_parallel if settings.engine_on_gpu else 0
    frontend_place, engine_place = ({"frontend": 1}, {"engine": 1}) if settings.pin_roles_to_nodes else ({}, {})
    engines = serve.deployment(
        name="engine",
        # One bundle lies on one machine: tensor parallelism wants the fast links within it.
        placement_group_bundles=[{"CPU": settings.engine_cpus} | ({"GPU": gpus} if gpus else {}) | engine_place],
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": settings.engine_cpus, "num_gpus": gpus, "resources": engine_place},
        **_replicas(
            settings,
            settings.min_engine_replicas,
            settings.max_engine_replicas,
            settings.target_audio_seconds_per_engine,
        ),
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
        health_check_period_s=_METRICS_EVERY_S,
    )(EngineReplica).bind(overrides, directory)
    return serve.deployment(
        name="frontend",
        ray_actor_options={"num_cpus": settings.frontend_cpus, "resources": frontend_place},
        **_replicas(
            settings,
            settings.min_frontends,
            settings.max_frontends,
            settings.target_clips_per_audio_worker * settings.audio_workers,
        ),
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
    )(Frontend).bind(overrides, directory, engines)


def _replicas(settings: Settings, least: int, most: int, work_per_replica: float) -> dict[str, Any]:
    """How many replicas a deployment has; where the number is fixed nobody measures what it should be."""
    if least == most:
        return {"num_replicas": least}
    rule = {
        "least": least,
        "most": most,
        "work_per_replica": work_per_replica,
        "down_after_s": settings.scale_down_after_s,
    }
    config = AutoscalingConfig(
        min_replicas=least,
        initial_replicas=max(least, 1),
        max_replicas=most,
        metrics_interval_s=_METRICS_EVERY_S,
        look_back_period_s=2 * _METRICS_EVERY_S,
        # Ray applies delays of its own to any policy, by default 30 s up and 600 s down; ours keeps the pace itself.
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function="serving.cluster.deployments:ByWork", policy_kwargs=rule
        ),
    )
    return {"autoscaling_config": config}


def _configure_logs(settings: Settings) -> None:
    """Log to the process's own standard error: in its place Ray has put a log of its own, which is buffered."""
    sys.stderr = sys.__stderr__
    logs.configure(settings.log_level, settings.log_format)


@contextmanager
def _ray() -> Iterator[None]:
    """Ray on this machine, connected to."""
    with ExitStack() as stack:
        for left in reversed(range(_RAY_TRIES)):
            head, address = start_head(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
            stack.callback(head.terminate)
            if _connect(address, head):
                break
            head.terminate()
            if not left:
                raise RuntimeError("Ray did not start")
            log.warning("Ray did not start in its time; trying again")
        stack.callback(ray.shutdown)
        yield


def _connect(address: str, head: subprocess.Popen[bytes]) -> bool:
    """Connect to Ray; return whether it has come up."""
    began = time.monotonic()
    while head.poll() is None and time.monotonic() - began < _RAY_START_S:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError):
            time.sleep(1)
        else:
            return True
    return False


def up(settings: Settings, overrides: Overrides, ready: Callable[[str], None]) -> None:
    """Run the whole cluster on this machine until SIGINT or SIGTERM. `ready` is told the origin once it serves.

    What runs then is finished, for at most `shutdown_grace_s`; a second signal ends it at once.
    """
    stop = threading.Event()
    with _ray():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
        try:
            serve.run(build(overrides), name="captioner", route_prefix="/")
            ready(f"http://{settings.host}:{settings.port}")
            stop.wait()
            stop.clear()
            _drain(settings.shutdown_grace_s, stop)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _drain(within_s: float, hurry: threading.Event) -> None:
    """Let frontends and engines end what they have. `serve.shutdown` alone would kill HAProxy under their streams."""
    began = time.monotonic()
    serve.delete("captioner", _blocking=False)
    while "captioner" in serve.status().applications and time.monotonic() - began < within_s:
        if hurry.wait(0.2):
            return
