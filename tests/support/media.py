"""Web server on loopback that serves given bytes under given names."""

from __future__ import annotations

import http.server
import threading
import urllib.parse
from typing import Self


class MediaServer:
    """Server of `files` (path without its first slash → bytes), as a context manager; `url(name)` is the address.

    `answers` (path → status, headers, body) are sent unchanged, even if they are invalid.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        media = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                name = urllib.parse.unquote(self.path[1:])
                content = media.files.get(name)
                missing = (404, {"content-length": "0"}, b"")
                found = missing if content is None else (200, {"content-length": str(len(content))}, content)
                status, headers, body = media.answers.get(name, found)
                self.send_response(status)
                for field, value in headers.items():
                    self.send_header(field, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{urllib.parse.quote(name)}"
