"""Base64 text of clips, as people and programs write it (PROTOCOL 7.2)."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

from serving.errors import InvalidAudioUrl

_NOT_BASE64 = "The data is not base64."
_WHITESPACE = b" \t\n\r\v\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: bytes) -> bytes:
    """Decode base64, tolerating ASCII whitespace, missing padding, the URL-safe alphabet, and percent-escapes of these.

    Raises `InvalidAudioUrl` for anything else.
    """
    if b"%" in text:
        text = unquote_to_bytes(text)
    compact = text.translate(_URL_SAFE, _WHITESPACE)
    digits = compact.rstrip(b"=")
    try:
        if len(compact) - len(digits) > 2:  # noqa: PLR2004 - more padding than base64 ever has
            raise InvalidAudioUrl.because(_NOT_BASE64)
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except binascii.Error:
        raise InvalidAudioUrl.because(_NOT_BASE64) from None
