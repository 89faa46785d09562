"""The prose of the project keeps the rules of CONTRIBUTING."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import language

if TYPE_CHECKING:
    from pathlib import Path


def test_prose_uses_plain_words() -> None:
    """No docstring, comment, log message, alert or page has a banned word or a docstring with a wrong first word."""
    found = [str(finding) for finding in language.findings(language.tracked())]
    assert found == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", '"""What is read.\n\nIt is told\nanew."""\n', ["told", "anew", "docstring begins with What"]),
        ("a.py", 'x = "told"  # whoever comes\nlog.info("it tells")\n', ["whoever", "tells"]),
        ("a.py", 'x = 1\n"""Of a clip, by itself."""\n', ["by itself", "docstring begins with Of"]),
        ("a.md", "It tells `told` and\n```\nlest\n```\nfarewell.\n", ["tells", "farewell"]),
        ("captioner.alerts.yml", "summary: so many are told\n", ["so many", "told"]),
        ("b.lua", "local told = 1 -- told beside it\n", ["told", "beside"]),
        ("c.py", "# a text of the manual that is told  # sic\n", []),
    ],
)
def test_the_checker_finds_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    """Each kind of prose is read, and code is not."""
    monkeypatch.setattr(language, "ROOT", tmp_path)
    (tmp_path / name).write_text(text)
    assert [finding.word for finding in language.findings([tmp_path / name])] == words
