"""`captioner completion bash|zsh|fish`: a script that completes commands, verbs and options in a shell.

The script has the words of this version; shells complete file names where no word fits.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from serving.cli.terminal import fail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHELLS = ("bash", "zsh", "fish")

_OF_SETTINGS = ("serve", "cluster", "doctor", "admin")
"""Commands whose options are settings."""

_OWN_OPTIONS = {"doctor": ["--json"]}
_WORDS = {
    "settings": ["--toml"],
    "completion": list(SHELLS),
    "leave": ["--address", "--instance", "--within-s"],
    "version": [],
    "help": [],
}


def main(argv: Sequence[str]) -> int:
    """Print the script for a shell; return the exit status."""
    match list(argv[1:]):
        case ["bash"]:
            print(_bash())  # noqa: T201
        case ["zsh"]:
            print(f"#compdef captioner\nautoload -U +X bashcompinit && bashcompinit\n{_bash()}")  # noqa: T201
        case ["fish"]:
            print(_fish())  # noqa: T201
        case [] | ["--help"] | ["-h"]:
            print(_HELP)  # noqa: T201
        case [other, *_]:
            return fail(f"completion: no script for {other!r}; choose from {', '.join(SHELLS)}")
    sys.stdout.flush()
    return 0


_HELP = """usage: captioner completion bash|zsh|fish

Print a script that completes commands and options. For one shell, or for good:

  bash  eval "$(captioner completion bash)"
        captioner completion bash > ~/.local/share/bash-completion/completions/captioner
  zsh   eval "$(captioner completion zsh)"   in ~/.zshrc, after compinit
  fish  captioner completion fish > ~/.config/fish/completions/captioner.fish"""


def words() -> dict[str, list[str]]:
    """Return the words that may follow each command, by the words before them; the commands themselves by ``."""
    # Imported here: each of these takes tenths of a second.
    administration = importlib.import_module("serving.cli.administration")
    settings = importlib.import_module("serving.cli.settings_help")
    caption = importlib.import_module("serving.cli.caption.command")
    found = {name: list(after) for name, after in _WORDS.items()}
    found["caption"] = _options(caption.parser())
    flags = [settings.flag(name) for name in settings.FIELDS]
    for name in _OF_SETTINGS:
        found[name] = [*_OWN_OPTIONS.get(name, ()), *flags]
    found |= _verbs(administration.parser(), ())
    return {"": sorted({name.partition(" ")[0] for name in found}), **found}


def _verbs(parser: argparse.ArgumentParser, before: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the words after each verb: further verbs, or options."""
    for action in parser._actions:  # noqa: SLF001 - argparse shows them nowhere else
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found = {" ".join(before): list(action.choices)} if before else {}
            for name, verb in action.choices.items():
                found |= _verbs(verb, (*before, name))
            return found
    return {" ".join(before): _options(parser)}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]  # noqa: SLF001


def _bash() -> str:
    cases = "\n".join(f'    "{name}") choices="{" ".join(after)}" ;;' for name, after in words().items())
    return _BASH.replace("CASES", cases)


_BASH = """\
_captioner() {
  local current=${COMP_WORDS[COMP_CWORD]} before= choices=
  local at
  for ((at = 1; at < COMP_CWORD && at < 3; at++)); do
    case ${COMP_WORDS[at]} in -*) break ;; esac
    case "$before" in
      "" | tenants | keys | plans | prices) before="${before:+$before }${COMP_WORDS[at]}" ;;
    esac
  done
  case "$before" in
CASES
  esac
  COMPREPLY=($(compgen -W "$choices" -- "$current" || true))
}
complete -o default -o bashdefault -F _captioner captioner"""


def _fish() -> str:
    return "\n".join(_fish_lines())


def _fish_lines() -> Iterator[str]:
    for name, after in words().items():
        if not name:
            yield f"complete -c captioner -f -n __fish_use_subcommand -a '{' '.join(after)}'"
            continue
        condition = " and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        condition = condition.replace(" and ", "; and ")
        verbs = [word for word in after if not word.startswith("-")]
        if verbs:
            unseen = f"{condition}; and not __fish_seen_subcommand_from {' '.join(verbs)}"
            yield f"complete -c captioner -f -n '{unseen}' -a '{' '.join(verbs)}'"
        for option in after:
            if option.startswith("--"):
                yield f"complete -c captioner -n '{condition}' -l {option[2:]}"
