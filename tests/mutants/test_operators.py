"""The faults that are made of a module, and the list of explained survivors."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import explained
from tests.mutants.operators import mutants
from tests.mutants.runner import ROOT
from tests.mutants.targets import TARGETS

SOURCE = '''"""Module."""
LIMIT = 3
def pay(tokens: int, free: int = 0) -> int:
    """Return the price."""
    log.info("paid", extra={"tokens": tokens})
    if tokens <= free and not LIMIT:
        raise ValueError
    return max(tokens, free) * 2
'''


def test_each_expression_has_its_faults() -> None:
    """Docstrings, annotations and logs have none; equal changes are numbered, and each fault is one change."""
    found = mutants(SOURCE)
    assert {(mutant.line, mutant.scope, mutant.change) for mutant in found} == {
        (2, "", "3 → 4"),
        (3, "pay", "0 → 1"),
        (6, "pay", "tokens <= free and not LIMIT → (not LIMIT)"),
        (6, "pay", "tokens <= free and not LIMIT → (tokens <= free or not LIMIT)"),
        (6, "pay", "tokens <= free → (tokens < free)"),
        (6, "pay", "tokens <= free and not LIMIT → (tokens <= free)"),
        (6, "pay", "not LIMIT → (LIMIT)"),
        (7, "pay", "raise ValueError → pass"),
        (8, "pay", "max(tokens, free) * 2 → (max(tokens, free) // 2)"),
        (8, "pay", "max(tokens, free) → (min(tokens, free))"),
        (8, "pay", "max(tokens, free) * 2 → None"),
        (8, "pay", "2 → 3"),
    }
    assert len(found) == 12
    sources = {mutant.change: mutant.source for mutant in found}
    assert sources["3 → 4"] == SOURCE.replace("LIMIT = 3", "LIMIT = 4")
    assert sources["tokens <= free → (tokens < free)"] == SOURCE.replace("tokens <= free", "(tokens < free)")
    for mutant in found:
        compile(mutant.source, "mutant", "exec")


@pytest.mark.parametrize("module", TARGETS)
def test_each_explained_survivor_is_a_fault_of_today(module: str) -> None:
    """An entry whose code has changed is removed or renewed; each has a reason."""
    faults = {(mutant.scope, mutant.change) for mutant in mutants((ROOT / module).read_text())}
    reasons = explained(module)
    assert reasons.keys() <= faults
    assert all(len(reason) > 20 for reason in reasons.values())
