"""Content codings of downloads: misused names, gzip and deflate, and their bounds."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.audio.content_coding import Inflater, decoder
from tests.audio.sites import BODY, MIB, fetching, get, response

if TYPE_CHECKING:
    from pathlib import Path

    from tests.audio.sites import Site

NOISE = random.Random(1).randbytes(600_000)


def raw_deflate(data: bytes) -> bytes:
    """Compress without a header, as some servers do for `deflate`."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


def chunked(data: bytes, *headers: str) -> bytes:
    """Render an answer in chunks."""
    head = "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode()
    pieces = (data[start : start + 10_000] for start in range(0, len(data), 10_000))
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "coding",
    [
        *("aws-chunked", "utf-8", "UTF-8", "binary", "none", "identity", "", " ", "identity, identity", "Identity"),
        *("aws-chunked,identity", "8bit", "base64", "audio/wav", "application/octet-stream", "gbk", "null"),
    ],
)
async def test_misused_names_are_plain_bytes(tmp_path: Path, outside: Site, coding: str) -> None:
    """A `Content-Encoding` that names no compression changes nothing."""
    outside.answers |= {
        "/length": response(BODY, "200 OK", f"Content-Encoding: {coding}"),
        "/chunks": chunked(BODY, "Transfer-Encoding: chunked", f"Content-Encoding: {coding}"),
        "/twice": response(BODY, "200 OK", f"Content-Encoding: {coding}", "Content-Encoding: identity"),
    }
    async with fetching(tmp_path) as fetcher:
        for path in ("/length", "/chunks", "/twice"):
            assert await get(fetcher, outside.url(path)) == BODY


COMPRESSED = {
    "gzip": ("gzip", gzip.compress(NOISE)),
    "GZIP": ("GZIP", gzip.compress(NOISE)),
    "x-gzip": ("x-gzip", gzip.compress(NOISE)),
    "with aws-chunked": ("aws-chunked, gzip", gzip.compress(NOISE)),
    "two members": ("gzip", gzip.compress(NOISE[:1000]) + gzip.compress(NOISE[1000:])),
    "padded": ("gzip", gzip.compress(NOISE) + bytes(512)),
    "deflate": ("deflate", zlib.compress(NOISE)),
    "raw deflate": ("deflate", raw_deflate(NOISE)),
    "a name on the disk": ("gzip", gzip.compress(NOISE)),
}


@pytest.mark.parametrize("name", COMPRESSED)
async def test_compressed_bodies_are_inflated(tmp_path: Path, outside: Site, name: str) -> None:
    """Gzip and deflate are inflated, with a length, in chunks, and as a transfer coding."""
    coding, data = COMPRESSED[name]
    outside.answers |= {
        "/length": response(data, "200 OK", f"Content-Encoding: {coding}"),
        "/chunks": chunked(data, "Transfer-Encoding: chunked", f"Content-Encoding: {coding}"),
    }
    if "," not in coding:
        outside.answers["/transfer"] = chunked(data, f"Transfer-Encoding: {coding}, chunked")
    async with fetching(tmp_path) as fetcher:
        for path in outside.answers.keys() & {"/length", "/chunks", "/transfer"}:
            assert await get(fetcher, outside.url(path)) == NOISE


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", ["two members", "raw deflate", "deflate", "padded"])
def test_any_cut_of_the_bytes_gives_the_same(name: str, size: int) -> None:
    """The pieces in which a body arrives do not change what it holds."""
    coding, data = COMPRESSED[name]
    inflater = decoder([coding])
    assert inflater
    parts = (data[start : start + size] for start in range(0, len(data), size))
    assert b"".join(piece for part in parts for piece in inflater.feed(part)) == NOISE
    inflater.finish()


BAD = {
    "cut": ("gzip", gzip.compress(NOISE)[:-9], "The server's gzip body is cut off."),
    "one byte": ("gzip", b"\x1f", "The server's gzip body is cut off."),
    "plain bytes": ("gzip", BODY, "The server's gzip body is damaged."),
    "wrong checksum": ("gzip", gzip.compress(BODY)[:-8] + bytes(8), "The server's gzip body is damaged."),
    "plain deflate": ("deflate", b"\xff" * 100, "The server's deflate body is damaged."),
    "bomb": ("gzip", gzip.compress(bytes(50 * MIB)), "The server's gzip body grows to more than 100 times its size."),
    "deflate bomb": ("deflate", raw_deflate(bytes(50 * MIB)), "The server's deflate body grows to more than 100 times"),
    "members": ("gzip", gzip.compress(b"") * 5000, "The server's gzip body has too many members."),
    "br": ("br", BODY, "The server sent the file with the Content-Encoding br."),
    "zstd": ("zstd", BODY, "The server sent the file with the Content-Encoding zstd."),
    "compress": ("compress", BODY, "The server sent the file with the Content-Encoding compress."),
    "unknown": ("x-rot13", BODY, "The server sent the file with the Content-Encoding x-rot13."),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(BODY)), "with the Content-Encoding gzip, gzip."),
    "long name": ("x" * 5000, BODY, "with the Content-Encoding " + "x" * 64 + "."),
}


@pytest.mark.parametrize("name", BAD)
async def test_other_bodies_are_refused_by_name(tmp_path: Path, outside: Site, name: str) -> None:
    """A damaged or cut body, a bomb, and a coding that is not inflated are refused, and the error says which."""
    coding, data, message = BAD[name]
    outside.answers["/bad"] = response(data, "200 OK", f"Content-Encoding: {coding}")
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, outside.url("/bad"))
        assert str(caught.value).startswith("Failed to download multimodal content. ")
        assert message in str(caught.value)


async def test_the_size_limit_is_that_of_the_inflated_file(tmp_path: Path, outside: Site) -> None:
    """A compressed body may be smaller than the limit and still hold too large a file."""
    outside.answers |= {
        "/most": response(gzip.compress(bytes(MIB)), "200 OK", "Content-Encoding: gzip"),
        "/more": response(gzip.compress(bytes(MIB + 1)), "200 OK", "Content-Encoding: gzip"),
    }
    async with fetching(tmp_path, max_url_bytes=MIB) as fetcher:
        assert await get(fetcher, outside.url("/most")) == bytes(MIB)
        with pytest.raises(errors.AudioTooLarge):
            await get(fetcher, outside.url("/more"))


async def test_an_empty_compressed_file_is_empty_audio(tmp_path: Path, outside: Site) -> None:
    """A complete gzip body of no bytes is `AudioEmpty`, as is a body without one byte."""
    outside.answers |= {
        "/empty": response(gzip.compress(b""), "200 OK", "Content-Encoding: gzip"),
        "/none": response(b"", "200 OK", "Content-Encoding: gzip"),
    }
    async with fetching(tmp_path) as fetcher:
        for path in ("/empty", "/none"):
            with pytest.raises(errors.AudioEmpty):
                await get(fetcher, outside.url(path))


def test_memory_is_bounded_while_a_body_is_inflated() -> None:
    """A piece of a bomb of 16 MiB is inflated in less than 2 MiB of memory."""
    data, inflater = gzip.compress(bytes(16 * MIB)), Inflater("gzip")
    tracemalloc.start()
    size = sum(map(len, inflater.feed(data)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 16 * MIB
    assert peak_bytes < 2 * MIB
