"""The service inside the test's own process, for engine failures that no setting causes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

import uvicorn

from serving.api.app import create_app

if TYPE_CHECKING:
    from serving.config import Settings
    from serving.engine.base import Engine


class ServedHere:
    """Serve the application with this engine on a free loopback port. A context."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        app = create_app(settings, engine)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        self._thread = threading.Thread(target=self._server.run)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the service did not start")
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join()
