"""Private names of aiohttp that `serving/audio/bounded_http.py` uses.

`deploy/upgrading.md` lists them, and the steps to take if one of these tests fails after an upgrade.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from serving.audio.bounded_http import BoundedConnector, BoundedProtocol, bounded_session


async def test_a_connector_makes_connections_by_its_factory() -> None:
    """`BaseConnector._factory` makes each connection's protocol, and is ours in our connector."""
    plain, bounded = aiohttp.TCPConnector(), BoundedConnector()
    assert isinstance(plain._factory, functools.partial)
    assert plain._factory.func is ResponseHandler
    assert bounded._factory.func is BoundedProtocol
    await plain.close()
    await bounded.close()


async def test_a_session_sends_a_request_once() -> None:
    """`ClientSession._retry_connection` is whether a GET is sent again when the server disconnects."""
    plain, bounded = aiohttp.ClientSession(), bounded_session()
    assert (plain._retry_connection, bounded._retry_connection) == (True, False)
    await plain.close()
    await bounded.close()


async def test_a_body_lists_the_ends_of_its_chunks() -> None:
    """`_http_chunk_splits` grows by one for each parsed chunk, and `feed_data` receives the message and its body."""
    found: list[Any] = []

    class Recording(ResponseHandler):
        def feed_data(self, data: Any, size: int = 0) -> None:
            found.append(data)
            super().feed_data(data, size)

    protocol = Recording(asyncio.get_running_loop())
    protocol.connection_made(asyncio.Transport())
    protocol.set_response_params()
    assert protocol._parser is not None
    protocol.data_received(b"HTTP/1.1 103 Early\r\n\r\n")
    protocol.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbb\r\n")
    (early, _), (message, body) = found
    assert (early.code, message.code, message.chunked) == (103, 200, True)
    assert list(body._http_chunk_splits) == [1, 3]
    assert body.total_bytes == 3
