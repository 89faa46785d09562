"""Marks each test with the resources that it needs, derived from its code and its fixtures, never by hand.

A need follows from a name: a test that starts a `RunningService`, itself or through a helper or fixture, needs a
process. `make test-fast` runs the tests without any need.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest

NEEDS = {
    "process": "starts processes of the service, of audio workers or of other programs",
    "store": "needs a PostgreSQL, Redis or S3 server",
    "engine": "needs the real vLLM engine with the embedded checkpoint",
    "cluster": "runs real Ray Serve",
    "sdk": "needs a client library in an environment of its own",
    "chart": "needs Helm",
    "cuda": "needs the CUDA build of vLLM in an environment of its own (no GPU)",
}

_OF_NAME = {
    "AudioWorkerPool": "process",
    "billed_service": "process",
    "EmbeddedService": "process",
    "RunningService": "process",
    "subprocess": "process",
    "multiprocessing": "process",
    "create_subprocess_exec": "process",
    "Postgres": "store",
    "Redis": "store",
    "S3Server": "store",
    "VllmEngine": "engine",
    "LoadedModel": "engine",
    "import_module": "engine",
    "isolated": "process",
    "lifespan_context": "process",
    "TickingService": "process",
    "RunningCluster": "cluster",
    "Driver": "sdk",
    "python_environment": "sdk",
    "node_environment": "sdk",
    "helm_program": "chart",
    "CudaBuild": "cuda",
}
"""Names of code and the need that follows from using one."""

_OF_FIXTURE = {
    "embedded_service": "engine",
    "engine": "engine",
    "postgres": "store",
    "redis_server": "store",
    "s3_server": "store",
    "running_cluster": "cluster",
    "driver_of": "sdk",
    "helm": "chart",
    "each_helm": "chart",
}
"""Fixtures whose need does not follow from their code."""

_APPLICATIONS = frozenset({"lifespan_context", "TickingService", "billed_service"})
"""Names that start the application, and with it processes for audio and downloads: not under `in_process`."""

_HELPERS = ("tests.", "benchmarks.")
"""Packages whose functions and classes are looked into."""


def of(item: pytest.Function) -> set[str]:
    """Return the needs of a test."""
    info = item._fixtureinfo  # pytest shows a test's fixtures nowhere else
    found = {_OF_FIXTURE[name] for name in info.names_closure if name in _OF_FIXTURE}
    used = _used(_unwrapped(item.function))
    for name in info.names_closure:
        for definition in info.name2fixturedefs.get(name, ()):
            if definition.func.__module__.startswith(_HELPERS):
                used |= _used(_unwrapped(definition.func))
    if "in_process" in info.names_closure:
        used -= _APPLICATIONS
    found |= {_OF_NAME[name] for name in used if name in _OF_NAME}
    callspec = getattr(item, "callspec", None)
    if callspec and {"redis", "postgresql"} & {value for value in callspec.params.values() if isinstance(value, str)}:
        found.add("store")
    return found


def _unwrapped(function: Any) -> Any:
    return getattr(function, "__wrapped__", function)


@functools.cache
def _used(function: Any) -> frozenset[str]:
    """Return the names that a function uses, with those of the test helpers that it reaches."""
    used: set[str] = set()
    seen: set[int] = set()
    pending: list[Any] = [function]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for code, scope in _codes(current):
            used |= {*code.co_names}
            modules = [value for value in map(scope.get, code.co_names) if isinstance(value, types.ModuleType)]
            scopes = (scope, *(vars(module) for module in modules if module.__name__.startswith(_HELPERS)))
            values = (_unwrapped(names[name]) for names in scopes for name in code.co_names if name in names)
            helpers = (value for value in values if isinstance(value, types.FunctionType | type))
            pending += [value for value in helpers if value.__module__.startswith(_HELPERS)]
    return frozenset(used)


def _codes(owner: Any) -> Iterator[tuple[types.CodeType, dict[str, Any]]]:
    functions: Iterable[Any] = vars(owner).values() if isinstance(owner, type) else (owner,)
    for function in functions:
        function = getattr(function, "fget", None) or getattr(function, "__func__", None) or function  # noqa: PLW2901
        function = getattr(function, "__wrapped__", function)  # noqa: PLW2901
        if isinstance(function, types.FunctionType):
            pending = [function.__code__]
            while pending:
                code = pending.pop()
                yield code, function.__globals__
                pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
