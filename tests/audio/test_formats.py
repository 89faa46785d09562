"""Recognition of formats by content."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest

from serving.audio.formats import PREFIX_BYTES, is_text, sniff
from serving.audio.ogg_chain import chain_parts
from serving.audio.recognition import recognise
from tests.audio.clips import clip, clip_names, remuxed, stereo, with_av

_FIRST_WORDS = {
    "3GPP2": "3GP",
    "AIFF-C": "AIFF",
    "AMR-NB": "AMR",
    "E-AC-3": "AC-3",
    "MKA": "Matroska or WebM",
    "MKV": "Matroska or WebM",
    "MP2": "MP3",
    "NIST": "NIST SPHERE",
    "WMA": "WMA or ASF",
    "WebM": "Matroska or WebM",
}
"""Format by first word of a clip's name, if the name does not begin with that of the format."""

_TEXTS = {
    "HTML": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
    "playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/secret.ts\n",
    "concat script": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "SDP": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n",
    "DASH": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "JSON": '{"error": "nicht gefunden ü"}'.encode(),
    "UTF-16": "AccessDenied <html>".encode("utf-16"),
    "SubRip": b"1\n00:00:01,000 --> 00:00:02,000\nHello\n",
}
_NOT_AUDIO = {
    "PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(64),
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "ZIP": b"PK\x03\x04\x14\x00\x00\x00\x08\x00",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(9),
    "MIDI": b"MThd\x00\x00\x00\x06\x00\x01\x00\x02\x01\xe0",
    "WebP": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "nothing": b"",
}


@pytest.mark.parametrize("name", clip_names())
def test_a_clip_is_recognised_by_its_first_bytes(name: str) -> None:
    """Every format is recognised from the first 4 KiB, whatever else is in the file."""
    found = sniff(clip(name).data[:4096])
    first = name.split(maxsplit=1)[0]
    expected = "AAC (LATM)" if name == "AAC (LATM)" else _FIRST_WORDS.get(first, first)
    assert found is not None
    assert found.name == expected


@pytest.mark.parametrize("kind", _TEXTS)
def test_text_is_no_audio(kind: str) -> None:
    """Web pages, playlists and scripts have no format, so no demuxer sees them, and they are recognised as text."""
    assert sniff(_TEXTS[kind]) is None
    assert is_text(_TEXTS[kind])


@pytest.mark.parametrize("kind", _NOT_AUDIO)
def test_other_files_are_no_audio(kind: str) -> None:
    """Pictures, archives and programs have no format; only the empty file counts as text."""
    assert sniff(_NOT_AUDIO[kind]) is None
    assert is_text(_NOT_AUDIO[kind]) == (kind == "nothing")


def test_text_that_is_cut_within_a_character_is_text() -> None:
    """The end of the prefix may split a character."""
    assert is_text("ü".encode()[:-1])
    assert is_text(("a" * 99 + "€").encode()[:-1])
    assert not is_text(b"\xfc and more")


def test_noise_is_no_audio() -> None:
    """Random bytes do not pass for frames of MPEG audio."""
    assert [sniff(np.random.default_rng(seed).bytes(PREFIX_BYTES)) for seed in range(20)] == [None] * 20


@pytest.mark.parametrize(
    ("name", "format_name"), [("MP3", "MP3"), ("FLAC 16", "FLAC"), ("AAC (ADTS)", "AAC"), ("WAV PCM 16", "WAV")]
)
def test_id3_tags_are_skipped(name: str, format_name: str) -> None:
    """The bytes after ID3v2 tags decide, however long the tags are; bytes of no other format are MP3."""
    tags = _id3_tag(10) + _id3_tag(300_000)
    found, start, prefix = recognise(io.BytesIO(tags + clip(name).data))
    assert found is not None
    own_tag = 45 if clip(name).data.startswith(b"ID3") else 0
    assert (found.name, start) == (format_name, len(tags) + own_tag)
    assert clip(name).data[own_tag:].startswith(prefix[:100])


def test_an_id3_tag_alone_means_mp3() -> None:
    """A prefix that ends within the tag, as a check of base64 may have it, is taken for MP3."""
    assert getattr(sniff(_id3_tag(1000)[:200]), "name", None) == "MP3"


def test_mpeg_audio_after_junk_is_found() -> None:
    """Some encoders and cuts leave zeros or half a frame before the first frame."""
    bare = clip("MP3 without ID3 and Xing").data
    for junk in (bytes(1500), bare[200:500]):
        assert getattr(sniff(junk + bare), "name", None) == "MP3"


def test_the_parts_of_a_chained_ogg_are_found() -> None:
    """Each part of a chain is found, also past damage; streams that begin together are one part."""
    part, other = clip("Ogg Opus").data, clip("Ogg Vorbis").data
    assert list(chain_parts(io.BytesIO(part))) == [(0, len(part))]
    chain = [part, other, part]
    ends = list(itertools.accumulate(map(len, chain)))
    expected = list(itertools.pairwise([0, *ends]))
    assert list(chain_parts(io.BytesIO(b"".join(chain)))) == expected
    damaged = bytearray(b"".join(chain))
    damaged[len(part) // 2 : len(part) // 2 + 10_000] = bytes(10_000)
    assert list(chain_parts(io.BytesIO(damaged))) == expected
    two_streams = remuxed("ogg", part, with_av("ogg", "libopus", 48_000, samples=stereo(48_000, 0.5)))
    assert list(chain_parts(io.BytesIO(two_streams + other))) == [
        (0, len(two_streams)),
        (len(two_streams), len(two_streams) + len(other)),
    ]


def _id3_tag(size: int) -> bytes:
    return b"ID3\x04\0\0" + bytes([size >> shift & 0x7F for shift in (21, 14, 7, 0)]) + bytes(size)
