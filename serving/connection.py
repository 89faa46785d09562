"""One connection of a client: uvicorn's, with the bounds that it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from serving.config import Settings


class _Connection(HttpToolsProtocol):
    """A connection whose client must read: one that stays and reads nothing is dropped, with what waits for it."""

    write_timeout_s: float
    _drop: TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_be_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()
        if self.transport.is_closing():
            self._must_be_read()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._must_be_read()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._must_be_read()

    def _must_be_read(self) -> None:
        # Closing would not do: it waits until all is sent.
        if self._drop is None:
            self._drop = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def _is_read(self) -> None:
        if self._drop is not None:
            self._drop.cancel()
            self._drop = None


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """What uvicorn makes of each connection (its `http`)."""
    return type("Connection", (_Connection,), {"write_timeout_s": settings.write_timeout_s})
