"""OpenAI's clients transcribe and translate an unmodified file: every format, streamed, with errors they understand."""

from __future__ import annotations

import subprocess
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.sdk.clients import COMPATIBLE, Client
from tests.support.wire import ask_native, data_url, wav

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sdk.tap import Tap
    from tests.support.service import RunningService

CURRENT, OLD = (Client(f"openai-{version}", "openai_audio", COMPATIBLE) for version in ("3.54.0", "1.52.2"))
NODE = [
    Client(f"openai-npm-{version}", "openai_audio.mjs", COMPATIBLE, asynchronous=True)
    for version in ("7.57.0", "4.104.0")
]
CLIENTS = [CURRENT, OLD, *(replace(client, asynchronous=True) for client in (CURRENT, OLD)), *NODE]
STREAMING = [client for client in CLIENTS if client.environment != OLD.environment]
TOKENS = (25 + 8, 24, 57)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of two seconds, as a file."""
    path = tmp_path_factory.mktemp("clip") / "a clip.wav"
    path.write_bytes(wav(2))
    return path


@pytest.fixture(scope="module")
def caption(fake_service: RunningService) -> str:
    """The service's caption of the clip for a plain HTTP client."""
    return ask_native(fake_service.url, data_url(wav(2))).text


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
@pytest.mark.parametrize("action", ["transcriptions", "translations"])
def test_whole(  # noqa: PLR0917 - fixtures
    client: Client, action: str, tap: Tap, fake_service: RunningService, clip: Path, caption: str
) -> None:
    """The caption, the usage and the request id arrive, of both resources."""
    outcome = tap.perform(client, fake_service, action=action, inline_file=str(clip))
    assert outcome.error is None, outcome.message
    assert (outcome.text, outcome.tokens) == (caption, TOKENS)
    assert tap.exchanges()[0].header("x-request-id") in (outcome.request_id or "")


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
@pytest.mark.parametrize("form", ["text", "srt", "vtt", "verbose_json"])
def test_each_format(  # noqa: PLR0917 - fixtures
    client: Client, form: str, tap: Tap, fake_service: RunningService, clip: Path, caption: str
) -> None:
    """Texts come as texts, and `verbose_json` as an object with the caption."""
    parameters = {"response_format": form, "temperature": 0.5}
    outcome = tap.perform(client, fake_service, action="transcriptions", inline_file=str(clip), parameters=parameters)
    assert outcome.error is None, outcome.message
    # Two seconds are one cue: the first sentence fits it.
    cue = "\n".join(textwrap.wrap(f"{caption.partition('. ')[0]}…", 42))
    expected = {
        "text": f"{caption}\n",
        "srt": f"1\n00:00:00,000 --> 00:00:02,000\n{cue}\n\n",
        "vtt": f"WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n{cue}\n\n",
        "verbose_json": caption,
    }
    assert outcome.text == expected[form]
    if form == "verbose_json" and client.environment == CURRENT.environment:
        assert (outcome.models, (outcome.usage or {})["seconds"]) == (["TranscriptionVerbose"], 2.0)


@pytest.mark.parametrize("client", STREAMING, ids=lambda client: client.name)
def test_stream(client: Client, tap: Tap, fake_service: RunningService, clip: Path, caption: str) -> None:
    """A stream arrives in pieces; its last event has the complete caption and the usage."""
    outcome = tap.perform(client, fake_service, action="transcriptions", inline_file=str(clip), stream="default")
    assert outcome.error is None, outcome.message
    assert len(outcome.pieces) >= 24
    assert (outcome.text, outcome.models, outcome.tokens) == (caption, [caption], TOKENS)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_errors(client: Client, tap: Tap, fake_service: RunningService, clip: Path, tmp_path: Path) -> None:
    """An unknown model and a file without audio raise the client's own exceptions, with the service's message."""
    missing = tap.perform(client, fake_service, action="transcriptions", inline_file=str(clip), model="whisper-1")
    assert (missing.error, missing.status, missing.code) == ("NotFoundError", 404, "model_not_found")
    text = tmp_path / "clip.wav"
    text.write_text("hello, this is no audio at all")
    refused = tap.perform(client, fake_service, action="transcriptions", inline_file=str(text))
    assert (refused.error, refused.status, refused.code) == ("BadRequestError", 400, "invalid_parameter_error")
    assert "cannot be opened: it is text" in (refused.message or "")


def test_curl(fake_service: RunningService, clip: Path, caption: str) -> None:
    """`curl -F file=@…` alone is enough."""
    command = ["curl", "-sS", f"{fake_service.url}/v1/audio/transcriptions", "-F", f"file=@{clip}"]
    done = subprocess.run([*command, "-F", "response_format=text"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{caption}\n"
