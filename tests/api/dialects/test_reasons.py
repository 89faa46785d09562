"""Errors keep the manual's sentence and say what exactly is wrong, and where, and what to do next."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.config import Settings
from serving.errors import ClientError, InvalidRequest, ModelNotFound
from serving.types import CaptionRequest, InlineAudio, UrlAudio
from tests.api.dialects.bad_requests import AUDIO, BAD_URL, BODY, GOOD, MODAL, MODEL, compatible, native, user

SETTINGS = Settings()
URL = "https://media.example/a.wav"
WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQAAAAA="
PLACES = "'messages.0.content.0"


def decode(body: bytes, settings: Settings = SETTINGS, **headers: str) -> CaptionRequest:
    """Decode a request of the compatible dialect."""
    return OpenAICodec(settings).decode_request(body, headers, "id")[0]


def reason(body: bytes, sentence: str) -> str:
    """Return what the error of both dialects says after the sentence."""
    found = []
    for codec in (OpenAICodec(SETTINGS), DashScopeCodec(SETTINGS)):
        with pytest.raises(ClientError) as raised:
            codec.decode_request(body, {}, "id")
        found.append(str(raised.value))
    assert found[0] == found[1]
    assert found[0].startswith(f"{sentence} ")
    return found[0].removeprefix(f"{sentence} ")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "It is empty."),
        (b" \n", "It is empty."),
        (b"hello", "It is not JSON: expected value at line 1 column 1."),
        (b'{"model":\n "x",}', "It is not JSON: trailing comma at line 2 column 6."),
        (b"\xef\xbb\xbf{", "It is not JSON: EOF while parsing an object at line 1 column 1."),
        (b'{"model":"\xff"}', "It is not JSON: invalid unicode code point at line 1 column 11."),
        (b"[" * 1000, "It is not JSON: recursion limit exceeded at line 1 column 202."),
        (gzip.compress(b"{}", mtime=0), "It is gzip; send the header content-encoding: gzip with it."),
        ("{}".encode("utf-16"), "It is UTF-16; JSON is UTF-8."),
        (b"--x\r\n", "It is a form; forms with a file go to /v1/audio/transcriptions."),
        (b"RIFF\0\0\0\0WAVE", "It is a file; files go as a form to /v1/audio/transcriptions."),
        (b"[]", "It is not a JSON object."),
        (b'{"a":[' + b"0," * 50_000 + b"0]}", "It has more than 50000 values."),
    ],
    ids=str,
)
def test_bodies(body: bytes, expected: str) -> None:
    """A body that is not JSON has the position of the mistake; other kinds of bodies are named."""
    assert reason(body, BODY) == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("data:audio/wav,abc", "A data URL should begin with data:, a media type or none, and ;base64,."),
        ("oss://a/b", "The address of an upload needs a key and the header X-DashScope-OssResourceResolve: enable."),
        (
            "file:///etc/passwd",
            "It is neither an http(s) URL, a data URL, an upload nor base64 of audio; paths of files are never opened.",
        ),
        (f"https://a/{'a' * 9000}", "It has more than 8192 characters, or a control character."),
        ("https://a\x01/", "It has more than 8192 characters, or a control character."),
        ("http://[::1/a.wav", "Its host is malformed."),
        ("http:///a.wav", "It has no host, or a blank in it."),
        ("data:audio/wav;base64,UklGRé", "The data is not base64."),
    ],
    ids=lambda text: text[:24],
)
def test_references(reference: str, expected: str) -> None:
    """Mistakes in a reference share one sentence of the manual, which each of them continues."""
    assert reason(_either(user({"type": "audio", "audio": reference})), BAD_URL) == expected


@pytest.mark.parametrize(
    ("part", "sentence", "expected"),
    [
        ("x", MODAL, f"{PLACES}' must be Object."),
        ({}, MODAL, f"{PLACES}' has no type, and accepted are text, audio, input_audio, audio_url, file."),
        (
            {"type": "image_url", "image_url": {"url": URL}},
            MODAL,
            f"{PLACES}' is 'image_url', and accepted are text, audio, input_audio, audio_url, file.",
        ),
        (
            {"type": "input_audio", "input_audio": {"url": URL}},
            AUDIO,
            (
                f"{PLACES}.input_audio.data' is missing, or no text: it should be a URL, a data URL, or (input_audio "
                "and file) base64."
            ),
        ),
        (
            {"type": "file", "file": {"file_id": "file-1"}},
            AUDIO,
            f"{PLACES}.file.file_id' is not supported: send the audio as file_data.",
        ),
        (
            {"type": "text", "text": "What's 1 + 1?"},
            AUDIO,
            (
                'A text alone gets no answer: add the audio as a part, {"audio": "https://…"} or {"type": '
                '"input_audio", "input_audio": {"data": "https://…"}}. To probe the service use GET /health.'
            ),
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_parts(part: Any, sentence: str, expected: str) -> None:
    """A part that cannot be used is named by its place; a text alone has the next step."""
    assert reason(_either(user(part)), sentence) == expected


def _either(messages: str) -> bytes:
    """Return a request that both dialects read."""
    return f'{{"model":"{MODEL}","messages":{messages},"input":{{"messages":{messages}}}}}'.encode()


def test_an_unknown_model_lists_what_is_served() -> None:
    """Both dialects name the models that are served, four at most."""
    settings = Settings(model_aliases=tuple("abcdef"))
    native_codec = DashScopeCodec(settings)
    with pytest.raises(ModelNotFound) as raised:
        native_codec.decode_request(native(GOOD, '"gpt-4o"'), {}, "id")
    assert json.loads(native_codec.error(raised.value, "id").body)["message"] == (
        f"Model not exist. This server serves {MODEL}, a, b, c and 3 more."  # sic
    )
    with pytest.raises(ModelNotFound) as raised:
        decode(compatible(GOOD, '"gpt-4o"'))
    assert str(raised.value) == (
        f"The model `gpt-4o` does not exist or you do not have access to it. This server serves {MODEL}."
    )


@pytest.mark.parametrize("model", ["", '"model":null,', '"model":"",'])
def test_no_model_is_the_served_one(model: str) -> None:
    """A request of the compatible dialect without a model gets the one that is served."""
    assert decode(f'{{{model}"messages":{GOOD}}}'.encode()).model == MODEL


@pytest.mark.parametrize("model", ["Qwen/Qwen3-Omni-30B-A3B-Captioner", "Qwen3-Omni-30B-A3B-Captioner"])
def test_names_of_the_hub(model: str) -> None:
    """The captioner's names on the hubs are accepted, also where the stand-in is served; another's are not."""
    assert decode(compatible(GOOD, f'"{model}"')).model == model
    with pytest.raises(ModelNotFound):
        decode(compatible(GOOD, f'"{model}"'), Settings(served_model_name="mine", model="me/my-model"))


def test_names_of_the_checkpoint() -> None:
    """A checkpoint's name on its hub, without the owner, and its directory's name are accepted; a path is not."""
    for name in ("mine", "me/my-model", "my-model"):
        assert (
            decode(compatible(GOOD, f'"{name}"'), Settings(served_model_name="mine", model="me/my-model")).model == name
        )
    local = Settings(served_model_name="mine", model="/models/my-model")
    assert decode(compatible(GOOD, '"my-model"'), local).model == "my-model"
    for name in ("/models/my-model", "checkpoint"):
        with pytest.raises(ModelNotFound):
            decode(compatible(GOOD, f'"{name}"'), local)


def test_a_byte_order_mark_is_ignored() -> None:
    """UTF-8 with a byte order mark is read in both dialects."""
    assert decode(b"\xef\xbb\xbf" + compatible(GOOD)).audio == UrlAudio(URL)
    assert DashScopeCodec(SETTINGS).decode_request(b"\xef\xbb\xbf" + native(GOOD), {}, "id")[0].audio == UrlAudio(URL)


@pytest.mark.parametrize(
    ("data", "audio"),
    [
        (f"data:audio/wav;base64,{WAV}", InlineAudio(WAV)),
        (WAV, InlineAudio(WAV)),
        (URL, UrlAudio(URL)),
    ],
)
def test_file_parts(data: str, audio: InlineAudio | UrlAudio) -> None:
    """A part of type `file` with `file_data` is audio."""
    part = {"type": "file", "file": {"filename": "a.wav", "file_data": data}}
    assert decode(compatible(user({"type": "text", "text": "Describe."}, part))).audio == audio


def test_minus_one_switches_top_k_off() -> None:
    """`top_k` -1 is vLLM's way to switch it off; the manual's dialect refuses it."""
    assert decode(compatible(GOOD, parameters='{"top_k":-1}')).sampling.top_k == 0
    with pytest.raises(InvalidRequest):
        DashScopeCodec(SETTINGS).decode_request(native(GOOD, parameters='{"top_k":-1}'), {}, "id")
