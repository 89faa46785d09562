"""Clips of a command line: files, directories, patterns, addresses and standard input, in order."""

from __future__ import annotations

import base64
import glob
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# fmt: off
SUFFIXES = frozenset((
    ".3g2", ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".asf", ".au", ".avi", ".awb",
    ".caf", ".dts", ".eac3", ".f4v", ".flac", ".flv", ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2",
    ".mp3", ".mp4", ".mpc", ".mpeg", ".mpg", ".mts", ".mxf", ".oga", ".ogg", ".ogv", ".opus", ".ra", ".rm", ".snd",
    ".spx", ".ts", ".tta", ".vob", ".w64", ".wav", ".wave", ".webm", ".weba", ".wma", ".wmv", ".wv",
))
# fmt: on
"""Suffixes of audio and video files, by which those of a directory are chosen. Files that are named need none."""

MAX_INLINE_BYTES = (10 * 1024 * 1024 - 1 - 64) // 4 * 3
"""Largest file in bytes that is sent as it is: its base64 text fits the service's default `max_inline_chars`."""

_SHRINK_TIMEOUT_S = 600


class SourceError(Exception):
    """A clip cannot be read."""


@dataclass(frozen=True, slots=True)
class Source:
    """One clip. `path` is None for an address and for standard input; `problem` says why there is no clip."""

    name: str
    path: Path | None = None
    relative: Path = Path()
    """Path of results in a directory, without the suffix of their format."""
    problem: str = ""

    @property
    def is_url(self) -> bool:
        """True if the service downloads the clip."""
        return _is_url(self.name) and self.path is None

    def data(self, on_shrunk: Callable[[str], None] = lambda _: None) -> str:
        """Return the clip as a request carries it: its address, or a data URL. Blocking. Raises `SourceError`.

        `on_shrunk` gets a line about a file that is too large for a request and is sent as 16 kHz mono, as the model
        hears it.
        """
        if self.problem:
            raise SourceError(self.problem)
        if self.is_url:
            return self.name
        try:
            content = self._read()
        except OSError as error:
            raise SourceError(error.strerror or str(error)) from None
        if not content:
            raise SourceError("the file is empty")
        if len(content) > MAX_INLINE_BYTES:
            size = len(content)
            content = _shrunk(self.path, content)
            on_shrunk(
                f"{size / 1e6:.1f} MB are too large for a request; sent as 16 kHz mono, {len(content) / 1e6:.1f} MB"
            )
        return f"data:;base64,{base64.b64encode(content).decode()}"

    def _read(self) -> bytes:
        if self.path is not None:
            return self.path.read_bytes()
        if sys.stdin.isatty():
            raise SourceError("standard input is a terminal; redirect a file to it")
        return sys.stdin.buffer.read()


def expand(words: Iterable[str]) -> Iterator[Source]:
    """Yield the clips of the words of a command line in their order; those of a directory by their paths."""
    for word in words:
        path = Path(word)
        if word == "-":
            yield Source("stdin", relative=Path("stdin"))
        elif _is_url(word):
            yield Source(word, relative=Path(re.sub(r"[^\w.-]+", "_", word.partition("://")[2])[:100] or "url"))
        elif path.is_dir():
            yield from _of_directory(path)
        elif not path.exists() and any(sign in word for sign in "*?["):
            yield from _of_pattern(word)
        else:
            yield Source(word, path, Path(path.name), "" if path.exists() else "no such file")


def _of_directory(directory: Path) -> Iterator[Source]:
    """Yield audio and video files below a directory, without hidden ones."""
    found = False
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            found = True
            yield Source(str(path), path, relative)
    if not found:
        yield Source(str(directory), directory, Path(directory.name), "the directory has no audio or video file")


def _of_pattern(pattern: str) -> Iterator[Source]:
    """Yield what a pattern finds that no shell has expanded; `**` stands for directories at any depth."""
    found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207 - a pattern may be absolute
    for name in found:
        yield Source(name, Path(name), Path(Path(name).name))
    if not found:
        yield Source(pattern, Path(pattern), Path(), "no file matches the pattern")


def _is_url(word: str) -> bool:
    return word.lower().startswith(("http://", "https://"))


def _shrunk(path: Path | None, content: bytes) -> bytes:
    """Return the audio as FLAC or Opus, made in a separate process. Raises `SourceError`."""
    command = [
        sys.executable,
        "-m",
        "serving.cli.caption.shrink",
        str(MAX_INLINE_BYTES),
        *([str(path)] if path else []),
    ]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, input=None if path else content, capture_output=True, timeout=_SHRINK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"cannot be made smaller within {_SHRINK_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        raise SourceError(next((line for line in reversed(lines) if line), "cannot be made smaller"))
    return done.stdout
