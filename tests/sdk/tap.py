"""Clients' calls, made through relays that record the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tests.sdk.drivers.calls import Call, Outcome
from tests.sdk.relay import Relay

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from tests.sdk.clients import Client, Driver
    from tests.sdk.relay import Exchange


class Served(Protocol):
    """A service in any process."""

    url: str


class Tap:
    """One test's access to services: relays are opened when needed and closed with the stack."""

    def __init__(self, driver_of: Callable[[Client], Driver], stack: contextlib.ExitStack) -> None:
        self._driver_of = driver_of
        self._stack = stack
        self._relays: dict[str, Relay] = {}

    def relay(self, service: Served) -> Relay:
        """Return the relay to the service."""
        if service.url not in self._relays:
            self._relays[service.url] = self._stack.enter_context(Relay(service.url))
        return self._relays[service.url]

    def perform(self, client: Client, service: Served, **call: Any) -> Outcome:
        """Make a `Call` with the client."""
        origin = self.relay(service).origin
        asked = Call(origin, asynchronous=client.asynchronous, protocol=client.protocol, **call)
        return self._driver_of(client).perform(asked)

    def exchanges(self) -> list[Exchange]:
        """Return every answer so far."""
        return [exchange for relay in self._relays.values() for exchange in relay.exchanges()]
