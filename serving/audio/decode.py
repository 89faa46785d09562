"""Decode: any audio file to 16 kHz mono float32.

soundfile reads uncompressed formats (and WAV with any codec), PyAV every other format and whatever soundfile refuses;
`formats.py` has the division and its reasons. Both yield blocks of mono; soxr resamples them into one array.

Rules for bad input:
- The duration is that of the decoded samples. Durations and sample counts in headers are not trusted and time stamps
  are ignored: a gap between two packets is closed.
- A file that is cut or damaged gives the samples that can be decoded. It is unreadable only if there are none.
- Of several audio tracks FFmpeg's "best" is chosen (the default one, then most channels, then highest bit rate), or the
  first one with a known decoder. Pictures, video and subtitles are neither decoded nor, where possible, read.
- No file is opened except the clip itself, whatever the clip refers to.
"""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from functools import cache
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr
from av.audio.plane import AudioPlane
from av.stream import Discard

from serving.audio.formats import is_text, recognise
from serving.audio.ogg_chain import chain_parts
from serving.errors import AudioEmpty, AudioTooLong, AudioUnreadable
from serving.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt
    from _typeshed import WriteableBuffer

    from serving.audio.formats import Format

    Samples = npt.NDArray[np.float32]
    File = BytesIO | BufferedReader
    Reader = Callable[[File, int, Format, "_Waveform"], None]

PADDING_S = 0.1
"""Tolerance over the duration limit, since codecs pad (PROTOCOL 7.4)."""

MEMORY_BYTES = 64 * 1024 * 1024
"""Bound on the memory of decoding any file, in addition to the waveform."""

_BLOCK_VALUES = 1 << 16
"""Samples times channels that are mixed and resampled in one block."""

_READ_BYTES = 1 << 20

_SAMPLE_RATES = range(1_000, 768_001)
"""Sample rates in Hz at which sound is recorded. A header with any other rate is forged."""

_DECODERS = (
    *("aac", "aac_latm", "ac3", "alac", "eac3", "flac", "gsm", "gsm_ms", "opus", "speex"),
    *("amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb", "tta", "vorbis", "wavpack", "wmapro", "wmavoice"),
    *("mp2", "mp2float", "mp3", "mp3float", "wmalossless", "wmav1", "wmav2"),
    *("adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "adpcm_yamaha"),
    *("pcm_alaw", "pcm_bluray", "pcm_dvd", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_mulaw"),
    *("pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_s64be", "pcm_s64le"),
    *("pcm_s8", "pcm_u16be", "pcm_u16le", "pcm_u24be", "pcm_u24le", "pcm_u32be", "pcm_u32le", "pcm_u8"),
)
"""Allowlist of FFmpeg's decoders, none of them for pictures or video."""

_AV_OPTIONS = {"codec_whitelist": ",".join(_DECODERS), "protocol_whitelist": "none"}

_BETTER_DECODER = {"amrnb": "libopencore_amrnb", "amrwb": "libopencore_amrwb"}
"""Replacements of FFmpeg's AMR decoders, which drop frames of silence (SID, no data); others make comfort noise."""

_SAMPLE_FORMATS = {
    "u8": ("u1", 2**7),
    "s16": ("i2", 2**15),
    "s32": ("i4", 2**31),
    "s64": ("i8", 2**63),
    "flt": ("f4", 1),
    "dbl": ("f8", 1),
}
"""FFmpeg's sample formats: NumPy's dtype, and full scale."""


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
            reason = "it is text" if is_text(prefix) else "it is of no known audio or video format"
            raise AudioUnreadable(f"{AudioUnreadable.message}: {reason}")
        waveform = _Waveform(max_duration_s)
        problems: list[str] = []
        with _memory_limited(), np.errstate(all="ignore"):
            for read in (_read_soundfile, _read_av) if form.soundfile else (_read_av,):
                problems.append(_attempt(read, file, start, form, waveform))
                if waveform.size and not problems[-1]:
                    break
    if waveform.size:
        return waveform.samples
    if not problems[0]:
        raise AudioEmpty
    raise AudioUnreadable(f"{AudioUnreadable.message}: {problems[-1] or problems[0]}")


def _opened(source: bytes | memoryview | Path | BufferedReader) -> File:
    match source:
        case Path():
            return source.open("rb")
        case BufferedReader():
            return source
        case _:
            return BytesIO(source)


class _ReaderError(Exception):
    """A reader failed, for the reason in the message. The samples that it has decoded by then are kept."""


class _DamagedError(_ReaderError):
    """The file is damaged, or of a kind that the reader does not know: the two look alike."""


def _attempt(read: Reader, file: File, start: int, form: Format, waveform: _Waveform) -> str:
    """Decode with one reader and return the problem, empty if there is none. Raises `AudioTooLong`."""
    waveform.rewind()
    problem = ""
    try:
        read(file, start, form, waveform)
    except _DamagedError:
        problem = f"this {form.name} file is damaged, cut, or of a kind that no decoder knows"
    except _ReaderError as error:
        problem = str(error)
    except MemoryError:
        problem = f"decoding this {form.name} file takes too much memory"
    waveform.flush()
    return problem


class _Waveform:
    """The growing result: one array, into which blocks of mono of any rate are resampled."""

    def __init__(self, max_duration_s: float) -> None:
        self._array = np.empty(int((max_duration_s + PADDING_S) * SAMPLE_RATE), np.float32)
        self._end = 0  # of the current reader's samples
        self._size = 0  # the most that any reader has decoded
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None

    @property
    def size(self) -> int:
        return self._size

    @property
    def samples(self) -> Samples:
        return self._array[: self._size]

    def rewind(self) -> None:
        """Prepare for another reader. If it ends earlier, the rest of the previous reader's samples is kept."""
        self._end = 0

    def append(self, rate: int, mono: Samples) -> None:
        """Add samples. Raises `AudioTooLong`."""
        np.clip(mono, -1, 1, out=mono)
        if not np.isfinite(mono @ mono):  # one NaN would spoil all later samples
            np.nan_to_num(mono, copy=False)
        if rate != self._rate:
            self.flush()
            if rate not in _SAMPLE_RATES:
                raise _ReaderError(f"it has a sample rate of {rate} Hz")
            self._rate = rate
        if rate == SAMPLE_RATE:
            self._write(mono)
            return
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        self._write(self._resampler.resample_chunk(mono))

    def flush(self) -> None:
        """Add the samples that the resampler still buffers."""
        if resampler := self._resampler:
            self._resampler = None
            self._write(resampler.resample_chunk(np.empty(0, np.float32), last=True))

    def _write(self, samples: Samples) -> None:
        end = self._end + samples.size
        if end > self._array.size:
            raise AudioTooLong
        np.clip(samples, -1, 1, out=self._array[self._end : end])
        self._end = end
        self._size = max(self._size, end)


def _read_soundfile(file: File, start: int, form: Format, waveform: _Waveform) -> None:
    del form  # libsndfile recognises it
    try:
        with soundfile.SoundFile(_Part(file, start, file.seek(0, SEEK_END))) as sound:
            # libsndfile's conversion to float takes five times as long as ours.
            dtype, full_scale = ("int16", 2**15) if sound.subtype == "PCM_16" else ("float32", 1)
            block = np.empty((max(1, _BLOCK_VALUES // sound.channels), sound.channels), dtype)
            left = sound.frames
            while len(frames := sound.read(out=block)):
                waveform.append(sound.samplerate, _averaged(frames, full_scale))
                left -= len(frames)
    except soundfile.LibsndfileError:
        raise _DamagedError from None
    if left > 0:
        raise _DamagedError


def _read_av(file: File, start: int, form: Format, waveform: _Waveform) -> None:
    parts = chain_parts(file, start) if form.demuxer == "ogg" else [(start, file.seek(0, SEEK_END))]
    damaged = False
    for part in parts:
        try:
            for rate, mono in _av_blocks(_Part(file, *part), form):
                waveform.append(rate, mono)
        except MemoryError:
            raise
        except (av.FFmpegError, _DamagedError):
            damaged = True
        waveform.flush()
    if damaged:
        raise _DamagedError


def _av_blocks(file: _Part, form: Format) -> Iterator[tuple[int, Samples]]:
    """Yield sample rate and mono samples, block by block."""
    with av.open(
        file, format=form.demuxer, options={**_AV_OPTIONS, "format_whitelist": form.demuxer}, metadata_errors="ignore"
    ) as container:
        stream = _audio_stream(container, form)
        fifo, kind = av.AudioFifo(), None
        for frame in _frames(container, stream):
            channels = frame.layout.nb_channels
            if kind != (kind := (frame.format.name, frame.sample_rate, channels)):
                if rest := fifo.read():
                    yield rest.sample_rate, _mono(rest)
                fifo = av.AudioFifo()
            frame.pts = None
            fifo.write(frame)
            if fifo.samples * channels >= _BLOCK_VALUES:
                yield frame.sample_rate, _mono(fifo.read())
        if rest := fifo.read():
            yield rest.sample_rate, _mono(rest)


def _audio_stream(container: Any, form: Format) -> Any:
    """Choose the audio stream, and let the demuxer skip the others."""
    tracks = container.streams.audio
    known = [each for each in tracks if each.codec_context and each.codec_context.name in _DECODERS]
    if not tracks:
        raise _ReaderError(f"this {form.name} file has no audio track")
    if not known:
        codec = tracks[0].codec_context.name if tracks[0].codec_context else "an unknown or encrypted one"
        raise _ReaderError(f"there is no decoder for the codec of this {form.name} file: {codec}")
    best = container.streams.best("audio")
    chosen = best if best in known else known[0]
    for stream in container.streams:
        if stream is not chosen:
            stream.discard = Discard.all
    return chosen


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yield all frames that can be decoded, skipping damaged packets. Raises `_DamagedError` if damage left none."""
    name = stream.codec_context.name
    decoder = av.CodecContext.create(_BETTER_DECODER[name], "r") if name in _BETTER_DECODER else stream.codec_context
    decoder.thread_count = 1  # an audio worker may start no thread (`sandbox.py`)
    packets = container.demux(stream)
    damaged = decoded = False
    while True:
        try:
            if (packet := next(packets, None)) is None:
                break
            frames = decoder.decode(packet)
        except MemoryError:
            raise
        except av.FFmpegError:
            damaged = True  # the packet; a damaged container ends `packets`
        else:
            decoded = decoded or bool(frames)
            yield from frames
    if damaged and not decoded:
        raise _DamagedError


def _mono(frame: Any) -> Samples:
    """Average the channels, to float32 within ±1."""
    kind, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    dtype, full_scale = _SAMPLE_FORMATS[kind]
    if frame.format.is_planar:
        mono = _plane(frame, 0, dtype, frame.samples).astype(np.float32)
        for index in range(1, channels):
            mono += _plane(frame, index, dtype, frame.samples)
        mono *= np.float32(1 / (full_scale * channels))
    else:
        mono = _averaged(_plane(frame, 0, dtype, frame.samples * channels).reshape(-1, channels), full_scale)
    if kind == "u8":
        mono -= 1
    return mono


def _plane(frame: Any, index: int, dtype: str, count: int) -> npt.NDArray[Any]:
    plane: Any = AudioPlane(frame, index)  # `frame.planes` reads past their end from 8 channels on
    return np.frombuffer(plane, dtype, count)


def _averaged(frames: npt.NDArray[Any], full_scale: float) -> Samples:
    """Average the channels of shape (samples, channels): a matrix product, 50 times as fast as `mean`."""
    channels = frames.shape[1]
    return frames.astype(np.float32, copy=False) @ np.full(channels, 1 / (full_scale * channels), np.float32)


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


class _Part(RawIOBase):
    """Bytes `begin` to `end` of a file, as a separate file."""

    def __init__(self, file: File, begin: int, end: int) -> None:
        self._file, self._begin, self._end = file, begin, end
        self._position = begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._begin

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        origin = {SEEK_SET: self._begin, SEEK_CUR: self._position, SEEK_END: self._end}[whence]
        self._position = max(self._begin, origin + offset)
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        """Read for FFmpeg, which requests a complete packet or picture, and requests again the bytes it did not get."""
        self._file.seek(self._position)
        data = self._file.read(max(0, min(size, _READ_BYTES, self._end - self._position)))
        self._position += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read for libsndfile, which takes a short read for the end."""
        self._file.seek(self._position)
        with memoryview(buffer) as view, view[: max(0, self._end - self._position)] as part:
            size = self._file.readinto(part)
        self._position += size
        return size
