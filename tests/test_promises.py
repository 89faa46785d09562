"""deploy/promises.md: each promise is on its page in these words, and each test that is named exists."""

from __future__ import annotations

import re

from tests.support.language import ROOT

PAGE = ROOT / "deploy" / "promises.md"
ROW = re.compile(r"^\| (\d+) \| \[`([^`]+)`\]\(([^)]+)\) \| (.+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`|`…::(\w+)`")
PAGES = {
    "README.md",
    *(f"deploy/{name}.md" for name in ("batches", "capacity", "cuda", "observability", "runbook", "timeline")),
    "deploy/upgrading.md",
} | {f"serving/tenancy/{name}.md" for name in ("BILLS", "README")}


def words(text: str) -> str:
    """Return text with single blanks, and with links reduced to what is read."""
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def rows() -> list[tuple[int, str, str, str]]:
    """Return number, page, promise and tests of each row."""
    found = ROW.findall(PAGE.read_text())
    for _, page, link, *_ in found:
        assert (PAGE.parent / link).resolve() == ROOT / page
    return [(int(number), page, promise.replace("\\|", "|"), tests) for number, page, _, promise, tests in found]


def test_promises_are_numbered_and_of_every_page() -> None:
    """Numbers are consecutive, no line of a table is left out, and each page makes a promise."""
    found = rows()
    assert [number for number, *_ in found] == list(range(1, len(found) + 1))
    assert len(found) == len(re.findall(r"^\| \d", PAGE.read_text(), re.MULTILINE)) > 80
    assert {page for _, page, *_ in found} == PAGES


def test_each_promise_is_on_its_page() -> None:
    """A page says what the table says: a promise that is reworded or taken out is found here."""
    pages = {page: words((ROOT / page).read_text()) for page in PAGES}
    assert [number for number, page, promise, _ in rows() if promise not in pages[page]] == []


def test_every_test_that_is_named_exists() -> None:
    """Each row names at least one test, and each of them is a function of that name in that file."""
    for number, _, _, tests in rows():
        found = TEST.findall(tests)
        assert len(found) == len(tests.split(", ")), number
        path = None
        for file, name, further in found:
            if file:
                path = ROOT / (file if file.startswith("benchmarks/") else f"tests/{file}")
            assert path is not None
            assert path.is_file(), path
            if name or further:
                assert re.search(rf"^(async )?def {name or further}\(", path.read_text(), re.MULTILINE), (number, name)


def test_every_page_of_operators_is_considered() -> None:
    """A new page in `deploy` makes promises, is a table of them, or is listed here; translations follow their page."""
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "deploy").glob("*.md") if ".zh-CN" not in path.name}
    assert pages == {page for page in PAGES if page.startswith("deploy/")} | {
        "deploy/clients.md",
        "deploy/parameters.md",
        "deploy/promises.md",
        "deploy/security.md",
    }
