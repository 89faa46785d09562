"""Metrics: labels are bounded, and every event that can be foreseen has a series from the start."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import serving
from serving import errors
from serving.observability.metrics import ANY_OTHER, REASONS, Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVING = Path(serving.__file__).parent
OF_OTHERS = {"uploads", "usage"}
"""Reasons for which no caption is shed, only an upload (`captioner_uploads_total`) or a tenant's view of its usage."""


def reasons_in_the_code() -> Iterator[str]:
    """Yield every literal that is given for the `reason` of `Overloaded`, also by functions that pass it on."""
    nodes = [node for path in SERVING.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    positions: dict[str, int] = {}
    given: list[ast.AST | None] = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "Overloaded" in ast.unparse(node.body):  # type: ignore[arg-type]
            names = [argument.arg for argument in node.args.args if argument.arg not in {"self", "cls"}]
            if "reason" in names:
                positions[node.name] = names.index("reason")
    for node in nodes:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in positions:
                given += node.args[positions[name] : positions[name] + 1]
            if name in positions.keys() | {"Overloaded", "SharedCapacity"}:
                given += [each.value for each in node.keywords if each.arg == "reason"]
    yield from (each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str))


def shed(reason: str) -> float:
    """Finish one request that was shed for `reason`; return the count of that reason."""
    metrics = Metrics()
    metrics.finish(metrics.begin("id", "openai"), errors.Overloaded(reason=reason))
    return metrics.registry.get_sample_value("captioner_requests_shed_total", {"reason": reason}) or 0.0


def test_every_reason_in_the_code_has_a_series() -> None:
    """The listed reasons are those that the code gives, and the default one."""
    assert set(reasons_in_the_code()) | {ANY_OTHER} == set(REASONS) | OF_OTHERS


@pytest.mark.parametrize("reason", REASONS)
def test_a_listed_reason_is_counted_by_name(reason: str) -> None:
    """A request that was shed for a listed reason is counted under that reason."""
    assert shed(reason) == 1


def test_an_unlisted_reason_is_counted_as_any_other() -> None:
    """A reason that is not listed, such as one of a newer engine replica, adds no series."""
    metrics = Metrics()
    metrics.finish(metrics.begin("id", "openai"), errors.Overloaded(reason="of-a-newer-version"))
    assert metrics.registry.get_sample_value("captioner_requests_shed_total", {"reason": ANY_OTHER}) == 1
    assert metrics.registry.get_sample_value("captioner_requests_shed_total", {"reason": "of-a-newer-version"}) is None
