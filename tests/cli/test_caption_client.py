"""The client of `captioner caption`: streams, errors and retries."""

from __future__ import annotations

import json

import pytest

from serving.cli.caption.client import Service, ServiceError
from tests.cli.scripted_service import Answer, ScriptedService, stream

LIMITED = '{"error": {"message": "Too many requests.", "code": "limit_requests"}}'
CLIP = "data:;base64,AAAA"


def test_a_stream_is_one_caption() -> None:
    """Pieces arrive one by one; comments are skipped; finish reason, usage and an early stop are kept."""
    with ScriptedService(stream("a ", "dog", captioner={"stopped": "loop"})) as running:
        pieces: list[str] = []
        caption = Service(running.url, "sk-1").caption(CLIP, on_text=pieces.append)
    assert pieces == ["a ", "dog"]
    assert (caption.text, caption.finish_reason, caption.usage, caption.stopped) == (
        "a dog",
        "stop",
        {"total_tokens": 3},
        "loop",
    )
    (request,) = running.requests
    assert running.headers[0]["authorization"] == "Bearer sk-1"
    assert request == {
        "model": "qwen3-omni-30b-a3b-captioner",
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": CLIP}}]}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_with_the_version(path: str) -> None:
    """The base URL of an SDK and the address of the service are both accepted, also without a scheme."""
    with ScriptedService(stream("x")) as running:
        assert Service(running.url + path).caption(CLIP).text == "x"
        assert Service(running.url.removeprefix("http://") + path).caption(CLIP).text == "x"


def test_retries_wait_as_long_as_the_service_asks() -> None:
    """`Retry-After` is the least pause; without it pauses double from half a second."""
    answers = (Answer(503, ""), Answer(429, LIMITED, retry_after="7"), Answer(500, "{}"), stream("x"))
    with ScriptedService(*answers) as running:
        pauses: list[float] = []
        seen: list[str] = []
        caption = Service(running.url).caption(
            CLIP, sleep=pauses.append, on_retry=lambda error, pause_s: seen.append(f"{error} {pause_s:g}")
        )
    assert caption.text == "x"
    assert pauses == [0.5, 7.0, 2.0]
    assert seen == ["HTTP 503 Service Unavailable 0.5", "Too many requests. 7", "HTTP 500 2"]


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (Answer(400, '{"error": {"message": "The audio\\nis empty", "code": "bad"}}'), "The audio is empty", 1),
        (Answer(429, LIMITED, x_should_retry="false"), "Too many requests.", 1),
        (Answer(429, LIMITED, retry_after="86400"),
         "Too many requests. (the service asks to retry in 86400 s)", 1),
        (Answer(429, LIMITED), "Too many requests.", 5),
        (Answer(200, "<html>"), "the stream ended within the caption", 5),
        (Answer(200, 'data: {"error": {"message": "The engine failed."}}\n\n'), "The engine failed.", 1),
        (Answer(307, "", location="http://elsewhere"),
         "the service redirects to http://elsewhere; pass that address as --url", 1),
        (Answer(404, "not found"), "HTTP 404 Not Found", 1),
    ],
)  # fmt: skip
def test_a_failure_is_one_line(answer: Answer, message: str, requests: int) -> None:
    """The line is the service's own message where it has one; what a retry may cure is tried five times."""
    with ScriptedService(answer) as running, pytest.raises(ServiceError) as raised:
        Service(running.url).caption(CLIP, sleep=lambda _: None)
    assert str(raised.value) == message
    assert len(running.requests) == requests


@pytest.mark.parametrize(
    "first", [stream("a dog", end=False), stream("a dog").__class__(200, stream("a dog").body.decode(), cut=90)]
)
def test_no_retry_after_the_first_text(first: Answer) -> None:
    """A second attempt would print the caption twice and be billed twice."""
    with ScriptedService(first, stream("other")) as running, pytest.raises(ServiceError):
        Service(running.url).caption(CLIP, sleep=lambda _: None)
    assert len(running.requests) == 1


def test_nobody_listens() -> None:
    """The line has the address and the reason."""
    with ScriptedService(stream("x")) as running:
        pass
    with pytest.raises(ServiceError, match=f"^cannot reach {running.url}: Connection refused$"):
        Service(running.url).caption(CLIP, sleep=lambda _: None)


def test_the_model_is_the_captioner_or_the_first_of_the_list() -> None:
    """A service that serves the model by another name is used by that name."""
    for models, expected in (
        (("other", "qwen3-omni-30b-a3b-captioner"), "qwen3-omni-30b-a3b-captioner"),
        (("other", "third"), "other"),
        ((), "qwen3-omni-30b-a3b-captioner"),
    ):
        with ScriptedService(stream("x"), models=models) as running:
            service = Service(running.url)
            service.choose_model()
        assert service.model == expected


def test_readiness() -> None:
    """A service reports what it waits for; one that reports nothing may be ready."""
    loading = Answer(503, '{"ready": false, "reason": "loading", "progress": "loading the weights for 3 s"}')
    for ready, expected in ((None, ""), (loading, "loading the weights for 3 s"), (Answer(404), None)):
        with ScriptedService(stream("x"), ready=ready) as running:
            assert Service(running.url).readiness() == expected


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:y"])
def test_wrong_addresses(url: str) -> None:
    """An address that is none of http or https is refused before anything is read."""
    with pytest.raises(ValueError, match=r"--url|port|Port"):
        Service(url)


def test_a_key_is_one_word() -> None:
    """A key with a line break would be a second header."""
    with pytest.raises(ValueError, match="--key"):
        Service("http://x", "sk-1\r\nx: y")


def test_the_segments_of_a_timeline_are_collected() -> None:
    """They come with the pieces of the text; a service that ignores the parameter makes no timeline."""
    first, second = {"start": 0, "end": 5.5, "caption": "a dog"}, {"start": 5.5, "end": 9, "caption": "", "error": "e"}
    with ScriptedService(timeline_stream([first], [second]), stream("a dog")) as running:
        caption = Service(running.url).caption(CLIP, timeline=True)
        assert (caption.segments, running.requests[0]["timeline"]) == ((first, second), True)
        with pytest.raises(ServiceError, match=r"^this service makes no timelines: its answer has none$"):
            Service(running.url).caption(CLIP, timeline=True)


def timeline_stream(*events: list[dict[str, object]]) -> Answer:
    """Return a stream whose events have these segments."""
    chunks = [{"choices": [{"delta": {"content": "", "timeline": {"segments": each}}}]} for each in events]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return Answer(200, body + stream("").body.decode())
