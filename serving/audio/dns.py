"""Looking up hosts, in threads that tenants share: names that resolve slowly hold up nobody else's downloads."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.scheduling.fair_queue import FairQueue
from serving.scheduling.shared_capacity import SharedCapacity

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from aiohttp import AddrInfoType

    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

_THREADS, _ALPHA = 32, 1.0
"""One tenant may have as many threads as it leaves free: no lookup can be made to give one back."""


@dataclass(eq=False, slots=True)
class _Lookup:
    scheduling_class: SchedulingClass
    host: str
    port: int
    arrived_s: float
    answer: asyncio.Future[list[AddrInfoType]]
    cost: float = 1.0


class Resolver:
    """Resolves names. `getaddrinfo` has the signature of `socket`'s.

    Nothing ends a lookup that is under way, so its thread stays its tenant's until it returns, whoever still waits. A
    tenant that has its share of the threads waits for them; others find some free.
    """

    def __init__(self, getaddrinfo: Callable[..., Any], *, patience_s: float) -> None:
        self._getaddrinfo = getaddrinfo
        self._loop = asyncio.get_running_loop()
        # Threads of its own: what else runs in threads is not held up.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolve")
        self._capacity = SharedCapacity(_THREADS, alpha=_ALPHA)
        self._queue: FairQueue[_Lookup] = FairQueue(
            lambda lookup: lookup.arrived_s, patience_s=patience_s, now_s=self._loop.time
        )

    def stop(self) -> None:
        """Begin no more lookups; those under way end in their own time."""
        for lookup in self._queue.clear():
            lookup.answer.cancel()
        self._threads.shutdown(wait=False)

    async def resolve(self, host: str, port: int, scheduling_class: SchedulingClass) -> list[AddrInfoType]:
        """Every address of a host. Raises `OSError` and `UnicodeError`. Takes as long as it takes."""
        lookup = _Lookup(scheduling_class, host, port, self._loop.time(), self._loop.create_future())
        self._queue.add(lookup)
        self._begin()
        try:
            return await lookup.answer
        finally:
            self._queue.discard(lookup)

    def _may_start(self, lookup: _Lookup) -> bool:
        return self._capacity.may_acquire(lookup.scheduling_class)

    def _begin(self) -> None:
        """Begin what there are threads for."""
        while lookup := next(filter(self._may_start, self._queue.in_order()), None):
            self._queue.dequeue(lookup)
            permit = self._capacity.acquire(lookup.scheduling_class)
            looking = self._threads.submit(self._getaddrinfo, lookup.host, lookup.port, type=socket.SOCK_STREAM)
            looking.add_done_callback(partial(self._on_thread_done, lookup, permit))

    def _on_thread_done(self, lookup: _Lookup, permit: Permit, looking: Future[list[AddrInfoType]]) -> None:
        with suppress(RuntimeError):  # the loop has ended before the thread
            self._loop.call_soon_threadsafe(self._finish, lookup, permit, looking)

    def _finish(self, lookup: _Lookup, permit: Permit, looking: Future[list[AddrInfoType]]) -> None:
        permit.release()
        if not lookup.answer.done():  # somebody still waits
            if error := looking.exception():
                lookup.answer.set_exception(error)
            else:
                lookup.answer.set_result(looking.result())
        self._begin()
