"""Reader of every compressed format: PyAV, which is FFmpeg."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from io import SEEK_END
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.audio.plane import AudioPlane
from av.stream import Discard

from serving.audio.decoders import AV_OPTIONS, BETTER_DECODER, DECODERS, is_exact
from serving.audio.encryption import Encryption
from serving.audio.file_part import FilePart
from serving.audio.joined import joined_parts
from serving.audio.reader_errors import DamagedError, ReaderError
from serving.audio.waveform import LOSSY_OVERSHOOT
from serving.errors import AudioTooLong

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from serving.audio.file_part import File
    from serving.audio.formats import Format
    from serving.audio.waveform import Samples, Waveform

BLOCK_VALUES = 1 << 16
"""Samples times channels that are mixed and resampled in one block."""

LEAST_DECODED = 0.1
"""Share of the packets that must be decodable. Encrypted and foreign data give a frame of noise now and then."""

_LATE_STREAMS = ("flv", "mpeg", "mpegts")
"""Demuxers of formats in which a stream may begin anywhere."""

_LONG_PROBE = {"probesize": str(32 << 20), "analyzeduration": "600000000"}
"""Bytes and microseconds that are searched for an audio track, where FFmpeg's own 5 MB have none."""

_RESUMABLE = ("mpeg", "mpegts")
"""Demuxers that can start anywhere. They read on where the track ends before the file does, as in joined files."""

_MAX_PARTS = 32
_LEAST_REST_BYTES = 16_384
_MAX_FAILURES = 64
"""Consecutive undecodable packets after which a resumable file is opened again from there: its codec has changed."""

_UNFRAMED = ("aiff", "au", "caf", "w64", "wav")
"""Demuxers that cut the data anywhere, also within the 2 to 5 bits of a sample of G.726."""

_G726_BYTES = 15 * 256
"""Multiple of 120 bits, so of samples of each size."""

_MAX_INTERRUPTIONS = 100
"""Exceptions of PyAV's demuxer that are passed over. One is raised at each stream that appears after opening."""

_NOISE = "it is damaged or encrypted"

_SAMPLE_FORMATS = {
    "u8": ("u1", 2**7),
    "s16": ("i2", 2**15),
    "s32": ("i4", 2**31),
    "s64": ("i8", 2**63),
    "flt": ("f4", 1),
    "dbl": ("f8", 1),
}
"""FFmpeg's sample formats: NumPy's dtype, and full scale."""


def read_ffmpeg(file: File, start: int, form: Format, waveform: Waveform) -> None:
    """Decode the file from `start` on. Parts that fail are passed over; the first problem is raised at the end."""
    problems: list[Exception] = []
    if form.demuxer in _RESUMABLE:
        _read_resumed(FilePart(file, start, file.seek(0, SEEK_END)), form, waveform, problems)
    else:
        for part in joined_parts(file, start, form.demuxer):
            _Part(FilePart(file, *part, form.magic), form, waveform).read(problems)
    if problems:
        raise next((each for each in problems if isinstance(each, ReaderError)), DamagedError())


def _read_resumed(rest: FilePart, form: Format, waveform: Waveform, problems: list[Exception]) -> None:
    """Decode a file of which the audio track may end, or change, before the file ends."""
    heard: set[int] = set()
    for number in range(_MAX_PARTS):
        part = _Part(rest, form, waveform, heard, resumable=number < _MAX_PARTS - 1)
        part.read([] if number else problems)
        begin = rest.begin + part.reached
        if not part.reached or rest.end - begin < _LEAST_REST_BYTES:
            return
        rest = FilePart(rest.file, begin, rest.end)


class _Part:
    """Part of a file that is opened separately.

    `heard` are the IDs of the streams that earlier parts did not choose, and that this one must not choose either.
    `reached` is the offset up to which the chosen stream was decoded.
    """

    def __init__(
        self,
        file: FilePart,
        form: Format,
        waveform: Waveform,
        heard: set[int] | None = None,
        *,
        resumable: bool = False,
    ) -> None:
        self.reached = 0
        self._file, self._form, self._waveform, self._resumable = file, form, waveform, resumable
        self._heard = heard if heard is not None else set()
        self._packets = self._decoded = 0
        self._damaged = False

    def read(self, problems: list[Exception]) -> None:
        """Decode the part into the waveform, and add what went wrong to `problems`.

        Raises `AudioTooLong` and `MemoryError`.
        """
        mark = self._waveform.mark()
        try:
            self._append_all()
        except (AudioTooLong, MemoryError):
            raise
        except Exception as problem:  # noqa: BLE001 - PyAV raises any of them; none may lose the samples so far
            problems.append(problem)
        if not self._decoded:
            if self._damaged:
                problems.append(DamagedError())
        elif self._decoded < LEAST_DECODED * self._packets:
            self._waveform.undo(mark)
            share = f"{self._decoded} of {self._packets} packets ({self._decoded / self._packets:.1%})"
            problems.append(ReaderError(f"only {share} of this {self._form.name} file can be decoded: {_NOISE}"))

    def _append_all(self) -> None:
        with self._opened() as container:
            stream = self._choose(container)
            self._waveform.overshoot = 1.0 if is_exact(stream.codec_context.name) else LOSSY_OVERSHOOT
            fifo, kind = av.AudioFifo(), None
            try:
                for frame in self._frames(container, stream):
                    channels = frame.layout.nb_channels
                    if kind != (kind := (frame.format.name, frame.sample_rate, channels)):
                        self._append(fifo.read())
                        fifo = av.AudioFifo()
                    frame.pts = None
                    fifo.write(frame)
                    if fifo.samples * channels >= BLOCK_VALUES:
                        self._append(fifo.read())
            finally:
                self._append(fifo.read())

    def _append(self, frame: Any) -> None:
        if frame:
            self._waveform.append(frame.sample_rate, mono(frame))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with ExitStack() as stack:
            for probe in ({}, _LONG_PROBE) if self._form.demuxer in _LATE_STREAMS else ({},):
                stack.close()
                self._file.seek(0)
                options = {**AV_OPTIONS, "format_whitelist": self._form.demuxer, **probe}
                opened = av.open(self._file, format=self._form.demuxer, options=options, metadata_errors="ignore")
                container = stack.enter_context(opened)
                if container.streams.audio:
                    break
            yield container

    def _choose(self, container: Any) -> Any:
        """Choose the audio stream, and let the demuxer skip the others."""
        name, tracks = self._form.name, container.streams.audio
        encryption = Encryption(FilePart(self._file.file, self._file.begin, self._file.end), self._form.demuxer)
        known = [each for each in tracks if each.codec_context and each.codec_context.name in DECODERS]
        encrypted = [each for each, method in zip(tracks, encryption.of(tracks), strict=True) if method]
        usable = [each for each in known if each not in encrypted and each.id not in self._heard]
        if not usable:
            if encrypted or (encryption.method and not tracks):
                raise ReaderError(
                    f"the audio of this {name} file is encrypted ({encryption.method}): send it decrypted"
                )
            if not tracks:
                raise ReaderError(f"this {name} file has no audio track")
            codec = tracks[0].codec_context.name if tracks[0].codec_context else "an unknown or encrypted one"
            raise ReaderError(f"there is no decoder for the codec of this {name} file: {codec}")
        best = container.streams.best("audio")
        chosen = best if best in usable else usable[0]
        for stream in container.streams:
            if stream is not chosen:
                stream.discard = Discard.all
        if self._resumable:
            self._heard |= {each.id for each in tracks if each is not chosen}
        return chosen

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield all frames that can be decoded, skipping damaged packets."""
        name = stream.codec_context.name
        better = BETTER_DECODER.get(name)
        decoder = av.CodecContext.create(better, "r") if better else stream.codec_context
        decoder.thread_count = 1  # an audio worker may start no thread (`sandbox.py`)
        failures = 0
        for packet in self._packets_of(container, stream):
            self._packets += 1
            try:
                frames = decoder.decode(packet)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001 - a damaged packet
                self._damaged = True
                failures += 1
                if self._resumable and failures == _MAX_FAILURES:
                    return
                continue
            failures = 0
            if self._resumable and packet.pos is not None:
                self.reached = max(self.reached, packet.pos + packet.size)
            if frames:
                self._decoded += 1
                yield from frames
        try:
            frames = decoder.decode(None)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - damage at the end
            self._damaged = True
        else:
            self._decoded = max(self._decoded, bool(frames))
            yield from frames

    def _packets_of(self, container: Any, stream: Any) -> Iterator[Any]:
        packets = self._demuxed(container, stream)
        is_cut_anywhere = stream.codec_context.name.startswith("g726") and self._form.demuxer in _UNFRAMED
        return _realigned(packets) if is_cut_anywhere else packets

    def _demuxed(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the packets of the stream.

        An error of FFmpeg is the end of a damaged container. Any other exception is PyAV's, which does not know streams
        that appear after opening: demuxing goes on after it.
        """
        for _ in range(_MAX_INTERRUPTIONS):
            try:
                for packet in container.demux(stream):
                    if packet.size:  # else it flushes the decoder
                        yield packet
            except MemoryError:
                raise
            except av.FFmpegError:
                self._damaged = True
                return
            except Exception:  # noqa: BLE001, S112 - see above
                continue
            return


def _realigned(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield the same bytes in packets that end between two samples."""
    rest = b""
    for packet in packets:
        rest += bytes(packet)
        while len(rest) >= _G726_BYTES:
            yield av.Packet(rest[:_G726_BYTES])
            rest = rest[_G726_BYTES:]
    if rest:
        yield av.Packet(rest)


def mono(frame: Any) -> Samples:
    """Average the channels, to float32 with full scale ±1."""
    kind, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    dtype, full_scale = _SAMPLE_FORMATS[kind]
    if frame.format.is_planar:
        average = _plane(frame, 0, dtype, frame.samples).astype(np.float32)
        for index in range(1, channels):
            average += _plane(frame, index, dtype, frame.samples)
        average *= np.float32(1 / (full_scale * channels))
    else:
        average = averaged(_plane(frame, 0, dtype, frame.samples * channels).reshape(-1, channels), full_scale)
    if kind == "u8":
        average -= 1
    return average


def _plane(frame: Any, index: int, dtype: str, count: int) -> npt.NDArray[Any]:
    plane: Any = AudioPlane(frame, index)  # `frame.planes` reads past their end from 8 channels on
    return np.frombuffer(plane, dtype, count)


def averaged(frames: npt.NDArray[Any], full_scale: float) -> Samples:
    """Average the channels of shape (samples, channels): a matrix product, 50 times as fast as `mean`."""
    channels = frames.shape[1]
    return frames.astype(np.float32, copy=False) @ np.full(channels, 1 / (full_scale * channels), np.float32)
