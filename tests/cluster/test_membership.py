"""Membership of a cluster without Ray: heartbeats, lost processes, and the engine that follows the views."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from serving.cluster import cluster_engine
from serving.cluster import membership as memberships
from serving.cluster.cluster_engine import ClusterEngine
from serving.cluster.membership import (
    CALL_TIMEOUT_S,
    HEARTBEAT_S,
    LOST_AFTER_S,
    Heartbeat,
    Member,
    Membership,
    View,
    call_or_none,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from serving.observability.service_discovery import Target

COMPLETE_AFTER_S = CALL_TIMEOUT_S + 2 * HEARTBEAT_S
NONE_LOST = {"frontend": 0, "engine": 0}
RAY: Target = {"targets": ["10.0.0.9:1"], "labels": {"role": "ray"}}


class Clock:
    """Clock that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Handle:
    """Deployment handle as Ray's: `handle.method.remote(…)`. Calls fail while `fails`."""

    def __init__(self, actor: object) -> None:
        self.fails = False
        self.calls: list[str] = []
        self._actor = actor

    def __getattr__(self, name: str) -> Handle:
        bound = Handle(self._actor)
        bound.remote = lambda *args: self._call(name, *args)  # type: ignore[attr-defined]
        return bound

    def _call(self, name: str, *args: Any) -> Awaitable[Any]:
        self.calls.append(name)
        if self.fails:
            raise RuntimeError
        result: Awaitable[Any] = getattr(self._actor, name)(*args)
        return result


class Cluster:
    """`Membership` with a clock, and heartbeats of processes by name."""

    def __init__(self, ray_targets: Callable[[], list[Target]] = list) -> None:
        self.clock = Clock()
        self.membership = Membership(ray_targets, self.clock)

    async def beat(self, process: str, port: int, role: str = "frontend", serving: str | None = None) -> View:
        """Send one heartbeat."""
        report = asdict(Heartbeat(process, role, f"10.0.0.1:{port}", serving))
        return View(**await self.membership.heartbeat(report))


def ports(view: View) -> list[int]:
    """Return the metrics ports of a view."""
    return [int(each["targets"][0].partition(":")[2]) for each in view.targets]


async def test_a_silent_process_is_lost() -> None:
    """A process without a heartbeat for 15 s is removed and counted once, by its role; the others stay."""
    cluster = Cluster()
    await cluster.beat("a", 1, "engine", "10.0.0.1:100")
    assert (await cluster.beat("b", 2)).targets == [
        {"targets": ["10.0.0.1:1"], "labels": {"role": "engine"}},
        {"targets": ["10.0.0.1:2"], "labels": {"role": "frontend"}},
    ]
    cluster.clock.now_s = LOST_AFTER_S
    view = await cluster.beat("b", 2)
    assert (view.lost, view.engines) == (NONE_LOST, ["10.0.0.1:100"])
    cluster.clock.now_s += 0.1
    for _ in range(2):
        view = await cluster.beat("b", 2)
        assert (ports(view), view.lost, view.engines) == ([2], {"frontend": 0, "engine": 1}, [])


async def test_a_process_on_the_metrics_port_of_another_follows_on_a_lost_one() -> None:
    """The port of a killed process is free at once: its successor may listen there long before it would be missed."""
    cluster = Cluster()
    await cluster.beat("a", 1)
    for _ in range(2):
        view = await cluster.beat("b", 1)
        assert (ports(view), view.lost) == ([1], {"frontend": 1, "engine": 0})


async def test_a_deregistered_process_is_not_lost() -> None:
    """A process that deregisters does not count as lost, neither later, nor when another process uses its port."""
    cluster = Cluster()
    await cluster.beat("a", 1)
    for _ in range(2):
        await cluster.membership.deregister({"process_id": "a"})
    assert (await cluster.beat("b", 1)).lost == NONE_LOST
    await cluster.membership.deregister({"process_id": "b"})
    cluster.clock.now_s = 2 * LOST_AFTER_S
    view = await cluster.beat("c", 2)
    assert (ports(view), view.lost) == ([2], NONE_LOST)


async def test_engines_are_unknown_until_all_may_have_been_heard_of() -> None:
    """A membership that has just started lists no engines, since a frontend would drop those that are still missing."""
    cluster = Cluster()
    await cluster.beat("a", 1, "engine", "10.0.0.1:100")
    cluster.clock.now_s = COMPLETE_AFTER_S - 0.1
    assert (await cluster.beat("b", 2)).engines is None
    cluster.clock.now_s = COMPLETE_AFTER_S
    assert (await cluster.beat("b", 2)).engines == ["10.0.0.1:100"]


async def test_a_draining_engine_is_not_listed_but_still_scraped() -> None:
    """A heartbeat without a serving address removes the engine from the list, and keeps its metrics target."""
    cluster = Cluster()
    cluster.clock.now_s = COMPLETE_AFTER_S
    assert (await cluster.beat("a", 1, "engine", "10.0.0.1:100")).engines == ["10.0.0.1:100"]
    view = await cluster.beat("a", 1, "engine")
    assert (view.engines, ports(view), view.lost) == ([], [1], NONE_LOST)


async def test_calls_of_another_version_are_understood() -> None:
    """Unknown names in a heartbeat, in a view and in a deregistration are ignored; missing new names have defaults."""
    cluster = Cluster()
    report = {"process_id": "a", "role": "frontend", "metrics_address": "10.0.0.1:1", "new": 1}
    view = await cluster.membership.heartbeat(report)
    assert set(view) >= {"secret", "engines", "targets", "lost"}
    await cluster.membership.deregister({"process_id": "a", "new": 1})

    class Newer:
        async def heartbeat(self, report: dict[str, Any]) -> dict[str, Any]:
            return {"secret": "s", "new": report}

    member = Member(Handle(Newer()), "frontend")
    member.start("10.0.0.1:1")
    await member.beat()
    assert member.view == View("s")
    await member.stop()


async def test_heartbeats_do_not_wait_for_rays_targets() -> None:
    """While Ray's head hangs, heartbeats are answered with the last targets; they are read again every 30 s."""
    blocked, reads = asyncio.Event(), 0
    loop = asyncio.get_running_loop()

    def read() -> list[Target]:
        nonlocal reads
        reads += 1
        if reads == 2:
            asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result()
            raise ConnectionError
        return [RAY]

    cluster = Cluster(read)
    await cluster.beat("a", 1)
    await asyncio.sleep(0.1)
    assert RAY in (await cluster.beat("a", 1)).targets
    assert reads == 1
    for _ in range(2):
        cluster.clock.now_s += 31
        async with asyncio.timeout(1):
            assert RAY in (await cluster.beat("a", 1)).targets
        await asyncio.sleep(0.05)
    assert reads == 2
    blocked.set()
    await asyncio.sleep(0.05)
    assert RAY in (await cluster.beat("a", 1)).targets


async def test_a_member_keeps_its_view_while_the_actor_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats go on while calls fail; the last view stays, and the next answer replaces it."""
    monkeypatch.setattr(memberships, "HEARTBEAT_S", 0.01)
    membership = Membership(list)
    handle, views = Handle(membership), list[View]()
    member = Member(handle, "engine")
    unknown = member.view.secret
    member.on_view = views.append
    member.start("10.0.0.1:1", "10.0.0.1:100")
    await asyncio.sleep(0.1)
    handle.fails = True
    count, before = len(views), member.view
    await asyncio.sleep(0.1)
    assert (len(views), member.view) == (count, before)
    assert member.view.secret not in ("", unknown)
    handle.fails = False
    await asyncio.sleep(0.1)
    assert len(views) > count
    await member.stop_serving()
    await member.stop()
    await member.stop()
    assert handle.calls.count("deregister") == 1
    assert (await membership.heartbeat(asdict(Heartbeat("b", "frontend", "10.0.0.1:1"))))["lost"] == NONE_LOST


async def test_a_call_without_an_answer_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    """A call that fails or takes too long gives `None` and is logged with the kind of error."""

    class Actor:
        async def fail(self) -> None:
            raise ConnectionError

        async def hang(self) -> None:
            await asyncio.sleep(5)

    assert await call_or_none(Handle(Actor()).fail) is None
    assert await call_or_none(Handle(Actor()).hang, timeout_s=0.01) is None
    assert [vars(record)["error"] for record in caplog.records] == ["ConnectionError", "TimeoutError"]


async def test_a_frontend_follows_the_engines_in_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed engines are used, unlisted ones leave, and a view without a list changes nothing."""
    monkeypatch.setattr(cluster_engine, "_FIND_ENGINES_TIMEOUT_S", 0.05)
    member = Member(Handle(None), "frontend")
    engine = ClusterEngine(member, Handle(None))
    follow = member.on_view
    assert follow is not None
    follow(View("s"))
    await engine.start()  # returns although no list has arrived
    assert engine.replicas == {"ready": 0, "not_ready": 0}
    follow(View("s", ["127.0.0.1:1"]))
    await engine.start()  # returns although the listed engine is not ready
    follow(View("s"))
    assert engine.replicas == {"ready": 0, "not_ready": 1}
    follow(View("s", []))
    assert engine.replicas == {"ready": 0, "not_ready": 0}
    await engine.stop()
    assert member.on_view is None


async def test_one_call_at_a_time_wakes_a_replica() -> None:
    """A frontend without an engine calls `wake` once until that call has ended."""

    class Engines:
        def __init__(self) -> None:
            self.woken = asyncio.Event()

        async def wake(self) -> None:
            await self.woken.wait()

    engines = Engines()
    handle = Handle(engines)
    engine = ClusterEngine(Member(Handle(None), "frontend"), handle)
    for _ in range(3):
        engine.wake()
    await asyncio.sleep(0)
    assert handle.calls == ["wake"]
    engines.woken.set()
    await asyncio.sleep(0.01)
    engine.wake()
    await asyncio.sleep(0.01)
    assert handle.calls == ["wake", "wake"]
    await engine.stop()
