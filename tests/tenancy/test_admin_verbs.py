"""The table of administration verbs, and the list in the README made from it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from serving.tenancy.admin.verbs import GROUPS, VERBS, Verb, markdown

README = Path(__file__).parents[2] / "serving" / "tenancy" / "README.md"


def test_the_readme_has_the_table() -> None:
    """The list in the README is `markdown()` of `admin/verbs.py`: print it with Python and paste it."""
    assert f"-->\n{markdown()}\n<!-- /verbs -->" in README.read_text()


def test_words_and_routes_are_unique() -> None:
    """No two verbs have the same words or the same route, and each group has verbs."""
    words = [verb.words for verb in VERBS]
    routes = [route for verb in VERBS for route in verb.routes]
    assert len(set(words)) == len(words)
    assert len(set(routes)) == len(routes)
    assert {name.split()[0] for name in words if " " in name} == set(GROUPS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.words)
def test_a_row_fits_its_function(verb: Verb) -> None:
    """The function accepts every parameter, names are distinct, and placeholders of paths are parameters."""
    names = [each.name for each in verb.parameters]
    assert len(set(names)) == len(names)
    assert len({each.key for each in verb.parameters}) == len(names)
    inspect.signature(verb.run).bind(object(), **dict.fromkeys(names))
    for _, path in verb.routes:
        assert {part.strip("{}") for part in path.split("/") if part.startswith("{")} <= {
            each.key for each in verb.parameters if each.word
        }
