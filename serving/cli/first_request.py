"""The first request of a person at a terminal: a key for it, and the command to paste."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from serving.tenancy.database import migrate, open_database
from serving.tenancy.keys import development_key

if TYPE_CHECKING:
    from serving.config import Settings

SAMPLE = Path(__file__).parents[1] / "embedded" / "sample.mp3"
"""A short clip for the first request."""


def with_development_key(settings: Settings) -> Settings:
    """Return settings with a development key, where logs are `text` and the database has no key.

    Raises `UnusableDatabase`.
    """
    if settings.log_format != "text" or settings.development_key is not None:
        return settings
    database = open_database(settings)
    try:
        migrate(database)
        key = development_key(settings, database)
    except (SQLAlchemyError, OSError):
        return settings  # the database is away; the service waits for it and logs the reason
    finally:
        database.dispose()
    return settings.model_copy(update={"development_key": SecretStr(key)}) if key else settings


def print_first_request(origin: str, settings: Settings) -> None:
    """Print a command that captions the sample, where logs are `text`."""
    if settings.log_format == "text":
        print(_first_request(origin, settings), file=sys.stderr)  # noqa: T201


def _first_request(origin: str, settings: Settings) -> str:
    key = settings.development_key.get_secret_value() if settings.development_key else "YOUR_KEY"
    header = f" -H 'Authorization: Bearer {key}'" if settings.auth else ""
    option = f" --key {key}" if settings.auth else ""
    program, sample = _program(), shlex.quote(_shown(SAMPLE))
    return f"""
Try it:

  {program} caption --url {origin}{option} {sample}

or, as any client would:

  (printf '{{"model":"{settings.served_model_name}","messages":[{{"role":"user","content":[{{"type":"input_audio",'
   printf '"input_audio":{{"data":"data:;base64,%s"}}}}]}}]}}' "$(base64 -w0 {sample})") |
  curl -sS {origin}/v1/chat/completions -H 'Content-Type: application/json'{header} -d @- | python3 -m json.tool
"""


def _program() -> str:
    """Return the word that starts this program in another terminal."""
    program = Path(sys.argv[0])
    if program.name != "captioner" or shutil.which("captioner") == str(program):
        return "captioner"
    return shlex.quote(_shown(program.absolute()))


def _shown(path: Path) -> str:
    """Return the path relative to the working directory if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
