"""The engine of a frontend in a cluster: the engine replicas that the membership lists."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from serving.cluster.membership import call_or_none
from serving.engine.remote.client import RemoteEngine

if TYPE_CHECKING:
    from serving.cluster.membership import Member, View

_FIND_ENGINES_TIMEOUT_S = 20.0
_WAKE_TIMEOUT_S = 60.0


class ClusterEngine(RemoteEngine):
    """`RemoteEngine` over the replicas in the views of `member`.

    `engines` is the handle of the engine deployment.
    """

    def __init__(self, member: Member, engines: Any) -> None:
        super().__init__()
        self._member = member
        self._engines = engines
        self._waking: asyncio.Future[Any] | None = None
        self._listed = asyncio.Event()
        member.on_view = self._follow

    async def start(self) -> None:
        """See `Engine`. Return when one of the listed replicas is ready, when none is listed, or after 20 s."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIND_ENGINES_TIMEOUT_S):
                await self._listed.wait()
                while self.replicas["not_ready"] and not self.replicas["ready"]:  # noqa: ASYNC110 - once per frontend
                    await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """See `Engine`."""
        self._member.on_view = None
        await super().stop()

    def _follow(self, view: View) -> None:
        if view.engines is not None:
            self.update(view.engines, view.secret)
            self._listed.set()

    def wake(self) -> None:
        """Request a replica where there is none.

        The call waits at Ray until there is a replica, and Ray scales up from zero because a call waits.
        """
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(call_or_none(self._engines.wake, timeout_s=_WAKE_TIMEOUT_S))
