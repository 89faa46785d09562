"""A checker of prose: words that CONTRIBUTING keeps out of docstrings, comments, log messages, alerts and Markdown.

    python -m tests.support.language [FILE …]     # without files: everything that git tracks

Code, names in backquotes, quotations and the texts copied from the API manual (marked `# sic`) are not prose.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parents[2]

BANNED = re.compile(
    r"\b(told|tells|whoever|whomever|anew|lest|mend(?:s|ed|ing)?|farewell|besides?|by itself|of its own"
    r"|so (?:long|many))\b",
    re.IGNORECASE,
)
FIRST_WORD = re.compile(r"(What|How|Who|Whose|Whom|Whether|Where|Why|Of)\b")
"""A docstring begins with a thing or an imperative verb, not with a clause that stands for one."""

_SUFFIXES = {".py", ".md", ".yml", ".yaml", ".tpl", ".lua", ".toml", ".sh", ".env", ".Dockerfile"}
_NOT_PROSE = re.compile(
    r"^(benchmarks/results/.*\.(html|json)|benchmarks/baselines/|deploy/requirements/|tests/sdk/(node|samples)/"
    r"|serving/embedded/checkpoint/|deploy/embedded/corpus/captions\.py|tests/support/language\.py|tests/test_language\.py)"
)
"""Data, wire samples, lock files, the stand-in's vocabulary, and this list."""

_LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_CODE_IN_MARKDOWN = re.compile(r"```.*?```|`[^`\n]*`|\[[^\]]*\]\([^)]*\)|\"[^\"\n]*\"|“[^”\n]*”", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that breaks a rule."""

    path: Path
    line: int
    word: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word}"


def findings(paths: Iterable[Path]) -> Iterator[Finding]:
    """Yield each banned word and each docstring with a wrong first word, file by file."""
    for path in paths:
        relative = path.relative_to(ROOT) if path.is_absolute() else path
        if _NOT_PROSE.match(str(relative)) or not (path.suffix in _SUFFIXES or path.name == "Makefile"):
            continue
        text = (ROOT / relative).read_text(errors="replace")
        nodes = list(ast.walk(ast.parse(text))) if path.suffix == ".py" else []
        # Most files have no such word anywhere, so only some are taken apart.
        for line, prose in _prose(relative, text, nodes) if BANNED.search(text) else ():
            for found in BANNED.finditer(_CODE_IN_MARKDOWN.sub(_blank, prose)):
                yield Finding(relative, line + prose.count("\n", 0, found.start()), found[0])
        if path.suffix == ".py":
            for line, docstring in _docstrings(nodes):
                if found_first := FIRST_WORD.match(docstring):
                    yield Finding(relative, line, f"docstring begins with {found_first[0]}")


def tracked() -> list[Path]:
    """Return every file that git tracks and that is there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _prose(path: Path, text: str, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield the parts of a file that people read, with the line on which each begins."""
    if path.suffix == ".md":
        yield 1, _CODE_IN_MARKDOWN.sub(_blank, text)
    elif path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and "# sic" not in token.string:
                yield token.start[0], token.string
        yield from _docstrings(nodes)
        yield from _log_messages(nodes)
    elif "alerts" in path.name:
        yield 1, text
    else:
        comment = "--" if path.suffix == ".lua" else "#"
        for number, line in enumerate(text.splitlines(), 1):
            if comment in line:
                yield number, line[line.index(comment) :]


def _docstrings(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield docstrings, those behind attributes included."""
    for node in nodes:
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if isinstance(statement, ast.Expr) and isinstance(value := statement.value, ast.Constant):
                yield value.lineno, str(value.value)


def _log_messages(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in _LOG_METHODS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in {"log", "logger", "logging"}
        ):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.lineno, argument.value


def _blank(match: re.Match[str]) -> str:
    """Blank out code, and keep the lines."""
    return re.sub(r"[^\n]", " ", match[0])


def main(arguments: list[str]) -> int:
    """Print what breaks the rules; return 1 if anything does."""
    found = list(findings([Path(name).resolve() for name in arguments] or tracked()))
    for finding in found:
        print(finding)  # noqa: T201 - a command
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
