"""Bounds on the connections of this process: by address, and by the descriptors that are left.

A connection that is refused or closed here is counted by reason (`captioner_connections_refused_total`).
"""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from serving.api.addresses import Networks, customer_of, is_loopback

if TYPE_CHECKING:
    from serving.config import Settings

log = logging.getLogger(__name__)

REASONS = ("address", "descriptors", "evicted", "malformed", "headers", "header_timeout", "unread", "shutdown")
"""Reasons for which a connection is refused or closed without a client's consent.

`address`: its address has too many; `descriptors`: no descriptor is left, and every connection has a running request;
`evicted`: closed for a new connection while no descriptor was left; `malformed`: no HTTP request (400); `headers`: too
large (431); `header_timeout`: incomplete headers; `unread`: the rest of a body whose request was answered early did not
arrive in time; `shutdown`: an incomplete body while the service stops.
"""

_MAX_DESCRIPTORS = 1_048_576
"""Limit to which the soft limit is raised at most: more serves no purpose, and slows programs that close all."""

_RESERVE_SHARE, _MAX_RESERVE = 4, 1024
"""One in `_RESERVE_SHARE` descriptors, at most `_MAX_RESERVE`, is kept for files, downloads, database and engine."""

_LOG_INTERVAL_S = 60.0


class Connection(Protocol):
    """A connection that may be closed for a new one."""

    def evict(self) -> None:
        """Close the connection at once."""
        ...


class Connections:
    """The open connections of one listener.

    Once only the reserve of descriptors is left, a new connection replaces the oldest one without a request, else the
    oldest one whose request is incomplete; if there is none, the new one is refused. Half of the reserve is for other
    uses: a new descriptor is the lowest free one, so its number is a lower bound of those in use, of every kind.
    """

    def __init__(self, settings: Settings, *, behind_proxy: bool = False) -> None:
        """Prepare the bounds. `behind_proxy`: all connections come from a proxy of ours, and no address is limited."""
        self.refused = Counter(dict.fromkeys(REASONS, 0))
        most = settings.max_connections_per_address or 2 * settings.max_concurrent_requests
        self._max_per_address = None if behind_proxy else most
        self._trusted = Networks(settings.trusted_proxies)
        self._by_address: Counter[str] = Counter()
        self._address_of: dict[Connection, str] = {}
        self._idle: dict[Connection, None] = {}
        self._receiving: dict[Connection, None] = {}
        self._logged_s: dict[str, float] = {}

    @property
    def open(self) -> int:
        """Number of open connections."""
        return len(self._address_of)

    def is_trusted(self, host: str | None) -> bool:
        """Return whether the peer is one of `trusted_proxies`."""
        return host is not None and host in self._trusted

    def add(self, connection: Connection, host: str | None, descriptor: int) -> str | None:
        """Add a new connection; return the reason if it must be refused. `discard` it in either case."""
        address = customer_of(host)
        self._address_of[connection] = address
        self._by_address[address] += 1
        if (
            self._max_per_address is not None
            and self._by_address[address] > self._max_per_address
            and not (host is None or is_loopback(host) or self.is_trusted(host))
        ):
            self.count("address", address=address, limit=self._max_per_address)
            return "address"
        limit = _descriptor_limit()
        if self.open > limit - _reserve(limit) or descriptor >= limit - _reserve(limit) // 2:
            oldest = next(iter(self._idle), None) or next(iter(self._receiving), None)
            reason = "descriptors" if oldest is None else "evicted"
            self.count(reason, connections=self.open, limit=limit)
            if oldest is None:
                return reason
            self.discard(oldest)
            oldest.evict()
        self._idle[connection] = None
        return None

    def discard(self, connection: Connection) -> None:
        """Forget a closed connection. Idempotent."""
        address = self._address_of.pop(connection, None)
        if address is None:
            return
        self._idle.pop(connection, None)
        self._receiving.pop(connection, None)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def request_started(self, connection: Connection) -> None:
        """Record that the headers of a request are complete."""
        if connection in self._address_of:
            self._idle.pop(connection, None)
            self._receiving[connection] = None

    def request_received(self, connection: Connection) -> None:
        """Record that a request is complete."""
        self._receiving.pop(connection, None)

    def became_idle(self, connection: Connection) -> None:
        """Record that a connection waits for its next request."""
        if connection in self._address_of:
            self._receiving.pop(connection, None)
            self._idle[connection] = None

    def count(self, cause: str, **facts: object) -> None:
        """Count a connection refused or closed for one of `REASONS`; log a line a minute for each that has `facts`."""
        self.refused[cause] += 1
        now = time.monotonic()
        if facts and now - self._logged_s.get(cause, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S:
            self._logged_s[cause] = now
            log.warning("connections refused", extra={"reason": cause, **facts, "count": self.refused[cause]})


def _descriptor_limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _reserve(limit: int) -> int:
    return min(limit // _RESERVE_SHARE, _MAX_RESERVE)


def backlog() -> int:
    """Return the length of a listener's queue in the kernel: all of it is accepted at once, before any is closed."""
    return max(1, _reserve(_descriptor_limit()) // 2)


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of descriptors to its hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
