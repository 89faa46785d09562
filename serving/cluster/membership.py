"""How frontends find engine replicas, and Prometheus both: the directory, and the engine that it amounts to for a frontend.

What reaches it through Ray comes as deployment handles; nothing here imports ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from serving.engine.remote.client import RemoteEngine
from serving.observability.service_discovery import Register

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.observability.service_discovery import Target

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""How often engine replicas register and frontends ask. A call through Ray costs a millisecond of CPU at both ends."""

ANSWER_S = 5.0
_FORGET_AFTER_S = 20.0
"""Longer than a replica is silent whose call was lost (`EVERY_S`, `ANSWER_S`, `EVERY_S`). There is no hurry: frontends see
by their connections whether it is there."""

_NODES_EVERY_S = 30.0
_FIND_ENGINES_S = 20.0


class Directory:
    """Knows where the engine replicas are, and the secret by which they know their frontends.

    It keeps nothing: started anew it has learnt all again after `EVERY_S`, and makes itself unknown until then.
    """

    def __init__(self, ray_targets: Callable[[], list[Target]]) -> None:
        self._secret = secrets.token_hex()
        self._began = time.monotonic()
        self._seen: dict[str, float] = {}
        self._register = Register()
        self._ray_targets = ray_targets
        self._ray: tuple[float, list[Target]] = (-math.inf, [])

    async def observe(self, target: Target, process: str) -> tuple[list[Target], dict[str, int]]:
        """Note where a process tells its metrics; return where all do, and how many were lost, by role."""
        at, nodes = self._ray
        if time.monotonic() - at > _NODES_EVERY_S:
            self._ray = time.monotonic(), nodes  # whoever asks meanwhile need not
            self._ray = time.monotonic(), await asyncio.to_thread(self._ray_targets)
        targets, lost = self._register.note(target, process)
        return [*targets, *self._ray[1]], lost

    async def unobserve(self, address: str) -> None:
        """A process ends as it should."""
        self._register.strike(address)

    async def register(self, address: str) -> str:
        """Note that a replica serves at `address`; return the secret."""
        self._seen[address] = time.monotonic()
        return self._secret

    async def forget(self, address: str) -> None:
        """A replica takes no more."""
        self._seen.pop(address, None)

    async def replicas(self) -> tuple[list[str], str] | None:
        """Return the addresses and the secret; `None` as long as it may not have heard of all."""
        now = time.monotonic()
        if now - self._began < ANSWER_S + 2 * EVERY_S:
            return None
        self._seen = {address: seen for address, seen in self._seen.items() if now - seen < _FORGET_AFTER_S}
        return list(self._seen), self._secret


class ClusterEngine(RemoteEngine):
    """The engine replicas that the directory knows."""

    def __init__(self, directory: Any, engines: Any) -> None:
        super().__init__()
        self._directory = directory
        self._engines = engines
        self._waking: Any = None
        self._following: asyncio.Task[None] | None = None
        self._told_once = asyncio.Event()

    async def start(self) -> None:
        """See `Engine`. Returns when the engines that there are can be used; also if there is none."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow())
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIND_ENGINES_S):
                await self._told_once.wait()
                while self.replicas["not_ready"] and not self.replicas["ready"]:  # noqa: ASYNC110 - once in a frontend's life
                    await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """See `Engine`."""
        if self._following is not None:
            self._following.cancel()
        await super().stop()

    async def _follow(self) -> None:
        while True:
            if answer := await told(self._directory.replicas.remote()):
                self.update(*answer)
                self._told_once.set()
            await asyncio.sleep(EVERY_S)

    def wake(self) -> None:
        """Ask for a replica where there is none.

        The call waits at Ray until there is one, and that it waits is what Ray scales by.
        """
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(told(self._engines.wake.remote(), timeout_s=60))


async def told(call: Any, timeout_s: float = ANSWER_S) -> Any:
    """The answer to a call through Ray, or `None` if there is none: whoever asks will ask again."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except Exception as error:  # noqa: BLE001 - of any kind, while Ray replaces what was called
        log.warning("no answer through Ray: %s", type(error).__name__)
        return None
