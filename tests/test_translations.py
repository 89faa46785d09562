"""Chinese pages: each has the structure, code, links and figures of its English page, and all prose is Chinese.

A page is compared block by block (heading, paragraph, list item, table row, code), so that an English page that gains,
loses or changes a block, or gains or loses a sentence, fails here until its translation follows. A sentence that is
reworded without a new name, figure or link passes. A quotation (`>`) on the Chinese page is the translator's note on
code, which stays English.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.language import ROOT, tracked
from tests.test_links import anchors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRANSLATED = ["README.md", "deploy/clients.md", "deploy/parameters.md"]
LANGUAGE = ".zh-CN"

FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
INVISIBLE = re.compile(r"<!--.*?-->|<a id=\"[^\"]*\"></a>", re.DOTALL)
CELL_END = re.compile(r"(?<!\\)[|]")
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
FIGURE = re.compile(r"\d(?:[\d,.]*\d)?")
HAN = re.compile(r"[\u4e00-\u9fff]")
ENDS = re.compile(r"(?<!^\*\*\d)[.?!](?=\s|\*\*|$)"), re.compile(r"[\u3002\uff1f\uff01]")
"""Ends of sentences in English and in Chinese: a translation has a sentence for each sentence."""
WORD = re.compile(r"[A-Za-z]{2,}")
ENGLISH_WORD = re.compile(r"(?<![\w.\"])(?!(?:captioner|true|false|null|url)\b)[a-z]{3,}\b")
ENGLISH_SENTENCE = re.compile(r"(?:\b[A-Za-z]{2,}[ ,;:]+){4,}")
HAN_PER_WORD = 1.15, 2.7
"""Fewest and most Chinese characters for each translated word in a block: the pages have 1.2 to 2.6."""

RAW_EMPHASIS = re.compile(r"\*\*[^*\n]+[\uff00-\uffef\u3000-\u303f`]\*\*[\u4e00-\u9fffA-Za-z]")
"""Markdown renders no bold text that ends with punctuation and goes on without a space."""
RAW_URL = re.compile(r"https?://[\w.:/-]*[\u3000-\uffef]")
"""GitHub takes what follows a bare URL without a space as a part of the URL."""


@dataclass(frozen=True, slots=True)
class Block:
    """One heading, paragraph, list item, table row or fenced code of a page."""

    kind: str
    text: str

    @property
    def code(self) -> Counter[str]:
        """Names and values in backquotes."""
        return Counter(CODE.findall(self.text))

    @property
    def links(self) -> Counter[str]:
        """Targets of links, language aside."""
        return Counter(target.replace(LANGUAGE, "") for _, target in LINK.findall(self.text))

    @property
    def figures(self) -> Counter[str]:
        """Numbers outside code."""
        return Counter(FIGURE.findall(self.prose))

    @property
    def prose(self) -> str:
        """Text that a person translates: without code and the targets of links."""
        return CODE.sub("", LINK.sub(r"\1", self.text))


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page in order; a table row's kind has its number of cells."""
    for part in FENCED.split(page):
        if part.startswith("```"):
            yield Block("code", part)
            continue
        for paragraph in re.split(r"\n\s*\n", INVISIBLE.sub("", part)):
            for text in re.split(r"\n(?=\||- |#)", paragraph.strip()):
                if heading := re.match(r"#+ ", text):
                    yield Block(f"heading {len(heading[0]) - 1}", text)
                elif text.startswith("|"):
                    yield Block(f"row of {len(CELL_END.findall(text)) - 1}", text)
                elif text.strip():
                    yield Block("item" if text.startswith("- ") else "paragraph", text)


def differences(english: str, chinese: str) -> Iterator[str]:
    """Yield each block of the translation that differs from the English page in something that is not language."""
    pages = list(blocks(english)), [block for block in blocks(chinese) if not block.text.startswith(">")]
    kinds = [[block.kind for block in page] for page in pages]
    if kinds[0] != kinds[1]:
        same = next((n for n, (a, b) in enumerate(zip(*kinds, strict=False)) if a != b), min(map(len, kinds)))
        yield f"blocks: {[page[same : same + 1] for page in pages]}"
        return
    for source, translation in zip(*pages, strict=True):
        if source.kind == "code":
            if source.text != translation.text:
                yield f"code: {translation.text[:80]}"
            continue
        yield from (f"{what}: {translation.text[:80]}" for what in _broken_rules(source, translation))
    _, _, below_title = english.partition("\n")
    if missing := anchors(below_title) - anchors(chinese):
        yield f"anchors: {sorted(missing)}"


def _broken_rules(source: Block, translation: Block) -> Iterator[str]:
    for what in ("code", "links", "figures"):
        if (was := getattr(source, what)) != (now := getattr(translation, what)):
            yield f"{what} {dict(was - now)} → {dict(now - was)}"
    sentences = [len(ends.findall(block.prose)) for ends, block in zip(ENDS, (source, translation), strict=True)]
    if sentences[0] != sentences[1]:
        yield f"sentences {sentences[0]} → {sentences[1]}"
    if source.text.count("**") != translation.text.count("**"):
        yield "emphasis"
    if RAW_EMPHASIS.search(translation.text) or RAW_URL.search(CODE.sub("", translation.text)):
        yield "rendering"
    if found := ENGLISH_SENTENCE.search(translation.prose):
        yield f"untranslated {found[0]!r}"
    words = (Counter(WORD.findall(source.prose)) - Counter(WORD.findall(translation.prose))).total()
    characters = len(HAN.findall(translation.prose))
    fewest, most = HAN_PER_WORD
    if ENGLISH_WORD.search(source.prose) and not characters:
        yield "untranslated"
    elif words >= 8 and not fewest <= characters / words <= most:
        yield f"length {characters / words:.2f}"
    cells = zip(source.prose.split("|"), translation.prose.split("|"), strict=False)
    if any(ENGLISH_WORD.search(cell) and not HAN.search(translated) for cell, translated in cells):
        yield "untranslated cell"


def translation_of(page: Path) -> Path:
    """Return the path of a page's Chinese translation."""
    return page.with_suffix(f"{LANGUAGE}{page.suffix}")


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translation_has_all_of_its_page(name: str) -> None:
    """Blocks, code, links, names and figures are those of the English page, and all prose is Chinese."""
    page = ROOT / name
    assert list(differences(page.read_text(), translation_of(page).read_text())) == []


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_pages_link_to_each_other_at_the_top(name: str) -> None:
    """The first link of a page is its other language; a Chinese page links to Chinese pages where they exist."""
    page = ROOT / name
    translation = translation_of(page)
    assert page.read_text().splitlines()[2] == f"[\u7b80\u4f53\u4e2d\u6587]({translation.name})"
    assert translation.read_text().splitlines()[2] == f"[English]({page.name})"
    targets = [target for _, target in LINK.findall(translation.read_text())][1:]
    assert not {(page.parent / target).resolve() for target in targets} & {ROOT / other for other in TRANSLATED}


def test_every_translation_is_checked() -> None:
    """Each Chinese page that git tracks is compared with its English page."""
    assert {str(path.relative_to(ROOT)) for path in tracked() if path.stem.endswith(LANGUAGE)} == {
        str(translation_of(ROOT / name).relative_to(ROOT)) for name in TRANSLATED
    }


ENGLISH = """# Clips

A clip has at most 40 minutes, see [limits](limits.md) and `max_audio_s`. Its description is English.

## Formats

| Field | Meaning |
|---|---|
| `file` | the clip |

```console
$ captioner caption a.ogg
```

- **All formats** are read.
"""
CHINESE = """# 音频

音频最长 40 分钟 见[限制](limits.zh-CN.md)和 `max_audio_s`。描述为英文。

<a id="formats"></a>

## 格式

| 字段 | 含义 |
|---|---|
| `file` | 音频 |

```console
$ captioner caption a.ogg
```

- 读取**所有格式**。
"""


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        ("40 分", "30 分", "figures"),
        ("`max_audio_s`", "`max_clip_s`", "code"),
        ("limits.zh-CN.md", "bounds.md", "links"),
        ("a.ogg\n", "b.ogg\n", "code"),
        ("## 格", "# 格", "blocks"),
        ('<a id="formats"></a>', "", "anchors"),
        ("| `file` | 音频 |\n", "", "blocks"),
        ("| `file` | 音频 |", "| `file` | 音频 | 长 |", "blocks"),
        ("| `file` | 音频 |", "| `file` | the clip |", "untranslated"),
        ("- 读取**所有格式**。\n", "", "blocks"),
        ("读取**所有格式**", "所有格式", "emphasis"),
        ("读取**所有格式**。", "**所有格式。**读取", "rendering"),
        ("描述为英文。", "It is described in English for all who read it.", "untranslated 'It is"),
        ("描述为英文。", "", "sentences 2 → 1"),
        ("描述为英文。", "。", "length"),
    ],
)
def test_what_falls_behind_is_found(was: str, now: str, found: str) -> None:
    """A block, name, figure, link or sentence that is missing from, or differs in, a translation is reported."""
    assert list(differences(ENGLISH, CHINESE)) == []
    assert CHINESE.count(was) == 1
    assert any(each.startswith(found) for each in differences(ENGLISH, CHINESE.replace(was, now)))
