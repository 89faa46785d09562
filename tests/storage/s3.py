"""A real S3 server (moto) in a process, and a proxy before it that makes the faults of stores and networks."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_ID, SECRET = "test-key-id", "test-secret-key"


class S3Server:
    """moto's S3 on a free loopback port; its objects are in memory. A context.

    `checks_keys`: the keys of requests are checked, after a first request that creates a bucket.
    """

    def __init__(self, *, checks_keys: bool = False) -> None:
        self._checks_keys = checks_keys

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="captioner-test-s3-")
        environment = os.environ | ({"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if self._checks_keys else {})
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"Running on (http://[0-9.:]+)", Path(self._log.name).read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"moto did not start:\n{Path(self._log.name).read_text()}")
            time.sleep(0.05)
        self.url = found[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._log.close()

    def kill(self) -> None:
        """Kill the process; its port refuses connections. Idempotent."""
        self.process.kill()
        self.process.wait()

    def bucket(self) -> str:
        """Create a bucket with a fresh name; return the name."""
        name = f"test-{uuid.uuid4().hex}"
        httpx.put(f"{self.url}/{name}", timeout=30).raise_for_status()
        return name

    def objects(self, bucket: str) -> list[str]:
        """Return the names of all objects."""
        return re.findall(r"<Key>([^<]*)</Key>", httpx.get(f"{self.url}/{bucket}?list-type=2", timeout=30).text)


def bucket_settings(url: str, bucket: str) -> dict[str, object]:
    """Return the settings of a bucket of this server, or of a proxy before it."""
    return {
        "object_store_url": f"s3://{bucket}/some/prefix",
        "object_store_endpoint": url,
        "object_store_region": "us-east-1",
        "object_store_access_key_id": KEY_ID,
        "object_store_secret_key": SECRET,
        "object_store_timeout_s": 5,
    }


class FaultProxy:
    """An HTTP proxy before a server. A context.

    `fault` is called with each request's handler before it is forwarded, and returns whether it has answered;
    `alter` gets and returns each body of a response to GET; `requests` has the method of every request.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url).netloc
        self.fault: Callable[[Handler], bool] = lambda _: False
        self.alter: Callable[[bytes], bytes] = lambda body: body
        self.lose_responses = 0
        """Number of requests that reach the server and whose responses are lost."""
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        proxy = self

        class OfThisProxy(Handler):
            def answer(self) -> None:
                proxy.forward(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), OfThisProxy)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, handler: Handler) -> None:
        """Answer a request of this proxy."""
        self.requests.append(handler.command)
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        if self.fault(handler):
            return
        server = http.client.HTTPConnection(self._target, timeout=30)
        server.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            server.putheader(name, value)
        server.endheaders(body)
        response = server.getresponse()
        data = response.read()
        server.close()
        if self.lose_responses:
            self.lose_responses -= 1
            handler.close_connection = True
            return
        if handler.command == "GET":
            data = self.alter(data)
        handler.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in {"server", "date", "connection", "transfer-encoding"}:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


class Handler(BaseHTTPRequestHandler):
    """Handler of one connection to a proxy."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer a request."""
        raise NotImplementedError

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = lambda self: self.answer()  # noqa: N815 - names of http.server

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""

    def refuse(self, status: int, code: str = "") -> bool:
        """Answer with a status and S3's error of this code; return True, as `FaultProxy.fault` does."""
        body = f"<Error><Code>{code}</Code></Error>".encode() if self.command != "HEAD" else b""
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return True


def stall(seconds: float) -> Callable[[Handler], bool]:
    """Return a fault that delays every request."""

    def delay(_: Handler) -> bool:
        time.sleep(seconds)
        return False

    return delay
