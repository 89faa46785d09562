"""Audio references (PROTOCOL 7.2): a URL, a data URL, an upload's `oss://` key, or bare base64.

No function here reads a complete clip: an audio worker decodes the base64 text, off the event loop, and there it is
checked to be base64.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from serving.audio.formats import sniff
from serving.errors import AudioEmpty, InlineTooLarge, InvalidAudioUrl
from serving.types import InlineAudio, UploadedAudio, UrlAudio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.api.dialects.messages import AudioPart
    from serving.config import Settings
    from serving.types import AudioSource

MAX_URL_CHARS = 8192
MAX_MEDIA_TYPE_CHARS = 1024

_CONTROL = re.compile(r"[\x00-\x20\x7f]")

_SNIFFED_CHARS = 2048
"""Characters of bare base64 that are decoded to recognise a format: enough for the magic bytes of every format, few
enough for the event loop."""


def audio_source(part: AudioPart, headers: Mapping[str, str], settings: Settings) -> AudioSource:
    """Return the source that the reference names.

    Raises `InvalidAudioUrl`, `AudioEmpty` and `InlineTooLarge`.
    """
    reference = part.reference
    scheme = reference[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _url(reference)
    if scheme.startswith("data:"):
        comma = reference.find(",", 0, MAX_MEDIA_TYPE_CHARS)
        if comma < 0 or not reference[:comma].rstrip().lower().endswith(";base64"):
            raise InvalidAudioUrl
        return _inline(reference[comma + 1 :], settings)
    if scheme.startswith("oss://"):
        # Everything after the scheme is the key, unparsed: file names may contain `#`, `?` or `%`.
        key = reference[len("oss://") :]
        if not key or headers.get("x-dashscope-ossresourceresolve", "").lower() != "enable":
            raise InvalidAudioUrl
        return UploadedAudio(key)
    if part.may_be_bare and _begins_like_audio(reference):
        return _inline(reference, settings)
    raise InvalidAudioUrl


def _url(url: str) -> UrlAudio:
    if len(url) > MAX_URL_CHARS or _CONTROL.search(url):
        raise InvalidAudioUrl
    try:
        host = urlsplit(url).hostname
    except ValueError:
        raise InvalidAudioUrl from None
    if not host:
        raise InvalidAudioUrl
    return UrlAudio(url)


def _inline(text: str, settings: Settings) -> InlineAudio:
    if len(text) > settings.max_inline_chars:
        raise InlineTooLarge
    if not text or text.isspace():
        raise AudioEmpty
    if not text.isascii():
        raise InvalidAudioUrl
    return InlineAudio(text)


def _begins_like_audio(text: str) -> bool:
    """Return `True` if the text is base64 that begins with the magic bytes of an audio format."""
    prefix = "".join(text[:_SNIFFED_CHARS].split()).replace("-", "+").replace("_", "/")
    try:
        return sniff(base64.b64decode(prefix[: len(prefix) // 4 * 4], validate=True)) is not None
    except ValueError:
        return False
