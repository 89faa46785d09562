"""Fixtures of the audio tests: sites on both sides of the egress guard, and a pool of puppets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.audio.puppets import running
from tests.audio.sites import BODY, INSIDE, OUTSIDE, Site, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.audio.worker_pool import AudioWorkerPool


@pytest.fixture
async def outside() -> AsyncIterator[Site]:
    """A site on the public internet."""
    async with Site(OUTSIDE, {"/clip": response(BODY)}).running() as site:
        yield site


@pytest.fixture
async def inside() -> AsyncIterator[Site]:
    """A site on our own network, to which nothing may ever connect."""
    async with Site(INSIDE, {"/clip": response(b"secret")}).running() as site:
        yield site
        assert site.connections == 0


@pytest.fixture
async def pool() -> AsyncIterator[AudioWorkerPool]:
    """A pool of two puppets."""
    async with running() as workers:
        yield workers
