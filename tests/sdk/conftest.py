"""Clients in their environments, and recorded connections between them and a service."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.sdk.clients import Client, Driver
from tests.sdk.tap import Tap
from tests.sdk.wire_rules import violations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def driver_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Client], Driver]]:
    """The process that performs a client's calls: one per environment and driver, started at its first use."""
    drivers: dict[tuple[str, str], Driver] = {}
    with contextlib.ExitStack() as stack:

        def driver_of(client: Client) -> Driver:
            key = (client.environment, client.driver)
            if key not in drivers:
                drivers[key] = stack.enter_context(Driver(*key, tmp_path_factory.mktemp("client")))
            return drivers[key]

        yield driver_of


@pytest.fixture
def tap(driver_of: Callable[[Client], Driver]) -> Iterator[Tap]:
    """Calls of clients, and their bytes. After every test, all recorded answers must keep the rules of the wire."""
    with contextlib.ExitStack() as stack:
        tap = Tap(driver_of, stack)
        yield tap
    assert [broken for exchange in tap.exchanges() for broken in violations(exchange)] == []
