"""`captioner …`: the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from pydantic import SecretStr, ValidationError
from sqlalchemy.exc import OperationalError

from serving.api.admin import AdminServer
from serving.api.app import create_app
from serving.api.uvicorn_protocol import protocol
from serving.cli import administration as admin_cli
from serving.cluster.ray_env import RAY_ENVIRONMENT
from serving.config import Settings
from serving.observability import logging as logs
from serving.tenancy.database import UnusableDatabase, migrate, open_database
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import development_key

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Sequence

log = logging.getLogger(__name__)

USAGE = """usage: captioner serve [--config FILE] [settings …]   start the service; --help lists every setting
       captioner cluster [--config FILE] [settings …] start it on Ray Serve, on this machine
       captioner leave --instance NAME --within-s SECONDS
                                                      take this node out of its Ray cluster, losing no request
       captioner admin [settings …]                   the administration's HTTP API alone, for a cluster
       captioner tenants|keys|plans|prices|usage|invoice|audit …
                                                      administration; --help lists the verbs
       captioner version"""

KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep a connection that rests, mostly a minute: else a request may meet one
that is just being closed. uvicorn's own are 5 s."""

SAMPLE = Path(__file__).parents[1] / "embedded" / "sample.mp3"
"""A short clip for the first request."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    match command:
        case "serve":
            return _serve(rest)
        case "cluster":
            return _cluster(rest)
        case "leave":
            return _leave(rest)
        case "admin":
            return _admin(rest)
        case _ if command in admin_cli.COMMANDS:
            return admin_cli.main([command, *rest])
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
        logs.configure(settings.log_level, settings.log_format)
        server = _Server(_with_development_key(settings))
    except (ValidationError, FileNotFoundError, UnusableDatabase) as error:
        print(f"captioner: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return uvloop.run(server.run())


def _cluster(argv: list[str]) -> int:
    try:
        settings = _with_development_key(Settings.load(argv))
    except (ValidationError, FileNotFoundError, UnusableDatabase) as error:
        print(f"captioner: {error}", file=sys.stderr)  # noqa: T201
        return 2
    # Ray reads these on import, and its processes inherit them: secrets among them, which do not go into Ray's store.
    hidden = settings.secrets
    private = {
        "CAPTIONER_UPLOAD_SECRET": secrets.token_hex(),
        "CAPTIONER_KEY_PEPPER": Pepper.of(settings).secret,
    } | {f"CAPTIONER_{name.upper()}": value for name, value in hidden.items()}
    # Ray's parts ask each other for a token. The one that it would keep in the home directory is not made in time.
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
    # It wants the Python that has Ray. An installer may have made it a file that cannot be run.
    program = Path(__file__).parents[1] / "cluster" / "haproxy_wrapper.py"
    haproxy = {"RAY_SERVE_HAPROXY_BINARY_PATH": str(program)} if os.access(program, os.X_OK) else {}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    os.environ.update(RAY_ENVIRONMENT | haproxy | os.environ | private | token | path)
    logs.configure(settings.log_level, settings.log_format)
    overrides = settings.model_dump(mode="json", exclude_unset=True, exclude={"config", "host", "port", *hidden})

    def ready(origin: str) -> None:
        log.info("ready on %s", origin)
        if settings.log_format == "text":
            print(_first_request(origin, settings), file=sys.stderr)  # noqa: T201

    cluster = importlib.import_module("serving.cluster.deployments")  # takes seconds, which nobody else should wait
    cluster.up(settings, overrides, ready)
    return 0


def _with_development_key(settings: Settings) -> Settings:
    """Settings with a key to begin with, for a person at a terminal of a service whose database knows none."""
    if settings.log_format != "text" or settings.development_key is not None:
        return settings
    database = open_database(settings)
    try:
        migrate(database)
        key = development_key(settings, database)
    except OperationalError:
        return settings  # it is away; the service will wait for it
    finally:
        database.dispose()
    return settings.model_copy(update={"development_key": SecretStr(key)}) if key else settings


def _admin(argv: list[str]) -> int:
    try:
        settings = Settings.load(argv)
        logs.configure(settings.log_level, settings.log_format)
        migrate(open_database(settings))
        server = AdminServer(settings, alone=True)
    except (ValueError, FileNotFoundError) as error:  # ValidationError and UnusableDatabase too
        print(f"captioner: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OperationalError as error:
        print(f"captioner: the database does not answer: {type(error.orig).__name__}", file=sys.stderr)  # noqa: T201
        return 3
    asyncio.run(server.serve())
    return 0 if server.started else 1


def _leave(argv: list[str]) -> int:
    flags = argparse.ArgumentParser("captioner leave", allow_abbrev=False)
    flags.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="the cluster's head; RAY_ADDRESS")
    flags.add_argument("--instance", required=True, help="what RAY_CLOUD_INSTANCE_ID was when this node was started")
    flags.add_argument("--within-s", type=float, required=True, help="the time that there is")
    given = flags.parse_args(argv)
    if not given.address:
        flags.error("--address or RAY_ADDRESS must name the cluster's head")
    logs.configure("info", "json")
    node = importlib.import_module("serving.cluster.node_drain")
    return 0 if asyncio.run(node.leave(given.address, given.instance, given.within_s)) else 1


class _Listener(uvicorn.Server):
    """uvicorn, which tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listening.set()


class _Server:
    """One run of the service: uvicorn, and what a person at the terminal is told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._loaded = asyncio.Event()
        self._failed = False
        app = create_app(settings, on_engine=self._on_engine)
        self._server = _Listener(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=protocol(settings),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.shutdown_grace_s),
            )
        )

    async def run(self) -> int:
        """Serve until a signal, or until the engine fails to start; return the exit status."""
        what = "the embedded stand-in" if self._settings.is_embedded else self._settings.model
        log.info("loading %s with the %s engine", what, self._settings.engine)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn stops gracefully and then raises the signal again, for whoever handled it before: nobody did.
            signal.signal(number, lambda *_: None)
        telling = asyncio.create_task(self._tell())
        try:
            async with self._administration():
                await self._server.serve()
        finally:
            telling.cancel()
        return 1 if self._failed or not self._server.started else 0

    @contextlib.asynccontextmanager
    async def _administration(self) -> AsyncIterator[None]:
        """The administration's API beside the service, if it is wanted."""
        if self._settings.admin_port is None:
            yield
            return
        server = AdminServer(self._settings, alone=False)
        serving = asyncio.create_task(server.serve())
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.wait((serving,))

    async def _tell(self) -> None:
        """Say that it is loading, then that it is ready."""
        await self._server.listening.wait()
        while not self._loaded.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await self._loaded.wait()
                    break
            log.info("still loading after %d s; requests get 503 until then", time.monotonic() - self._began)
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        origin = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("ready after %.0f s on %s", time.monotonic() - self._began, origin)
        if self._settings.log_format == "text":
            print(_first_request(origin, self._settings), file=sys.stderr)  # noqa: T201

    def _on_engine(self, failure: BaseException | None) -> None:
        if failure is None:
            self._loaded.set()
        else:
            log.error("stopping: the model could not be loaded; the lines above tell why")
            self._failed = self._server.should_exit = True


def _first_request(origin: str, settings: Settings) -> str:
    key = settings.development_key.get_secret_value() if settings.development_key else "YOUR_KEY"
    header = f" -H 'Authorization: Bearer {key}'" if settings.auth else ""
    return f"""
Try it:

  (printf '{{"model":"{settings.served_model_name}","messages":[{{"role":"user","content":[{{"type":"input_audio",'
   printf '"input_audio":{{"data":"data:;base64,%s"}}}}]}}]}}' "$(base64 -w0 {_shown(SAMPLE)})") |
  curl {origin}/v1/chat/completions -H 'Content-Type: application/json'{header} -d @-
"""


def _shown(path: Path) -> str:
    """The path as one would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
