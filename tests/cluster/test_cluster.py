"""Frontends and engine replicas under real Ray Serve: answers as of one process, and the cost of a lost process."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.engine.remote.wire import SILENCE_S
from tests.api import test_upgrade_offers as wire
from tests.cluster.running import ENGINE, FRONTEND, SCRAPE, RunningCluster, until
from tests.support.wire import (
    COMPATIBLE,
    MODEL,
    NATIVE,
    compatible_body,
    data_url,
    events,
    native_body,
    upload_fields,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

KEY = {"authorization": "Bearer sesame"}
SSE = {"x-dashscope-sse": "enable"}
AUDIO = data_url(wav(1.0))
LONG = {"max_tokens": 1000, "ignore_eos": True}
"""Parameters of a caption that takes twenty seconds."""


def ask(
    url: str, dialect: str, *, audio: str = AUDIO, headers: dict[str, str] = KEY, **parameters: Any
) -> httpx.Response:
    """Send one request, by default not streamed."""
    if dialect == "native":
        sse = SSE if parameters.pop("stream", False) else {}
        return httpx.post(url + NATIVE, json=native_body(audio, **parameters), headers=headers | sse, timeout=60)
    if parameters.get("stream"):
        parameters["stream_options"] = {"include_usage": True}
    return httpx.post(url + COMPATIBLE, json=compatible_body(audio, **parameters), headers=headers, timeout=60)


def code(response: httpx.Response) -> str:
    """Return the error code, from the field where the dialect of the request has it."""
    body = response.json()
    dialect = "compatible" if "compatible" in response.request.url.path else "native"
    assert body["request_id"] == response.headers["x-request-id"]
    return str(body["code"] if dialect == "native" else body["error"]["code"])


def caption(response: httpx.Response) -> tuple[str, int]:
    """Return text and output tokens of a correct, complete answer in either dialect, streamed or not."""
    assert response.status_code == 200, response.text
    ids = response.headers.get_list("x-request-id")
    assert len(ids) == 1
    assert len(ids[0]) == 36
    streamed = response.headers["content-type"].startswith("text/event-stream")
    if "compatible" not in response.request.url.path:
        last = events(response.text)[-1] if streamed else response.json()
        choice = last["output"]["choices"][0]
        assert (choice["finish_reason"], last["request_id"]) == ("stop", ids[0])
        return choice["message"]["content"][0]["text"], last["usage"]["output_tokens"]
    if streamed:
        assert response.text.endswith("data: [DONE]\n\n")
        *chunks, last = events(response.text)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        return text, last["usage"]["completion_tokens"]
    body = response.json()
    return body["choices"][0]["message"]["content"], body["usage"]["completion_tokens"]


@contextmanager
def stream(url: str, dialect: str, **parameters: Any) -> Iterator[Iterator[str]]:
    """Context of a stream whose first text has arrived; yields its further lines."""
    body = (
        native_body(AUDIO, **parameters) if dialect == "native" else compatible_body(AUDIO, stream=True, **parameters)
    )
    path = NATIVE if dialect == "native" else COMPATIBLE
    with httpx.stream("POST", url + path, json=body, headers=KEY | SSE, timeout=60) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        assert any(line.startswith("data:") for line in lines)
        yield lines


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Context in which a process is suspended."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)


def ends(lines: Iterator[str]) -> str:
    """Return the end of a stream: `done`, `error`, or `cut` where it is closed without either."""
    rest = "\n".join(lines)
    last = events(rest)[-1]
    if "error" in last or "event:error" in rest:
        return "error"
    return "done" if rest.endswith("data: [DONE]\n") or '"finish_reason":"' in rest.replace(':"null"', "") else "cut"


def test_offers_to_upgrade_are_ignored(cluster: RunningCluster) -> None:
    """The body behind an offer belongs to its request, through HAProxy and at each frontend: Ray starts its server."""
    for url in (cluster.url, *cluster.frontends()):
        with wire.connect(int(url.rpartition(":")[2])) as client:
            offering = wire.post(0.4, *wire.OFFERS["h2c"], key="sesame")
            client.sendall(offering[:200])
            time.sleep(0.1)
            client.sendall(offering[200:])
            assert wire.prompt_tokens(wire.read(client)) == wire.SHORT
            client.sendall(wire.post(6, key="sesame"))
            assert wire.prompt_tokens(wire.read(client)) == wire.LONG


@pytest.mark.parametrize("dialect", ["native", "compatible"])
def test_a_caption_is_the_same_in_every_way(cluster: RunningCluster, dialect: str) -> None:
    """Answers are equal streamed and not, through HAProxy and at each frontend, with one request id, the service's."""
    own = KEY | {"x-request-id": "mine", "x-request-timeout-seconds": "0.01", "serve_multiplexed_model_id": "x"}
    answers = [
        caption(ask(url, dialect, headers=headers, stream=streamed))
        for url in (cluster.url, *cluster.frontends())
        for streamed in (False, True)
        for headers in (KEY, own)
    ]
    assert {tokens for _, tokens in answers} == {24}
    assert len({text for text, _ in answers}) == 1
    assert answers[0][0].startswith("This clip of 1.00 seconds")


@pytest.mark.parametrize("dialect", ["native", "compatible"])
def test_errors_are_in_the_callers_dialect(cluster: RunningCluster, dialect: str) -> None:
    """A wrong key and unreadable audio are refused in the caller's dialect."""
    refused = ask(cluster.url, dialect, headers={"authorization": "Bearer wrong"})
    assert (refused.status_code, code(refused).lower().replace("_", "")) == (401, "invalidapikey")
    unreadable = ask(cluster.url, dialect, audio=data_url(b"no audio at all" * 100))
    assert unreadable.status_code == 400
    assert "audio format is illegal" in unreadable.text
    assert code(unreadable)


def test_unknown_paths_and_operators_paths(cluster: RunningCluster) -> None:
    """Paths other than those of captions reach the frontends too: 404 in the dialect, models, readiness, metrics."""
    unknown = httpx.get(f"{cluster.url}/v1/nothing", headers=KEY)
    assert (unknown.status_code, unknown.json()["error"]["message"][:10]) == (404, "Not found!")
    assert httpx.get(f"{cluster.url}/v1/models", headers=KEY).json()["data"][0]["id"] == MODEL
    assert httpx.get(f"{cluster.url}/readyz").json() == {"ready": True}
    assert "captioner_engine_replicas_ready 2.0" in httpx.get(f"{cluster.url}/metrics", headers=SCRAPE).text


def test_scrapes_need_the_token(cluster: RunningCluster) -> None:
    """Through HAProxy, at a frontend and at each metrics port; every metrics port lists all targets, too."""
    targets = httpx.get(f"{cluster.url}/metrics/targets", headers=SCRAPE).json()
    ports = [f"http://{each['targets'][0]}" for each in targets if each["labels"]["role"] in {"frontend", "engine"}]
    assert len(ports) >= 4
    for url in (cluster.url, *cluster.frontends(), *ports):
        for path in ("/metrics", "/metrics/targets"):
            for headers in ({}, KEY, {"host": "127.0.0.1"}):
                assert httpx.get(url + path, headers=headers).status_code == 401, url
            assert httpx.get(url + path, headers=SCRAPE).status_code == 200, url
    listed = httpx.get(f"{ports[0]}/metrics/targets", headers=SCRAPE).json()
    assert {each["labels"]["role"] for each in listed} >= {"frontend", "engine"}


@pytest.mark.parametrize("dialect", ["native", "compatible"])
def test_an_overload_is_refused_with_retry_after(cluster: RunningCluster, dialect: str) -> None:
    """Requests beyond the bounds of two engines get 503 and `Retry-After`; the others are answered."""
    with ThreadPoolExecutor(60) as pool:
        answers = [each.result() for each in [pool.submit(ask, cluster.url, dialect) for _ in range(60)]]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 5 <= len(refused) <= 45
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert code(answer)
    assert {caption(answer)[1] for answer in answers if answer.status_code == 200} == {24}
    until(lambda: cluster.engine_running() == 0)


def test_an_upload_through_one_frontend_is_found_by_the_other(cluster: RunningCluster) -> None:
    """A frontend honours the upload policy of another frontend, and both find the file."""
    one, other = cluster.frontends()
    query = {"action": "getPolicy", "model": MODEL}
    policy = httpx.get(f"{one}/api/v1/uploads", params=query, headers=KEY).json()["data"]
    key = f"{policy['upload_dir']}/clip.wav"
    sent = httpx.post(f"{other}/oss-upload", data=upload_fields(policy, key), files={"file": ("clip.wav", wav(1.0))})
    assert sent.status_code == 200, sent.text
    resolve = KEY | {"x-dashscope-ossresourceresolve": "enable"}
    answers = {caption(ask(url, "native", audio=f"oss://{key}", headers=resolve)) for url in (one, other, cluster.url)}
    assert answers == {caption(ask(one, "native"))}


@pytest.mark.parametrize("dialect", ["native", "compatible"])
def test_a_client_that_leaves_stops_its_generation(cluster: RunningCluster, dialect: str) -> None:
    """A disconnect stops the generation in the engine replica, long before it would have finished."""
    with stream(cluster.url, dialect, **LONG):
        until(lambda: cluster.engine_running() == 1, 5)
    began = time.monotonic()
    until(lambda: cluster.engine_running() == 0, 10)
    assert time.monotonic() - began < 5


def test_a_killed_engine_costs_only_what_it_had_begun(cluster: RunningCluster) -> None:
    """Clips that it had not answered are made by the other engine, once; its streams end with an error event."""
    with ThreadPoolExecutor(8) as pool:
        dialects = ["native", "compatible"] * 3
        streams = [stream(cluster.url, dialect, **LONG) for dialect in dialects]
        lines = [each.__enter__() for each in streams]
        waiting: list[Future[httpx.Response]] = []
        # Which engine gets clips depends on how the streams were divided: all clips may go to the other one.
        for victim in sorted(cluster.pids(ENGINE)):
            with suspended(victim):
                time.sleep(0.5)
                waiting += [pool.submit(ask, cluster.url, dialect) for dialect in dialects]
                time.sleep(2)
                if waits := not all(each.done() for each in waiting):
                    os.kill(victim, signal.SIGKILL)
                    break
        assert waits
        assert {caption(each.result())[1] for each in waiting} == {24}
        # Tokens still arrive from the other engine; the streams of the lost engine have ended by now.
        endings: list[Future[str]] = [pool.submit(ends, each) for each in lines]
        results = sorted(each.result() for each in endings)
        assert results.count("error") >= 2
        assert results.count("done") >= 2
        assert "cut" not in results
        for each in streams:
            each.__exit__(None, None, None)


def test_a_suspended_engine_gets_no_more_and_its_clips_move(cluster: RunningCluster) -> None:
    """The clips of a suspended engine move within `SILENCE_S`; once it is resumed it is used again."""
    victim = min(cluster.pids(ENGINE))
    with ThreadPoolExecutor(6) as pool, suspended(victim):
        began = time.monotonic()
        waiting = [pool.submit(ask, cluster.url, "native") for _ in range(6)]
        assert {caption(each.result())[1] for each in waiting} == {24}
        assert SILENCE_S - 2 < time.monotonic() - began < SILENCE_S + 8
        until(lambda: all(cluster.engines(frontend) == 1 for frontend in cluster.frontends()), 5)
        began = time.monotonic()
        caption(ask(cluster.url, "compatible"))
        assert time.monotonic() - began < 5
        assert cluster.ready()


def test_a_killed_frontend_is_replaced_and_the_other_answers(cluster: RunningCluster) -> None:
    """HAProxy uses the other frontend at once, also for requests that the lost one had not begun to answer."""
    short = data_url(wav(0.2))  # the proxy can send again what fits into its buffer
    victim = min(cluster.pids(FRONTEND))
    os.kill(victim, signal.SIGKILL)
    for _ in range(5):
        caption(ask(cluster.url, "native", audio=short))
    cluster.wait(lambda: len(cluster.pids(FRONTEND)) == 2)


def test_each_request_is_one_line_of_the_log(cluster: RunningCluster) -> None:
    """A request behind Ray is logged as one line of JSON, with the id that the client got."""
    request_id = ask(cluster.url, "native").headers["x-request-id"]

    def lines() -> list[str]:
        return [line for line in (cluster.directory / "log").read_text().splitlines() if request_id in line]

    until(lines, 10)
    (line,) = lines()
    record = json.loads(line[line.index("{") :])
    assert (record["outcome"], record["output_tokens"]) == ("finished", 24)


def test_without_an_engine_it_is_not_ready(cluster: RunningCluster) -> None:
    """Captions and readiness are 503 in both dialects while no engine runs, until replacements have started."""
    for victim in cluster.pids(ENGINE):
        os.kill(victim, signal.SIGKILL)
    until(lambda: not cluster.ready(), 10)
    for dialect in ("native", "compatible"):
        answer = ask(cluster.url, dialect)
        if answer.status_code == 200:  # on a fast machine the next engine is ready already
            continue
        assert answer.status_code == 503
        assert code(answer)
        assert "unavailable" in answer.text
    cluster.wait(cluster.ready)
