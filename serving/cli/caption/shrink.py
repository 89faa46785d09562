"""`python -m serving.cli.caption.shrink BYTES [FILE]`: a file's audio as 16 kHz mono, in at most BYTES bytes.

The model hears 16 kHz mono. FLAC keeps all of it; where that does not fit, Opus with as many bits as fit. Without FILE
the input is standard input; the output is standard output. Errors are one line on standard error, with status 1.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from serving.audio.decode import decode
from serving.errors import CaptionerError

if TYPE_CHECKING:
    from serving.audio.waveform import Samples

RATE = 16_000
_MAX_AUDIO_S = 2400
"""Longest audio that the service accepts by default."""

_OPUS_RATES = (6_000, 256_000)
"""Bits per second of Opus at libsndfile's compression levels 1 and 0."""

_MOST_BITS = 96_000
_BLOCK = 1 << 16


def main(words: list[str]) -> int:
    """Write the smaller file to standard output; return the exit status."""
    most = int(words[0])
    try:
        waveform = decode(Path(words[1]) if len(words) > 1 else sys.stdin.buffer.read(), max_duration_s=_MAX_AUDIO_S)
    except (CaptionerError, OSError) as error:
        print(str(error), file=sys.stderr)  # noqa: T201
        return 1
    sys.stdout.buffer.write(shrink(waveform, most))
    return 0


def shrink(waveform: Samples, most: int) -> bytes:
    """Return 16 kHz mono samples as FLAC, or as Opus where FLAC needs more than `most` bytes."""
    lossless = _encoded(waveform, format="FLAC", subtype="PCM_16")
    if len(lossless) <= most:
        return lossless
    bits = min(_MOST_BITS, 0.95 * 8 * most * RATE / len(waveform))
    low, high = _OPUS_RATES
    level = min(1.0, max(0.0, 1 - (bits - low) / (high - low)))
    return _encoded(waveform, format="OGG", subtype="OPUS", compression_level=level)


def _encoded(waveform: Samples, **options: object) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, **options) as writer:
        for first in range(0, len(waveform), _BLOCK):  # libsndfile's encoders take no long array at once
            writer.write(waveform[first : first + _BLOCK])
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
