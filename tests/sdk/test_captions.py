"""Every client, synchronous and asynchronous, streamed and not, receives the caption as the engine made it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from tests.sdk.clients import NATIVE, Client, every_client, every_stream, every_way
from tests.support.service import RunningService
from tests.support.wire import ask_native, data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sdk.tap import Tap
    from tests.support.media import MediaServer

CLIP = wav(2)
TOKENS = (25 + 8, 24, 57)

HARD_TO_CARRY = (
    'line\u2028separator paragraph\u2029mark next\u0085line “哎呀” 🎵 "quoted" back\\slash two\n\nlines data:[DONE]'
)
"""Characters that end lines or events for a careless reader."""


@pytest.fixture(scope="module")
def caption(fake_service: RunningService) -> str:
    """The service's caption of the clip for a plain HTTP client."""
    return ask_native(fake_service.url, data_url(CLIP)).text


@every_client
def test_whole(client: Client, tap: Tap, fake_service: RunningService, media: MediaServer, caption: str) -> None:
    """A caption, not streamed, of a clip behind a URL: text, finish reason, usage and request id."""
    media.files["ä clip.wav"] = CLIP
    outcome = tap.perform(client, fake_service, audio=media.url("ä clip.wav"))
    assert outcome.error is None, outcome.message
    assert (outcome.text, outcome.finish_reason, outcome.tokens) == (caption, "stop", TOKENS)
    assert tap.exchanges()[0].header("x-request-id") in (outcome.request_id or "")


@every_stream
def test_stream(client: Client, stream: str, tap: Tap, fake_service: RunningService, caption: str) -> None:
    """A streamed caption: every piece, and together the same text, finish reason, usage and request id."""
    outcome = tap.perform(client, fake_service, audio=data_url(CLIP), stream=stream)
    assert outcome.error is None, outcome.message
    assert sum(1 for piece in outcome.pieces if piece.text) >= 24
    assert client.caption(outcome, stream) == caption
    assert (outcome.finish_reason, outcome.tokens) == ("stop", TOKENS)
    assert tap.exchanges()[0].header("x-request-id") in (outcome.request_id or "")


@pytest.fixture(scope="module")
def hard_to_carry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The service with an engine whose text is hard to carry (a file can hold it, a command line cannot)."""
    settings = tmp_path_factory.mktemp("settings") / "captioner.toml"
    text = json.dumps(HARD_TO_CARRY, ensure_ascii=False)  # read alike by TOML
    settings.write_text(f"fake_text = {text}\nfake_tokens = {len(HARD_TO_CARRY.split(' '))}\n")
    with RunningService("--engine=fake", "--audio-workers=1", f"--config={settings}") as service:
        yield service


@every_client
@every_way
def test_any_text_survives(client: Client, stream: str, tap: Tap, hard_to_carry: RunningService) -> None:
    """Line and paragraph separators, quotes, other scripts and line ends arrive unchanged."""
    outcome = tap.perform(client, hard_to_carry, audio=data_url(CLIP), stream=stream)
    assert outcome.error is None, outcome.message
    assert client.caption(outcome, stream) == HARD_TO_CARRY


@pytest.fixture(scope="module")
def long_winded() -> Iterator[RunningService]:
    """The service with an engine that makes 200 words of 1,500 characters, some 300 KB."""
    with RunningService(
        "--engine=fake", "--audio-workers=1", f"--fake-text={'w' * 1499}", "--fake-tokens=200"
    ) as service:
        yield service


@every_client
@every_way
def test_long_captions(client: Client, stream: str, tap: Tap, long_winded: RunningService) -> None:
    """A caption of 300 KB arrives complete; a cumulative stream ends as `length` before a line is too long to read."""
    outcome = tap.perform(client, long_winded, audio=data_url(CLIP), stream=stream)
    assert outcome.error is None, outcome.message
    text = client.caption(outcome, stream)
    if stream and client.is_1x:
        assert 120_000 < len(text) < 128 * 1024
        assert outcome.finish_reason == "length"
    else:
        assert len(text) == 200 * 1500 - 1
        assert outcome.finish_reason == "stop"


@pytest.fixture(scope="module")
def clips_at_the_limit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """WAV files (48 kHz, stereo, some 40 s) that make 9.9 MB and 10.1 MB of base64."""
    directory = tmp_path_factory.mktemp("large")
    for name, megabytes in (("below", 9.9), ("above", 10.1)):
        frames = int(megabytes * 2**20) * 3 // 4 // 4 - 11
        noise = np.random.default_rng(0).integers(-9999, 9999, (frames, 2), dtype=np.int16)
        soundfile.write(directory / name, noise, 48_000, format="WAV", subtype="PCM_16")
    return directory / "below", directory / "above"


@every_client
def test_largest_inline_audio(
    client: Client, tap: Tap, fake_service: RunningService, clips_at_the_limit: tuple[Path, Path]
) -> None:
    """Base64 of 9.9 MB is captioned; 10.1 MB is refused in JSON."""
    below, above = clips_at_the_limit
    described = tap.perform(client, fake_service, inline_file=str(below))
    assert "40.55 seconds" in described.text, described.message
    refused = tap.perform(client, fake_service, inline_file=str(above))
    assert (refused.status, refused.text) == (400, "")
    assert refused.code == ("BadRequest.TooLarge" if client.dialect == NATIVE else "invalid_parameter_error")
    assert "Exceeded limit on max bytes per data-uri item : 10485760" in (refused.message or "")
