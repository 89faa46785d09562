"""Input files of batches: JSON lines, read one by one, of which none is kept.

Everything here blocks and is for a thread: a line is read with a bound, parsed with the bounds of a request's body,
and only its custom id and its position in the file are kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.batch.store import InputLine
from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

MAX_LINES = 50_000
"""Most lines of a batch (OpenAI's limit)."""

_MAX_ERRORS = 100
"""Errors after which the rest of a file is not looked at."""

_MAX_ID_CHARACTERS = 512
_PREFIX = "/compatible-mode"


@dataclass(slots=True)
class CheckedInput:
    """Lines of an input file, or what is wrong with it, as OpenAI's `errors.data` has it."""

    lines: list[InputLine] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    model: str | None = None

    def refuse(self, code: str, message: str, *, line: int | None = None, param: str | None = None) -> None:
        """Add an error."""
        self.errors.append({"code": code, "line": line, "message": message, "param": param})


@dataclass(frozen=True, slots=True)
class InputRules:
    """Rules for the lines of a batch. `parse` returns the object of a JSON text, or raises `InvalidRequest`."""

    endpoint: str
    model_names: Collection[str]
    max_line_bytes: int
    parse: Callable[[bytes], dict[str, Any]]


def check_input(path: Path, rules: InputRules) -> CheckedInput:
    """Read an input file and check every line, up to a hundred errors."""
    found, ids = CheckedInput(), set[bytes]()
    for number, offset, content in _lines(path, rules.max_line_bytes):
        if len(found.lines) >= MAX_LINES:
            found.refuse("too_many_tasks", f"The file has more than {MAX_LINES} lines.")
            break
        if len(content) > rules.max_line_bytes:
            found.refuse("line_too_long", f"The line has more than {rules.max_line_bytes} bytes.", line=number)
        elif content.strip():
            line = _checked(found, rules, number, content, ids)
            if line is not None:
                found.lines.append(InputLine(number, line, offset, len(content)))
        if len(found.errors) >= _MAX_ERRORS:
            break
    if not found.lines and not found.errors:
        found.refuse("empty_file", "The file has no line.")
    return found


def read_line(path: Path, line: InputLine) -> bytes:
    """Return the bytes of a line."""
    with path.open("rb") as file:
        file.seek(line.offset)
        return file.read(line.length)


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line; of one that is too long, only as many bytes as show that it is."""
    with path.open("rb") as file:
        number = offset = 0
        while content := file.readline(max_line_bytes + 1):
            number += 1
            yield number, offset, content
            offset += len(content)
            while len(content) > max_line_bytes and not content.endswith(b"\n"):  # the rest of a line that is too long
                content = file.readline(max_line_bytes + 1)
                offset += len(content)


def _checked(found: CheckedInput, rules: InputRules, number: int, content: bytes, ids: set[bytes]) -> str | None:
    """Return the custom id of a line, `None` if the line is wrong and an error was added."""
    try:
        values = rules.parse(content)
    except InvalidRequest:
        found.refuse("invalid_json_line", "The line is not a JSON object, or has too many values.", line=number)
        return None
    custom_id, body = values.get("custom_id"), values.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARACTERS or "\0" in custom_id:
        message = f"custom_id must be a text of 1 to {_MAX_ID_CHARACTERS} characters."
        found.refuse("missing_required_parameter", message, line=number, param="custom_id")
        return None
    digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
    if digest in ids:
        message = f"The custom_id {custom_id[:64]!r} is in an earlier line, too."
        found.refuse("duplicate_custom_id", message, line=number, param="custom_id")
        return None
    ids.add(digest)
    if values.get("method") != "POST":
        found.refuse("invalid_method", "method must be 'POST'.", line=number, param="method")
    elif not isinstance(url := values.get("url"), str) or url.removeprefix(_PREFIX) != rules.endpoint:
        message = f"url must be the endpoint of the batch: {rules.endpoint}."
        found.refuse("invalid_url", message, line=number, param="url")
    elif not isinstance(body, dict):
        found.refuse("missing_required_parameter", "body must be an object.", line=number, param="body")
    elif not isinstance(model := body.get("model"), str) or model not in rules.model_names:
        message = f"The model {str(body.get('model'))[:64]!r} does not exist."
        found.refuse("model_not_found", message, line=number, param="body.model")
    else:
        found.model = found.model or model
        return custom_id
    return None
