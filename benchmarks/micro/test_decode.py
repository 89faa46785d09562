"""Decoding 10 s of each kind of file to samples at 16 kHz: this service's decoder, and PyAV alone as reference.

pytest benchmarks/micro --benchmark-group-by=param:kind
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import av
import pytest

from benchmarks.load.clips import CODECS, Clip, make_clip
from serving.audio.decode import decode

if TYPE_CHECKING:
    from collections.abc import Callable

DURATION_S = 10


@pytest.fixture(scope="module", params=CODECS)
def kind(request: pytest.FixtureRequest) -> str:
    """Kind of file."""
    return str(request.param)


@pytest.fixture(scope="module")
def data(kind: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Bytes of a file of that kind."""
    clip = Clip(tmp_path_factory.mktemp("clips") / f"clip.{kind}", DURATION_S)
    make_clip(clip, 1)
    return clip.path.read_bytes()


def bare(data: bytes) -> int:
    """Decode and resample by PyAV alone, without limits or checks. Returns the number of samples."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    with av.open(BytesIO(data)) as container:
        frames: list[Any] = list(container.decode(audio=0))
        return sum(made.samples for frame in [*frames, None] for made in resampler.resample(frame))


def test_service(benchmark: Callable[..., Any], data: bytes) -> None:
    """The service decodes the clip to its length."""
    samples = benchmark(decode, data, max_duration_s=60)
    assert len(samples) / 16_000 == pytest.approx(DURATION_S, abs=0.2)


def test_library(benchmark: Callable[..., Any], data: bytes) -> None:
    """PyAV decodes the clip to its length."""
    assert benchmark(bare, data) / 16_000 == pytest.approx(DURATION_S, abs=0.2)
