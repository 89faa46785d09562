"""Compressed request bodies: gzip and deflate are read in both dialects, within the bound of a body."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from serving.api.body_coding import inflate
from serving.errors import BodyTooLarge, InvalidRequest, Overloaded
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import NO_TENANT
from tests.api.dialects.bad_requests import BODY
from tests.support.served import served
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import Callable

CLIP = data_url(wav(1))
MIB = 1024 * 1024


def raw_deflate(body: bytes) -> bytes:
    """Return deflate without zlib's header, as some clients send it."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    " deflate": raw_deflate,
    "identity": bytes,
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("path", "body"), [(COMPATIBLE, compatible_body(CLIP)), (NATIVE, native_body(CLIP))])
async def test_compressed_bodies_are_read(path: str, body: dict[str, Any]) -> None:
    """A body in each accepted encoding gets its caption."""
    async with served() as client:
        for coding, compress in CODINGS.items():
            headers = {"content-encoding": coding, "content-type": "application/json"}
            answer = await client.post(path, content=compress(json.dumps(body).encode()), headers=headers)
            assert answer.status_code == 200, (coding, answer.text)


@pytest.mark.usefixtures("in_process")
async def test_a_compressed_form_is_read() -> None:
    """A form with a file may be compressed, too."""
    async with served() as client:
        request = client.build_request("POST", "/v1/audio/transcriptions", files={"file": wav(1)})
        headers = {"content-encoding": "gzip", "content-type": request.headers["content-type"]}
        answer = await client.post(request.url, content=gzip.compress(await request.aread()), headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.usefixtures("in_process")
async def test_a_bomb_is_too_large() -> None:
    """A small body that would inflate beyond `max_body_bytes` is 413 in the path's dialect."""
    bomb = gzip.compress(b" " * (64 * MIB))
    async with served() as client:
        answer = await client.post(COMPATIBLE, content=bomb, headers={"content-encoding": "gzip"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        native = await client.post(NATIVE, content=bomb, headers={"content-encoding": "gzip"})
        assert (native.status_code, native.json()["code"]) == (413, "BadRequest.TooLarge")


@pytest.mark.parametrize(
    ("body", "coding", "reason"),
    [
        (b"{}", "br", "The content-encoding br is not supported: send gzip, deflate or none."),
        (b"{}", "gzip, gzip", "The content-encoding gzip, gzip is not supported: send gzip, deflate or none."),
        (b"{}", "gzip", "It is not gzip, as its content-encoding says."),
        (b"hello, this is text", "deflate", "It is not deflate, as its content-encoding says."),
        (gzip.compress(b"{}", mtime=0)[:-1], "gzip", "Its gzip is cut off."),
        (gzip.compress(b"{}", mtime=0)[:5], "gzip", "Its gzip is cut off."),
        (gzip.compress(b"{}", mtime=0)[:-8] + bytes(8), "gzip", "It is not gzip, as its content-encoding says."),
        (gzip.compress(b"{}", mtime=0) + b"x" * 20, "gzip", "It is not gzip, as its content-encoding says."),
        (gzip.compress(b"", mtime=0) * 9, "gzip", "It has more than 8 members of gzip."),
    ],
    ids=["brotli", "twice", "no gzip", "no deflate", "cut", "cut in the header", "checksum", "trailing", "members"],
)
async def test_bad_bodies(body: bytes, coding: str, reason: str) -> None:
    """An encoding that is not read, or a body that is not in it, is refused with the reason."""
    with SharedCapacity(MIB).permit(NO_TENANT) as permit, pytest.raises(InvalidRequest) as raised:
        await inflate(body, coding, permit, limit_bytes=MIB)
    assert str(raised.value) == f"{BODY} {reason}"


async def test_members_are_joined() -> None:
    """A gzip of several members is one body."""
    with SharedCapacity(MIB).permit(NO_TENANT) as permit:
        body = gzip.compress(b"ab") + gzip.compress(b"") + gzip.compress(b"c")
        assert await inflate(body, "gzip", permit, limit_bytes=3) == b"abc"
        assert permit.amount == 3


async def test_memory_is_acquired_before_it_is_used() -> None:
    """Inflated bytes count as memory of bodies: beyond it the request is refused."""
    capacity = SharedCapacity(4 * MIB)
    with capacity.permit(NO_TENANT) as permit:
        with pytest.raises(Overloaded):
            await inflate(gzip.compress(bytes(64 * MIB)), "gzip", permit, limit_bytes=64 * MIB)
        assert permit.amount == 4 * MIB
    assert capacity.used == 0


@pytest.mark.parametrize(
    "body", [gzip.compress(bytes(64 * MIB)) * 8, gzip.compress(b"") * (16 * MIB // 20)], ids=["large", "members"]
)
async def test_inflation_is_cheap(body: bytes) -> None:
    """A bomb of 512 MiB, or of 800,000 members, is refused within 0.5 s of CPU time."""
    with SharedCapacity(32 * MIB).permit(NO_TENANT) as permit:
        started = time.process_time()
        with pytest.raises((BodyTooLarge, InvalidRequest)):
            await inflate(body, "gzip", permit, limit_bytes=16 * MIB)
        assert time.process_time() - started < 0.5
