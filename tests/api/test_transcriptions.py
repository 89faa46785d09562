"""`POST /v1/audio/transcriptions`: the caption of an uploaded file in every format, its fields, its bill."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from openai.types.audio import TranscriptionStreamEvent
from openai.types.audio.transcription import Transcription
from openai.types.audio.transcription_verbose import TranscriptionVerbose
from pydantic import TypeAdapter

from tests.support.served import served
from tests.support.wire import MODEL, events, wav

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

pytestmark = pytest.mark.usefixtures("in_process")

PATH = "/v1/audio/transcriptions"
CLIP = wav(6.08)
TEXT = "a dog barks twice"
FAKE: dict[str, Any] = {"fake_text": TEXT, "fake_tokens": 4}
USAGE = {
    "type": "tokens",
    "input_tokens": 84,
    "output_tokens": 4,
    "total_tokens": 88,
    "input_token_details": {"audio_tokens": 76, "text_tokens": 8},
}


async def ask(client: httpx.AsyncClient, path: str = PATH, clip: bytes = CLIP, **fields: Any) -> httpx.Response:
    """Send the clip as a form."""
    return await client.post(path, data={"model": MODEL, **fields}, files={"file": ("clip.wav", clip, "audio/wav")})


@pytest.mark.parametrize("prefix", ["/v1", "/compatible-mode/v1", "", "/compatible-mode"])
@pytest.mark.parametrize("verb", ["transcriptions", "translations"])
async def test_json_is_the_default(prefix: str, verb: str) -> None:
    """Both endpoints answer below every base URL, with the caption as `text` and the tokens as billed."""
    async with served(**FAKE) as client:
        answer = await ask(client, f"{prefix}/audio/{verb}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert len(answer.headers["x-request-id"]) == 36
        assert answer.json() == {"text": TEXT, "usage": USAGE}
        Transcription.model_validate(answer.json(), strict=True)


async def test_each_format() -> None:
    """`text`, `srt`, `vtt` and `verbose_json` have the caption, and times: here those of the whole clip."""
    async with served(**FAKE) as client:
        text = await ask(client, response_format="text")
        assert (text.headers["content-type"], text.text) == ("text/plain; charset=utf-8", f"{TEXT}\n")
        srt = await ask(client, response_format="srt")
        assert srt.headers["content-type"] == "application/x-subrip; charset=utf-8"
        assert srt.text == f"1\n00:00:00,000 --> 00:00:06,080\n{TEXT}\n\n"
        vtt = await ask(client, response_format="vtt")
        assert vtt.headers["content-type"] == "text/vtt; charset=utf-8"
        assert vtt.text == f"WEBVTT\n\n00:00:00.000 --> 00:00:06.080\n{TEXT}\n\n"
        verbose = (await ask(client, response_format="verbose_json", temperature="0.5")).json()
        assert verbose == {
            "task": "transcribe",
            "language": "english",
            "duration": 6.08,
            "text": TEXT,
            "segments": [
                {
                    "id": 0,
                    "seek": 0,
                    "start": 0.0,
                    "end": 6.08,
                    "text": TEXT,
                    "tokens": [],
                    "temperature": 0.5,
                    "avg_logprob": 0.0,
                    "compression_ratio": 0.68,
                    "no_speech_prob": 0.0,
                }
            ],
            "usage": USAGE | {"type": "duration", "seconds": 6.08},
        }
        TranscriptionVerbose.model_validate(verbose, strict=True)
        translated = (await ask(client, "/v1/audio/translations", response_format="verbose_json")).json()
        assert translated["task"] == "translate"


async def test_the_formats_with_times_are_a_timeline_of_a_long_clip() -> None:
    """A clip over 30 s has segments that tile it; `json` has one caption of it, and each is billed once."""
    async with served(**FAKE) as client:
        verbose = (await ask(client, clip=wav(45.0), response_format="verbose_json")).json()
        segments = verbose["segments"]
        assert [segment["id"] for segment in segments] == [0, 1]
        edges = [0.0, *(segment["end"] for segment in segments)]
        assert [segment["start"] for segment in segments] == edges[:-1]
        assert all(0 < end - start <= 30 for start, end in pairwise(edges))
        assert (edges[-1], verbose["duration"]) == (45.0, 45.0)
        assert verbose["text"] == " ".join([TEXT] * 2)
        assert [verbose["usage"][name] for name in ("input_tokens", "output_tokens")] == [563 + 8, 8]
        srt = (await ask(client, clip=wav(45.0), response_format="srt")).text
        assert [cue.split("\n")[2] for cue in srt.strip().split("\n\n")] == [TEXT] * 2
        whole = (await ask(client, clip=wav(45.0))).json()
        assert (whole["text"], whole["usage"]["output_tokens"]) == (TEXT, 4)


async def test_a_stream_has_openais_events() -> None:
    """A stream has deltas, then one event with all text and the usage, then `[DONE]`; all of OpenAI's types."""
    async with served(**FAKE, stream_flush_interval_s=0) as client:
        for form in ("json", "text"):
            answer = await ask(client, stream="true", response_format=form)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.text.endswith("data: [DONE]\n\n")
            found = events(answer.text)
            for event in found:
                TypeAdapter(TranscriptionStreamEvent).validate_python(event, strict=True)
            *deltas, done = found
            assert len(deltas) == 4
            assert {event["type"] for event in deltas} == {"transcript.text.delta"}
            assert "".join(event["delta"] for event in deltas) == TEXT
            assert done == {"type": "transcript.text.done", "text": TEXT, "usage": USAGE}


async def test_probabilities_of_tokens() -> None:
    """`include[]` logprobs adds the tokens of the caption, to an object and to the events of a stream."""
    async with served(**FAKE, stream_flush_interval_s=0) as client:
        fields: dict[str, Any] = {"include[]": "logprobs"}
        whole = (await ask(client, **fields)).json()
        Transcription.model_validate(whole)
        assert "".join(each["token"] for each in whole["logprobs"]) == TEXT
        assert whole["logprobs"][0] == {"token": "a", "logprob": -0.693147, "bytes": [97]}
        *deltas, done = events((await ask(client, stream="true", **fields)).text)
        for event in (*deltas, done):
            TypeAdapter(TranscriptionStreamEvent).validate_python(event, strict=True)
        assert [each for delta in deltas for each in delta["logprobs"]] == done["logprobs"] == whole["logprobs"]


@pytest.mark.parametrize(
    "fields",
    [
        {"language": "de", "prompt": "Mr. Müller", "chunking_strategy": "auto", "user": "me"},
        {
            "chunking_strategy": '{"type":"server_vad"}',
            "timestamp_granularities[]": "segment",
            "keywords[]": ["a", "b"],
        },
        {"temperature": "0", "top_p": "0.5", "top_k": "-1", "seed": "7", "max_completion_tokens": "100"},
        {"model": "", "response_format": "", "stream": "", "language": "", "temperature": ""},
        {"stream": "False", "unknown": "x", "include[]": ""},
    ],
    ids=str,
)
async def test_accepted_fields(fields: dict[str, Any]) -> None:
    """Fields without effect, sampling parameters and empty fields are accepted."""
    async with served(**FAKE) as client:
        answer = await ask(client, **fields)
        assert (answer.status_code, answer.json()["text"]) == (200, TEXT)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": "diarized_json"}, "response_format", "one of json, verbose_json, text, srt, vtt"),
        ({"response_format[]": "json"}, "response_format", "one of json, verbose_json, text, srt, vtt"),
        ({"response_format": "JSON"}, "response_format", "one of json, verbose_json, text, srt, vtt"),
        ({"stream": "true", "response_format": "srt"}, "stream", "not supported with the response_format srt"),
        ({"stream": "yes"}, "stream", "'stream' must be Boolean"),
        ({"temperature": "2"}, "temperature", "Temperature should be in [0.0, 2.0)"),
        ({"temperature": "warm"}, "temperature", "'temperature' must be Float"),
        ({"temperature": "nan"}, "temperature", "'temperature' must be Float"),
        ({"max_tokens": "9" * 5000}, "max_tokens", "'max_tokens' must be Integer"),
        ({"stream[]": "true"}, "stream", "'stream' must be Boolean"),
        ({"model[0]": MODEL}, "model", "'model' must be String"),
        ({"seed": "-1"}, "seed", "lesser than the minimum of 0"),
        ({"top_k": "-2"}, "top_k", "Parameter top_k be greater than or equal to 0"),
        ({"timestamp_granularities[]": ["segment", "word"]}, "timestamp_granularities", "none of words"),
        ({"timestamp_granularities": "word"}, "timestamp_granularities", "none of words"),
        ({"include[]": ["logprobs", "x"]}, "include", "it has logprobs alone, with the response_format json"),
        ({"include[]": "logprobs", "response_format": "text"}, "include", "with the response_format json"),
        ({"known_speaker_names[]": "Ann"}, "known_speaker_names", "speakers are not distinguished"),
    ],
    ids=str,
)
async def test_refused_fields(fields: dict[str, Any], param: str, message: str) -> None:
    """A field that would change the answer and is not done, or is out of range, is 400 with `param` and a reason."""
    async with served(**FAKE) as client:
        answer = await ask(client, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert message in error["message"]


async def test_an_unknown_model_is_not_found() -> None:
    """Another model than the served one is 404, as in chat completions."""
    async with served(**FAKE) as client:
        answer = await ask(client, model="whisper-1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_what_the_file_decides() -> None:
    """No audio, text in place of audio, an empty file and a file over the limit each have their error."""
    async with served(**FAKE, max_transcription_bytes=200_000) as client:
        missing = await client.post(PATH, data={"model": MODEL}, files={"audio": b"x"})
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "file")
        assert "curl -F file=@clip.wav" in missing.json()["error"]["message"]
        text = await ask(client, clip=b"hello, this is no audio at all")
        assert text.status_code == 400
        assert text.json()["error"]["message"].startswith(
            "The audio format is illegal and cannot be opened: it is text"
        )
        empty = await ask(client, clip=b"")
        assert (empty.status_code, empty.json()["error"]["message"]) == (400, "The audio is empty")
        large = await ask(client, clip=wav(7))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        assert large.json()["error"]["message"] == (
            "Payload Too Large. The file has 224044 bytes, and the limit is 200000; larger files go by URL to "
            "/v1/chat/completions."
        )
        huge = await ask(client, clip=wav(30))
        assert (huge.status_code, huge.json()["error"]["code"]) == (413, "request_too_large")


async def test_json_is_sent_to_the_other_endpoint() -> None:
    """A JSON body gets 400 with the next step."""
    async with served(**FAKE) as client:
        answer = await client.post(PATH, json={"model": MODEL, "file": "x"})
        assert answer.status_code == 400
        assert "JSON goes to /v1/chat/completions" in answer.json()["error"]["message"]


async def test_metrics_have_their_own_label() -> None:
    """Transcriptions are counted under a dialect of their own, refused ones included."""
    async with served(**FAKE) as client:
        await ask(client)
        await ask(client, clip=b"")
        metrics = (await client.get("/metrics")).text
        series = re.findall(r'captioner_requests_total\{code="(\w+)",dialect="transcriptions",.*\} 1\.0', metrics)
        assert sorted(series) == ["audio_empty", "stop"]


async def test_a_key_is_required() -> None:
    """Without a valid key the answer is 401 in OpenAI's dialect."""
    async with served(**FAKE, auth=True, api_keys="sk-one-of-the-settings") as client:
        assert (await ask(client)).json()["error"]["code"] == "invalid_api_key"
        client.headers["authorization"] = "Bearer sk-one-of-the-settings"
        assert (await ask(client)).json()["text"] == TEXT


async def test_one_record_is_billed(tmp_path: Path) -> None:
    """A transcription leaves one usage record, with the tokens of its answer; a refused form leaves none."""
    async with served(**FAKE, data_dir=tmp_path) as client:
        assert (await ask(client)).json()["usage"] == USAGE
        assert (await ask(client, stream="maybe")).status_code == 400
    with closing(sqlite3.connect(tmp_path / "captioner.db")) as database:
        query = (
            "SELECT dialect, model, audio_form, stream, input_tokens, output_tokens, ending, billed FROM usage_records"
        )
        rows = database.execute(query).fetchall()
    assert rows == [("transcriptions", MODEL, "file", 0, 84, 4, "finished", 1)]


async def test_hard_text_survives() -> None:
    """Arrows, mark-up, blank lines and other scripts stay one cue; JSON is ASCII."""
    text = "“哎呀” <b>a</b> & --> b"
    async with served(fake_text=text, fake_tokens=len(text.split(" "))) as client:
        assert (await ask(client)).json()["text"] == text
        assert (await ask(client)).content.isascii()
        srt = (await ask(client, response_format="srt")).text.splitlines()
        assert srt == ["1", "00:00:00,000 --> 00:00:06,080", "“哎呀” ‹b›a‹/b› & → b", ""]  # noqa: RUF001
        vtt = (await ask(client, response_format="vtt")).text.splitlines()
        assert vtt[2:] == ["00:00:00.000 --> 00:00:06.080", "“哎呀” &lt;b&gt;a&lt;/b&gt; &amp; --&gt; b", ""]
