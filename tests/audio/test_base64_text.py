"""Base64 text of clips, as people and programs write it."""

from __future__ import annotations

import base64
import random

import pytest

from serving import errors
from serving.audio.base64_text import decode_base64


@pytest.mark.parametrize("seed", range(8))
def test_base64_is_read_with_tolerance(seed: int) -> None:
    """ASCII whitespace, missing padding and the URL-safe alphabet are tolerated."""
    rng = random.Random(seed)
    data = rng.randbytes(100 + seed)
    text = base64.b64encode(data).decode()
    if seed % 2:
        text = text.rstrip("=")
    if seed % 4 > 1:
        text = text.replace("+", "-").replace("/", "_")
    text = "".join(letter + rng.choice(["", "", "", " ", "\n", "\r\n", "\t", "\v", "\f"]) for letter in text)
    assert decode_base64(text.encode()) == data


@pytest.mark.parametrize("text", ["%2B/9%0Aa", "+%2F%39a", "%0D%0A-%5F9a", "+/9a%2B%67%3D%3d", "+/9a%2Bg"])
def test_percent_escapes_are_decoded(text: str) -> None:
    """Escapes of digits, padding and white space are decoded, whatever their case."""
    assert decode_base64(text.encode()) == b"\xfb\xff\x5a\xfa"[: 3 + ("g" in text or "67" in text)]


@pytest.mark.parametrize(
    "text",
    [
        "SUQzBAAA....",
        "A",
        "AAAAA",
        "AAAA====",
        "AAA===",
        "AA=A",
        "A=",
        "AA\0A",
        "data:,A",
        "%EF%BB%BFAAAA",
        "AAA%4",
        "%25AAA",
    ],
)
def test_anything_else_is_not_base64(text: str) -> None:
    """Other characters, a lone digit, and padding where none can be are refused."""
    with pytest.raises(errors.InvalidAudioUrl):
        decode_base64(text.encode())
