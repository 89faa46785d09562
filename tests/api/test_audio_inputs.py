"""Every format through every form of input: the decoded duration against the truth, as a table in AUDIO_INPUTS.md."""

from __future__ import annotations

import base64
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.audio.clips import Clip, clip, clip_names
from tests.support.wire import COMPATIBLE, ask_compatible, ask_native, compatible_body, data_url, upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.media import MediaServer
    from tests.support.service import RunningService
    from tests.support.wire import Answer

TABLE = Path(__file__).with_name("AUDIO_INPUTS.md")
FORMS = ("URL", "data URL", "bare base64", "upload")
SAMPLES_KEPT = {"WAV PCM 16 mono 16 kHz", "WAV PCM 16", "WAV PCM 24", "WAV float 32", "AIFF PCM 16", "FLAC 16", "TTA"}
"""Clips of exactly 2 s after decoding, which have 25 tokens."""
RESOLVE = {"x-dashscope-ossresourceresolve": "enable"}

HEAD = """# Every format through every form of input

Made by `tests/api/test_audio_inputs.py`, which fails when this page is not true (`UPDATE_TABLES=1 make test` rewrites
it). Each clip holds the same sound; the figures are seconds, as decoded by the service.

"""


@pytest.fixture(scope="module")
def answers(fake_service: RunningService, media: MediaServer) -> dict[tuple[str, str], Answer]:
    """Send every clip in every form: URL and upload in the native dialect, both inline forms in the compatible one."""
    url = fake_service.url

    def by_url(sound: Clip) -> Answer:
        media.files[f"clip-{sound.name}"] = sound.data
        return ask_native(url, media.url(f"clip-{sound.name}"))

    ask: dict[str, Callable[[Clip], Answer]] = {
        "URL": by_url,
        "data URL": lambda sound: ask_compatible(url, data_url(sound.data)),
        "bare base64": lambda sound: ask_compatible(url, base64.b64encode(sound.data).decode()),
        "upload": lambda sound: ask_native(url, upload(url, sound.data), headers=RESOLVE),
    }
    return {(name, form): ask[form](clip(name)) for name in clip_names() for form in FORMS}


def _decoded_s(answer: Answer) -> float:
    """Return the duration of the clip that reached the engine, in seconds: the fake engine reports it."""
    found = re.search(r"clip of ([\d.]+) seconds has the fingerprint (\w+)", answer.text)
    assert found, answer.text
    return float(found[1])


@pytest.mark.parametrize("name", clip_names())
def test_duration_and_bill(name: str, answers: dict[tuple[str, str], Answer]) -> None:
    """Through every form the same samples arrive, as long as the sound, and are billed by the manual's rule."""
    received = [answers[name, form] for form in FORMS]
    assert {_decoded_s(answer) for answer in received} == {_decoded_s(received[0])}
    assert {answer.text for answer in received} == {received[0].text}, "the same clip is heard differently"
    assert _decoded_s(received[0]) == pytest.approx(clip(name).duration_s, abs=clip(name).tolerance_s)
    native, compatible = received[0].usage, received[1].usage
    audio_tokens = native["input_tokens_details"]["audio_tokens"]
    # 12.5 tokens per second, rounded up. The duration is rounded to 10 ms: at a limit two numbers are right.
    least, most = (math.ceil(12.5 * (_decoded_s(received[0]) + rounded_s)) for rounded_s in (-0.005, 0.005))
    assert least <= audio_tokens <= most
    if name in SAMPLES_KEPT:
        assert audio_tokens == 25
    assert compatible["prompt_tokens_details"] == {"audio_tokens": audio_tokens, "text_tokens": 8, "cached_tokens": 0}


def test_table(answers: dict[tuple[str, str], Answer]) -> None:
    """The committed table has the durations that are decoded now."""
    rows = [f"| Format | truth | {' | '.join(FORMS)} |", f"|---|---|{'---|' * len(FORMS)}"]
    for name in clip_names():
        decoded = " | ".join(f"{_decoded_s(answers[name, form]):.2f}" for form in FORMS)
        rows.append(f"| {name} | {clip(name).duration_s:.2f} | {decoded} |")
    page = HEAD + "\n".join(rows) + "\n"
    if os.environ.get("UPDATE_TABLES"):
        TABLE.write_text(page)
    assert TABLE.read_text() == page


def test_damaged_and_encrypted_files_are_no_server_error(fake_service: RunningService) -> None:
    """A joined FLV is captioned whole; an encrypted MP4 and an archive are answered 400 with the reason."""
    url = fake_service.url
    joined = ask_compatible(url, data_url(clip("FLV video, AAC").data * 2))
    assert _decoded_s(joined) == pytest.approx(4.08, abs=0.2)
    mp4 = clip("MP4 AAC (M4A)").data
    entry = mp4.index(b"mp4a", mp4.index(b"stsd"))
    encrypted = mp4[:entry] + b"enca" + mp4[entry + 4 :]
    for data, reason in ((encrypted, "encrypted (Common Encryption)"), (b"PK\3\4" + bytes(99), "a ZIP archive")):
        refused = httpx.post(url + COMPATIBLE, json=compatible_body(data_url(data)), timeout=120)
        assert refused.status_code == 400
        assert reason in refused.text
