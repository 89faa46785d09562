"""DNS lookups in threads that tenants share: names that resolve slowly delay no other tenant's downloads."""

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
"""Threads, and the ratio of one tenant's threads to the free ones: at most half, since no lookup can be interrupted."""


@dataclass(eq=False, slots=True)
class _Lookup:
    scheduling_class: SchedulingClass
    host: str
    port: int
    arrived_s: float
    answer: asyncio.Future[list[AddrInfoType]]
    cost: float = 1.0


class Resolver:
    """A resolver of host names. `getaddrinfo` has the signature of `socket`'s.

    A running lookup cannot be interrupted, so its thread stays with its tenant until it returns, even if nobody waits
    for the answer any more. A tenant that uses its part of the threads waits for them; other tenants find some free.
    """

    def __init__(self, getaddrinfo: Callable[..., Any], *, patience_s: float) -> None:
        self._getaddrinfo = getaddrinfo
        self._loop = asyncio.get_running_loop()
        # A separate pool, so that other work in threads is not delayed.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolve")
        self._capacity = SharedCapacity(_THREADS, alpha=_ALPHA)
        self._queue: FairQueue[_Lookup] = FairQueue(
            lambda lookup: lookup.arrived_s, patience_s=patience_s, now_s=self._loop.time
        )

    def stop(self) -> None:
        """Start no more lookups. Running ones end when `getaddrinfo` returns."""
        for lookup in self._queue.clear():
            lookup.answer.cancel()
        self._threads.shutdown(wait=False)

    async def resolve(self, host: str, port: int, scheduling_class: SchedulingClass) -> list[AddrInfoType]:
        """Return every address of a host. Raises `OSError` and `UnicodeError`. Has no timeout."""
        lookup = _Lookup(scheduling_class, host, port, self._loop.time(), self._loop.create_future())
        self._queue.add(lookup)
        self._start_lookups()
        try:
            return await lookup.answer
        finally:
            self._queue.discard(lookup)

    def _may_start(self, lookup: _Lookup) -> bool:
        return self._capacity.may_acquire(lookup.scheduling_class)

    def _start_lookups(self) -> None:
        """Start queued lookups as far as there are threads."""
        while lookup := next(filter(self._may_start, self._queue.in_order()), None):
            self._queue.dequeue(lookup)
            permit = self._capacity.acquire(lookup.scheduling_class)
            running = self._threads.submit(self._getaddrinfo, lookup.host, lookup.port, type=socket.SOCK_STREAM)
            running.add_done_callback(partial(self._on_thread_done, lookup, permit))

    def _on_thread_done(self, lookup: _Lookup, permit: Permit, running: Future[list[AddrInfoType]]) -> None:
        with suppress(RuntimeError):  # the loop has ended before the thread
            self._loop.call_soon_threadsafe(self._finish, lookup, permit, running)

    def _finish(self, lookup: _Lookup, permit: Permit, running: Future[list[AddrInfoType]]) -> None:
        permit.release()
        if not lookup.answer.done():  # a caller still waits
            if error := running.exception():
                lookup.answer.set_exception(error)
            else:
                lookup.answer.set_result(running.result())
        self._start_lookups()
