"""Containers written by hand, around audio that is already encoded."""

from __future__ import annotations

import struct


def wav(codec: int, rate: int, data: bytes, *, bits: int = 16, channels: int = 1) -> bytes:
    """Return a WAV that declares this codec."""
    block_bytes = max(1, channels * bits // 8)
    fmt = struct.pack("<HHIIHH", codec, channels, rate, rate * channels * bits // 8, block_bytes, bits)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def aifc(codec: bytes, rate: int, data: bytes, *, bits: int) -> bytes:
    """Return a mono AIFF-C that declares this codec."""
    exponent = rate.bit_length() - 1
    rate_80 = struct.pack(">HQ", 16_383 + exponent, rate << 63 - exponent)
    frames = 8 * len(data) // bits
    chunks = [(b"COMM", struct.pack(">hIh", 1, frames, bits) + rate_80 + codec + b"\0\0"), (b"SSND", bytes(8) + data)]
    form = b"AIFC" + b"".join(kind + struct.pack(">I", len(chunk)) + chunk for kind, chunk in chunks)
    return b"FORM" + struct.pack(">I", len(form)) + form


def bw64(riff: bytes, magic: bytes = b"BW64") -> bytes:
    """Return a WAV with its sizes in 64 bits, in a chunk before the others."""
    data = riff.index(b"data")
    size = struct.unpack_from("<I", riff, data + 4)[0]
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, len(riff) + 28, size, 0, 0)
    head = magic + b"\xff\xff\xff\xffWAVE" + ds64 + riff[12 : data + 4] + b"\xff\xff\xff\xff"
    return head + riff[data + 8 :]


def ts_of(packet_bytes: int, ts: bytes) -> bytes:
    """Return a transport stream with packets of 192 bytes (a time code first) or 204 (FEC last) instead of 188."""
    packets = [ts[start : start + 188] for start in range(0, len(ts), 188)]
    if packet_bytes == 192:
        return b"".join(struct.pack(">I", 300 * number) + packet for number, packet in enumerate(packets))
    return b"".join(packet + b"\xb5" * (packet_bytes - 188) for packet in packets)


def id3(size: int, frames: bytes = b"", *, claimed: int | None = None) -> bytes:
    """Return an ID3v2.4 tag of `frames` and padding, whose header may claim another size."""
    value = size if claimed is None else claimed
    return b"ID3\x04\0\0" + synchsafe(value) + frames + bytes(size - len(frames))


def id3_frame(kind: bytes, data: bytes) -> bytes:
    """Return a frame of an ID3v2.4 tag."""
    return kind + synchsafe(len(data)) + b"\0\0" + data


def synchsafe(size: int) -> bytes:
    """Return a size in four bytes of seven bits."""
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


def box(kind: bytes, *contents: bytes) -> bytes:
    """Return a box of MP4."""
    data = b"".join(contents)
    return struct.pack(">I", 8 + len(data)) + kind + data


def element(kind: int, *contents: bytes) -> bytes:
    """Return an element of EBML."""
    data = b"".join(contents)
    return kind.to_bytes((kind.bit_length() + 7) // 8) + (1 << 56 | len(data)).to_bytes(8) + data
