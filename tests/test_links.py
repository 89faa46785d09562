"""Links of every Markdown file: their files and headings exist."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest

from tests.support.language import ROOT, tracked

if TYPE_CHECKING:
    from pathlib import Path

_FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)|<(?:a|img)\s[^>]*(?:href|src)=\"([^\"]+)\"",
    re.MULTILINE,
)
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


@functools.cache
def existing() -> set[Path]:
    """Return the files that git tracks, and the directories that hold some."""
    files = tracked()
    return {*files, *(parent for path in files for parent in path.parents if parent.is_relative_to(ROOT))}


def pages() -> list[Path]:
    """Return every Markdown file that git tracks."""
    return [path for path in tracked() if path.suffix == ".md"]


def links(text: str) -> list[str]:
    """Return the targets of links and images that are not in code."""
    prose = _INLINE_CODE.sub("", _FENCED.sub("", text))
    return [next(filter(None, found.groups())) for found in _LINK.finditer(prose)]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page: its headings' slugs, and explicit ids."""
    prose = _FENCED.sub("", text)
    seen: Counter[str] = Counter()
    found = set(re.findall(r"<[^>]+\s(?:id|name)=\"([^\"]+)\"", prose))
    for heading in re.findall(r"^ {0,3}#{1,6}\s+(.+?)\s*#*\s*$", prose, re.MULTILINE):
        slug = slug_of(heading)
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def slug_of(heading: str) -> str:
    """Return GitHub's slug: the visible text in lower case without punctuation, each space a hyphen."""
    visible = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    visible = re.sub(r"(?<!\w)([*_]{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2", visible)
    return re.sub(r"[^\w\- ]", "", visible.lower()).replace(" ", "-")


def broken(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that have no tracked file, directory or heading."""
    return [link for link in links(text) if not _EXTERNAL.match(link) and not _resolves(page, text, link)]


def _resolves(page: Path, text: str, link: str) -> bool:
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    if target not in existing():
        return False
    if not anchor:
        return True
    return target.suffix == ".md" and anchor in anchors(text if target == page else target.read_text())


def test_relative_links_lead_somewhere() -> None:
    """Each relative link points to a tracked file or directory, and its anchor to a heading."""
    found = {str(page.relative_to(ROOT)): broken(page, page.read_text()) for page in pages()}
    assert {page: targets for page, targets in found.items() if targets} == {}


def test_links_are_found() -> None:
    """The checker finds the links of this repository."""
    assert sum(len(links(page.read_text())) for page in pages()) > 100


@pytest.mark.parametrize(
    ("heading", "slug"),
    [
        ("Back up the ledger", "back-up-the-ledger"),
        ("Restore: `pg_restore`, step 2", "restore-pg_restore-step-2"),
        ("A tenant's *API* key", "a-tenants-api-key"),
        ("Why & how", "why--how"),
        ("[0003](0003-long-clips.md): long clips", "0003-long-clips"),
        ("Größe", "größe"),
    ],
)
def test_slugs_are_those_of_github(heading: str, slug: str) -> None:
    """Markup and punctuation vanish, spaces become hyphens, letters of any language and underscores stay."""
    assert slug_of(heading) == slug


def test_a_second_heading_of_the_same_text_gets_a_number() -> None:
    """Repeated headings are numbered from 1; headings in code are none."""
    assert anchors("# A\n## A\n```\n# B\n```\n") == {"a", "a-1"}


@pytest.mark.parametrize(
    "link", ["missing.md", "README.md#no-such-heading", "#no-such-heading", "../README.md", ".git/config", "Makefile#x"]
)
def test_broken_links_are_found(link: str) -> None:
    """A missing file, a missing heading, and a file that git does not track are reported."""
    assert broken(ROOT / "README.md", f"# Title\n[a]({link}) `[b](in-code.md)` [c](https://example.com/x)\n") == [link]
