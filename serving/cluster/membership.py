"""Membership of a cluster: which processes there are, where engines serve, and where metrics are read.

Every frontend and engine replica sends a heartbeat to one actor, `Membership`, every `HEARTBEAT_S`, and gets back what
it needs of the others. Frontends find engine replicas by it, and Prometheus finds all processes.

The wire is Ray's calls. During a rolling update processes of two versions call an actor of either version, so a call
has one argument and one result, both plain dicts: a reader ignores names that it does not know (`known_fields`), and
every name that is added later has a default. Nothing here imports ray; what goes through Ray is a deployment handle.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from serving.engine.remote.wire import known_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.observability.service_discovery import Target

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
"""Interval of heartbeats. A call through Ray costs a millisecond of CPU at both ends."""

CALL_TIMEOUT_S = 5.0
LOST_AFTER_S = 15.0
"""A process counts as lost after this time without a heartbeat. Longer than the silence of a process whose call was
lost (`HEARTBEAT_S` + `CALL_TIMEOUT_S` + `HEARTBEAT_S`). There is no hurry: frontends see by their connections whether
an engine replica is there."""

_RAY_TARGETS_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Report of one process: its role, an id that no other process ever has, and its addresses (`host:port`).

    `serving_address` is that of an engine replica that accepts clips; `None` for frontends and while a replica drains.
    """

    process_id: str
    role: str
    metrics_address: str
    serving_address: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Answer to a heartbeat: the cluster as the membership actor knows it.

    `secret`: what engine replicas know their frontends by. `engines`: serving addresses; `None` while the actor may not
    have heard of all. `targets`: processes for Prometheus. `lost`: number of processes lost so far, by role.
    """

    secret: str
    engines: list[str] | None = None
    targets: list[Target] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=lambda: {"frontend": 0, "engine": 0})


class Membership:
    """Actor that knows the processes of the cluster.

    It stores nothing. After a restart it has heard of all processes within `CALL_TIMEOUT_S` + 2 `HEARTBEAT_S`, and
    lists no engines until then. `ray_targets` returns the metrics targets of Ray's own processes.
    """

    def __init__(self, ray_targets: Callable[[], list[Target]], now_s: Callable[[], float] = time.monotonic) -> None:
        self._secret = secrets.token_hex()
        self._now_s = now_s
        self._started_s = now_s()
        self._members: dict[str, tuple[Heartbeat, float]] = {}
        self._lost = {"frontend": 0, "engine": 0}
        self._read_ray_targets = ray_targets
        self._ray_targets: list[Target] = []
        self._ray_targets_read_s = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def heartbeat(self, report: dict[str, Any]) -> dict[str, Any]:
        """Record the `Heartbeat` of a process; return the `View`.

        A process whose metrics address another process had follows on a lost process: a process that ends as it should
        is deregistered first.
        """
        heartbeat, now = known_fields(Heartbeat, report), self._now_s()
        for process_id, (other, seen_s) in list(self._members.items()):
            replaced = process_id != heartbeat.process_id and other.metrics_address == heartbeat.metrics_address
            if replaced or (process_id != heartbeat.process_id and now - seen_s > LOST_AFTER_S):
                del self._members[process_id]
                self._lost[other.role] = self._lost.get(other.role, 0) + 1
        self._members[heartbeat.process_id] = heartbeat, now
        self._refresh_ray_targets(now)
        known = [member for member, _ in self._members.values()]
        complete = now - self._started_s >= CALL_TIMEOUT_S + 2 * HEARTBEAT_S
        targets: list[Target] = [
            {"targets": [member.metrics_address], "labels": {"role": member.role}} for member in known
        ]
        view = View(
            self._secret,
            [member.serving_address for member in known if member.serving_address] if complete else None,
            [*targets, *self._ray_targets],
            self._lost,
        )
        return asdict(view)

    async def deregister(self, report: dict[str, Any]) -> None:
        """Remove a process that ends as it should; it does not count as lost. `report` needs only `process_id`."""
        self._members.pop(report["process_id"], None)

    def _refresh_ray_targets(self, now_s: float) -> None:
        """Read Ray's targets in the background: while Ray's head is away the call may hang, heartbeats may not."""
        if now_s - self._ray_targets_read_s > _RAY_TARGETS_INTERVAL_S and (
            self._reading is None or self._reading.done()
        ):
            self._ray_targets_read_s = now_s
            self._reading = asyncio.create_task(self._update_ray_targets())

    async def _update_ray_targets(self) -> None:
        try:
            self._ray_targets = await asyncio.to_thread(self._read_ray_targets)
        except Exception as error:  # noqa: BLE001 - of any kind, while Ray's head restarts; the last targets stay
            log.warning("cannot read Ray's metrics targets", extra={"error": type(error).__name__})


class Member:
    """One process in the membership: sends its heartbeats, and keeps the last `View`.

    `membership` is the handle of `Membership`. `on_view` is called with each new view.
    """

    def __init__(self, membership: Any, role: str) -> None:
        self.view = View(secret=secrets.token_hex())  # matches no process's until the actor has sent the right one
        self.on_view: Callable[[View], None] | None = None
        self._membership = membership
        self._role = role
        self._process_id = secrets.token_hex(8)
        self._report: Heartbeat | None = None
        self._sending: asyncio.Task[None] | None = None

    def start(self, metrics_address: str, serving_address: str | None = None) -> None:
        """Send heartbeats from now on."""
        self._report = Heartbeat(self._process_id, self._role, metrics_address, serving_address)
        self._sending = asyncio.create_task(self._keep_sending())

    async def beat(self) -> None:
        """Send one heartbeat now, and wait for its answer if there is one."""
        if self._report is None:
            return
        if (answer := await call_or_none(self._membership.heartbeat, asdict(self._report))) is not None:
            self.view = known_fields(View, answer)
            if self.on_view:
                self.on_view(self.view)

    async def stop_serving(self) -> None:
        """Leave the list of engines at once, and stay among the targets: this process drains."""
        if self._report is not None:
            self._report = Heartbeat(self._process_id, self._role, self._report.metrics_address)
            await self.beat()

    async def stop(self) -> None:
        """Send no more heartbeats, and deregister. Idempotent."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
            await call_or_none(self._membership.deregister, {"process_id": self._process_id})

    async def _keep_sending(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(HEARTBEAT_S)


async def call_or_none(method: Any, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Call a method of a deployment handle through Ray; return its answer, or `None` if there is none.

    Callers repeat a call without an answer.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await method.remote(*args)
    except Exception as error:  # noqa: BLE001 - of any kind, while Ray replaces the callee
        log.warning("call through Ray failed", extra={"error": type(error).__name__})
        return None
