"""`captioner …`: the command line."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from pydantic import ValidationError

from serving import logs
from serving.app import create_app
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

USAGE = """usage: captioner serve [--config FILE] [settings …]   start the service; --help lists every setting
       captioner version"""

SAMPLE = Path(__file__).parent / "embedded" / "sample.mp3"
"""A short clip for the first request."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    match command:
        case "serve":
            return _serve(rest)
        case "version" | "--version":
            print(version("captioner"))  # noqa: T201
            return 0
        case "help" | "--help" | "-h":
            print(USAGE)  # noqa: T201
            return 0
        case _:
            print(f"captioner: there is no command {command!r}\n{USAGE}", file=sys.stderr)  # noqa: T201
            return 2


def _serve(argv: list[str]) -> int:
    try:
        settings = Settings.load(argv)
    except (ValidationError, FileNotFoundError) as error:
        print(f"captioner: {error}", file=sys.stderr)  # noqa: T201
        return 2
    logs.configure(settings.log_level, settings.log_format)
    return uvloop.run(_Server(settings).run())


class _Server:
    """One run of the service: uvicorn, and what a person at the terminal is told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._failed = False
        self._progress: asyncio.Task[None]
        app = create_app(settings, on_engine=self._on_engine)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http="httptools",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.shutdown_grace_s),
            )
        )

    async def run(self) -> int:
        """Serve until a signal, or until the engine fails to start; return the exit status."""
        what = "the embedded stand-in" if self._settings.is_embedded else self._settings.model
        log.info("loading %s with the %s engine", what, self._settings.engine)
        self._progress = asyncio.create_task(self._tell_progress())
        try:
            await self._server.serve()
        finally:
            self._progress.cancel()
        return 1 if self._failed or not self._server.started else 0

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(10)
            log.info("still loading after %d s", time.monotonic() - self._began)

    def _on_engine(self, failure: BaseException | None) -> None:
        self._progress.cancel()
        if failure is not None:
            log.error("stopping: the model could not be loaded; the lines above tell why")
            self._failed = self._server.should_exit = True
            return
        sockets = [socket for server in self._server.servers for socket in server.sockets]
        port = sockets[0].getsockname()[1] if sockets else self._settings.port
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        log.info("ready after %.0f s on http://%s:%d", time.monotonic() - self._began, host, port)
        if self._settings.log_format == "text":
            print(_first_request(f"http://{host}:{port}", self._settings), file=sys.stderr)  # noqa: T201


def _first_request(origin: str, settings: Settings) -> str:
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    return f"""
Try it:

  (printf '{{"model":"{settings.served_model_name}","messages":[{{"role":"user","content":[{{"type":"input_audio",'
   printf '"input_audio":{{"data":"data:;base64,%s"}}}}]}}]}}' "$(base64 -w0 {_shown(SAMPLE)})") |
  curl {origin}/v1/chat/completions -H 'Content-Type: application/json'{key} -d @-
"""


def _shown(path: Path) -> str:
    """The path as one would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
