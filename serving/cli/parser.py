"""`argparse` with errors of one line, which suggest the option or command that was meant."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, NoReturn

from serving.cli.terminal import fail, similar

if TYPE_CHECKING:
    from collections.abc import Iterator


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations of options."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog, **{"allow_abbrev": False} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; exit with status 2 for an unknown option: each command for itself, so that its options are known."""
        given, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return given, rest

    def error(self, message: str) -> NoReturn:
        """Print one line and where the help is, and exit with status 2."""
        self.exit(fail(f"{self._plain(message)}; see `{self.prog} --help`"))

    def _plain(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            name = found[1].partition("=")[0]
            what = "unknown option" if name.startswith("-") else "unexpected argument"
            return f"{what} {name}{similar(name, self._options())}"
        if found := re.match(r"argument (\S+): invalid choice: '?([^',]*)'?", message):
            choices = re.findall(r"[\w.-]+", message.partition("(choose from")[2])
            what = "command" if found[1] in {"COMMAND", "VERB"} else found[1]
            return f"unknown {what} {found[2]!r}{similar(found[2], choices)}; choose from {', '.join(choices)}"
        return message

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
