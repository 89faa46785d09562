"""Audio references (PROTOCOL 7.2): a URL, a data URL, an upload's `oss://` key, or bare base64.

Blanks, line ends and byte order marks around a reference are ignored, as browsers ignore them around a URL.
No function here reads a complete clip: an audio worker decodes the base64 text, off the event loop, and there it is
checked to be base64.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from serving.audio.formats import sniff
from serving.errors import AudioEmpty, InlineTooLarge, InvalidAudioUrl
from serving.types import InlineAudio, StoredAudio, UploadedAudio, UrlAudio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.api.dialects.messages import AudioPart
    from serving.config import Settings
    from serving.types import AudioSource

MAX_URL_CHARS = 8192
MAX_MEDIA_TYPE_CHARS = 1024

_AROUND = "\ufeff\u200b" + "".join(filter(str.isspace, map(chr, range(0x3001))))
"""Characters around a reference that mean nothing: byte order mark, zero-width space, and all white space."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_QUOTED = r'"(?:[^"\\]|\\.)*+"'
_DATA_HEAD = re.compile(rf"data:((?:[^\",]|{_QUOTED})*+),", re.IGNORECASE | re.DOTALL)
"""The part of a data URL before its data, as far as a comma that is in no quoted value (`codecs="opus,vorbis"`)."""

_CUT_ESCAPE = re.compile("%[0-9A-Fa-f]?$")

_FILE_ID = re.compile("file-[0-9a-f]{32}")

_SNIFFED_CHARS = 2048
"""Characters of bare base64 that are decoded to recognise a format: enough for the magic bytes of every format, few
enough for the event loop."""


def audio_source(
    part: AudioPart, headers: Mapping[str, str], settings: Settings, *, files: bool = False
) -> AudioSource:
    """Return the source that the reference names; with `files` it may be the id of a stored file.

    Raises `InvalidAudioUrl`, `AudioEmpty` and `InlineTooLarge`.
    """
    reference = part.reference.strip(_AROUND)
    scheme = reference[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _url(reference)
    if scheme.startswith("data:"):
        head = _DATA_HEAD.match(reference, 0, MAX_MEDIA_TYPE_CHARS)
        if head is None or not _says_base64(head[1]):
            raise InvalidAudioUrl.because("A data URL should begin with data:, a media type or none, and ;base64,.")
        return _inline(reference[head.end() :], settings)
    if scheme.startswith("oss://"):
        # Everything after the scheme is the key, unparsed: file names may contain `#`, `?` or `%`, and end in blanks.
        key = part.reference.lstrip(_AROUND).rstrip("\r\n\t")[len("oss://") :]
        if not key or headers.get("x-dashscope-ossresourceresolve", "").lower() != "enable":
            raise InvalidAudioUrl.because(
                "The address of an upload needs a key and the header X-DashScope-OssResourceResolve: enable."
            )
        return UploadedAudio(key)
    if files and _FILE_ID.fullmatch(reference):
        return StoredAudio(reference)
    if part.may_be_bare and _begins_like_audio(reference):
        return _inline(reference, settings)
    raise InvalidAudioUrl.because(
        "It is neither an http(s) URL, a data URL, an upload nor base64 of audio; paths of files are never opened."
    )


def _url(url: str) -> UrlAudio:
    if len(url) > MAX_URL_CHARS or _CONTROL.search(url):
        raise InvalidAudioUrl.because(f"It has more than {MAX_URL_CHARS} characters, or a control character.")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidAudioUrl.because("Its host is malformed.") from None
    if not parts.hostname or any(map(str.isspace, parts.netloc)):
        raise InvalidAudioUrl.because("It has no host, or a blank in it.")
    return UrlAudio(url)


def _says_base64(head: str) -> bool:
    """Return whether a parameter of a media type is `base64`; it is the last one by RFC 2397, some write it earlier."""
    _, *parameters = re.sub(_QUOTED, "", head, flags=re.DOTALL).lower().split(";")
    return "base64" in (parameter.strip(_AROUND) for parameter in parameters)


def _inline(text: str, settings: Settings) -> InlineAudio:
    text = text.strip(_AROUND)
    if len(text) > settings.max_inline_chars:
        raise InlineTooLarge
    if not text:
        raise AudioEmpty
    if not text.isascii():
        raise InvalidAudioUrl.because("The data is not base64.")
    return InlineAudio(text)


def _begins_like_audio(text: str) -> bool:
    """Return `True` if the text is base64 that begins with the magic bytes of an audio format."""
    prefix = unquote(_CUT_ESCAPE.sub("", text[:_SNIFFED_CHARS]))
    prefix = "".join(prefix.split()).replace("-", "+").replace("_", "/")
    try:
        return sniff(base64.b64decode(prefix[: len(prefix) // 4 * 4], validate=True)) is not None
    except ValueError:
        return False
