"""Decode: any audio file to 16 kHz mono float32.

soundfile reads uncompressed formats (and WAV with any codec), PyAV every other format and whatever soundfile refuses;
`formats.py` has the division and its reasons. Both yield blocks of mono; soxr resamples them into one array.

Rules for bad input:
- The duration is that of the decoded samples. Durations and sample counts in headers are not trusted and time stamps
  are ignored: a gap between two packets is closed.
- A file that is cut or damaged gives the samples that can be decoded. It is unreadable only if there are none, or if
  under a tenth of its packets can be decoded. Whatever a reader raises ends that reader and keeps its samples.
- Encrypted audio is refused by name. Formats that no reader opens are refused by name, too.
- Sound over full scale is scaled, not clipped (`waveform.py`).
- Of several audio tracks FFmpeg's "best" is chosen (the default one, then most channels, then highest bit rate), or the
  first one with a known decoder. Pictures, video and subtitles are neither decoded nor, where possible, read.
- No file is opened except the clip itself, whatever the clip refers to.
"""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from functools import cache
from io import SEEK_END, BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from serving.audio.ffmpeg_reader import BLOCK_VALUES, averaged, read_ffmpeg
from serving.audio.file_part import FilePart
from serving.audio.formats import is_text, unsupported
from serving.audio.id3 import id3_bytes
from serving.audio.reader_errors import DamagedError, ReaderError
from serving.audio.recognition import recognise
from serving.audio.waveform import Waveform
from serving.errors import AudioEmpty, AudioTooLong, AudioUnreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serving.audio.file_part import File
    from serving.audio.formats import Format
    from serving.audio.waveform import Samples

    Reader = Callable[[File, int, Format, Waveform], None]

MEMORY_BYTES = 64 * 1024 * 1024
"""Bound on the memory of decoding any file, in addition to the waveform."""


def decode(source: bytes | memoryview | Path | BufferedReader, *, max_duration_s: float) -> Samples:
    """Decode a file, by its path or open, or its bytes, to 16 kHz mono: float32, shape (samples,), finite, within ±1.

    The array is a view of memory for `max_duration_s`, of which only the used pages are resident. The call blocks, and
    meanwhile its process can allocate no more than that and `MEMORY_BYTES`: call it in a separate process.

    Raises `AudioEmpty` if there is not one sample, `AudioTooLong` above `max_duration_s` plus `PADDING_S`, and
    `AudioUnreadable` for every other fault of the file (PROTOCOL 7.4).
    """
    with _opened(source) as file:
        form, start, prefix = recognise(file)
        if not prefix and not start:
            raise AudioEmpty
        if form is None:
            raise AudioUnreadable(f"{AudioUnreadable.message}: {_refusal(prefix)}")
        waveform = Waveform(max_duration_s)
        with _memory_limited(), np.errstate(all="ignore"):
            problems = _read(file, start, form, waveform)
            if (gain := waveform.gain) < 1:
                waveform.restart(gain)
                problems = _read(file, start, form, waveform)
    if waveform.size:
        return waveform.samples
    if not problems[0]:
        raise AudioEmpty
    raise AudioUnreadable(f"{AudioUnreadable.message}: {problems[-1] or problems[0]}")


def _refusal(prefix: bytes) -> str:
    """Return the reason why a file without a format is refused."""
    if reason := unsupported(prefix):
        return reason
    if id3_bytes(prefix):
        return "it has no audio after its ID3 tag"
    return "it is text" if is_text(prefix) else "it is of no known audio or video format"


def _opened(source: bytes | memoryview | Path | BufferedReader) -> File:
    match source:
        case Path():
            return source.open("rb")
        case BufferedReader():
            return source
        case _:
            return BytesIO(source)


def _read(file: File, start: int, form: Format, waveform: Waveform) -> list[str]:
    """Decode with one reader after the other, until one succeeds, and return their problems. Raises `AudioTooLong`."""
    problems: list[str] = []
    for read in (_read_soundfile, read_ffmpeg) if form.soundfile else (read_ffmpeg,):
        problems.append(_attempt(read, file, start, form, waveform))
        if waveform.size and not problems[-1]:
            break
    return problems


def _attempt(read: Reader, file: File, start: int, form: Format, waveform: Waveform) -> str:
    """Decode with one reader and return the problem, empty if there is none. Raises `AudioTooLong`."""
    waveform.rewind()
    try:
        read(file, start, form, waveform)
        waveform.flush()
    except AudioTooLong:
        raise
    except MemoryError:
        problem = f"decoding this {form.name} file takes too much memory"
    except DamagedError:
        problem = _damaged(form)
    except ReaderError as error:
        problem = str(error)
    except Exception:  # noqa: BLE001 - a fault of the reader's library, provoked by the file
        problem = _damaged(form)
    else:
        return ""
    waveform.flush()
    return problem


def _damaged(form: Format) -> str:
    return f"this {form.name} file is damaged, cut, or of a kind that no decoder knows"


def _read_soundfile(file: File, start: int, form: Format, waveform: Waveform) -> None:
    waveform.overshoot = 1.0
    try:
        with soundfile.SoundFile(FilePart(file, start, file.seek(0, SEEK_END), form.magic)) as sound:
            # libsndfile's conversion to float takes five times as long as ours.
            dtype, full_scale = ("int16", 2**15) if sound.subtype == "PCM_16" else ("float32", 1)
            block = np.empty((max(1, BLOCK_VALUES // sound.channels), sound.channels), dtype)
            left = sound.frames
            while len(frames := sound.read(out=block)):
                waveform.append(sound.samplerate, averaged(frames, full_scale))
                left -= len(frames)
    except soundfile.LibsndfileError:
        raise DamagedError from None
    if left > 0:
        raise DamagedError


@contextmanager
def _memory_limited() -> Iterator[None]:
    """Limit the process to `MEMORY_BYTES` more than it uses now: an allocation above that fails, and with it the file.

    A few bytes can demand gigabytes in more ways than can be listed: an index, a cover picture, a packet of a million
    frames.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(os.pread(_statm(os.getpid()), 200, 0).split()[5]) * resource.getpagesize()
    limit = used + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@cache
def _statm(pid: int) -> int:
    """Return a descriptor of the memory counts of this process. An audio worker opens no file after its start."""
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
