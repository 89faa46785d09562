"""Failures reach each client as the exception that its users catch: class, status, code and message of PROTOCOL 9."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from serving.engine.base import ignore_start
from serving.engine.fake import FakeEngine, Faults
from serving.errors import Overloaded
from serving.types import NO_TENANT
from tests.sdk.clients import CLIENTS, NATIVE, Client, every_client, every_way
from tests.sdk.served_here import ServedHere
from tests.support.service import RunningService
from tests.support.wire import ask_native, data_url, wav

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from serving.engine.base import EngineDelta
    from serving.types import Features, Sampling, SchedulingClass
    from tests.sdk.drivers.calls import Outcome
    from tests.sdk.tap import Tap

CLIP = data_url(wav(1))

OPENAI_CLASS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "InternalServerError",
}
CLIENT_CLASS_OF_CODE = {"Arrearage": "PermissionDeniedError"}
"""Codes that `dashscope.Client` maps before it looks at the status."""
CLIENT_CLASS = OPENAI_CLASS | {413: "RequestTooLargeError", 503: "ServiceUnavailableError"}


@dataclass(frozen=True)
class Failure:
    """Status, code and message in each dialect."""

    native: tuple[int, str, str]
    compatible: tuple[int, str, str]


def invalid(message: str) -> Failure:
    """Return the failure of an invalid request."""
    return Failure((400, "InvalidParameter", message), (400, "invalid_parameter_error", message))


LATE, LOADING = "Request timed out, please try again later.", "Model is unavailable, please try again later."
NO_SERVER = "Failed to download multimodal content."
NO_MODEL = "The model `qwen-omni-none` does not exist or you do not have access to it."

FAILURES: dict[str, tuple[dict[str, Any], Failure]] = {
    "wrong key": (
        {"api_key": "sk-wrong"},
        Failure(
            (401, "InvalidApiKey", "Invalid API-key provided."),
            (401, "invalid_api_key", "Incorrect API key provided."),
        ),
    ),
    "no URL": (
        {"audio": "ftp://host/clip.wav"},
        invalid("The provided URL does not appear to be valid. Ensure it is correctly formatted."),
    ),
    "not audio": (
        {"audio": data_url(b"just some text")},
        invalid("The audio format is illegal and cannot be opened"),
    ),
    "no such file": (
        {"audio": "{service}/clip.wav"},
        invalid("Failed to download multimodal content."),
    ),
    "no server": (
        {"audio": "http://127.0.0.1:9/clip.wav"},
        Failure((503, "ServiceUnavailable", NO_SERVER), (503, "service_unavailable", NO_SERVER)),
    ),
    "no such model": (
        {"model": "qwen-omni-none"},
        Failure((400, "InvalidParameter", "Model not exist."), (404, "model_not_found", NO_MODEL)),
    ),
    "no such path": (
        {"action": "nowhere"},
        Failure((404, "NotFound", "Not found!"), (404, "not_found", "Not found!")),
    ),
}


def assert_failed(outcome: Outcome, client: Client, failure: Failure) -> None:
    """Assert that the client reports this failure, in its own way."""
    status, code, message = failure.native if client.dialect == NATIVE else failure.compatible
    error = None if client.is_1x else OPENAI_CLASS.get(status)
    if client.driver == "dashscope_client":
        error = CLIENT_CLASS_OF_CODE.get(code, CLIENT_CLASS[status])
    assert (outcome.error, outcome.status, outcome.code) == (error, status, code), outcome.message
    assert message in (outcome.message or "")
    assert len(outcome.request_id or "") == 36
    assert outcome.pieces == []


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningService]:
    """The service with one key."""
    flags = ("--api-keys=sk-right", "--fetch-allow=127.0.0.0/8")
    with RunningService("--engine=fake", "--audio-workers=1", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def late() -> Iterator[RunningService]:
    """The service with an engine that generates nothing before the deadline."""
    flags = ("--fake-ttft-s=60", "--response-timeout-s=0.3", "--stream-timeout-s=0.3")
    with RunningService("--engine=fake", "--audio-workers=1", *flags) as service:
        yield service


@every_client
@every_way
@pytest.mark.parametrize("name", FAILURES)
def test_before_the_answer(client: Client, stream: str, name: str, tap: Tap, strict: RunningService) -> None:
    """A failure before the first byte has its status."""
    special, failure = FAILURES[name]
    call = {"audio": CLIP, "api_key": "sk-right", "stream": stream} | special
    call["audio"] = call["audio"].replace("{service}", strict.url)
    assert_failed(tap.perform(client, strict, **call), client, failure)


@every_client
@every_way
def test_too_late(client: Client, stream: str, tap: Tap, late: RunningService) -> None:
    """A caption that has not started at the deadline fails, and no client retries it."""
    outcome = tap.perform(client, late, audio=CLIP, stream=stream, retries=2)
    assert_failed(outcome, client, Failure((500, "RequestTimeOut", LATE), (500, "request_timeout", LATE)))
    assert len(tap.exchanges()) == 1


@every_client
def test_body_over_the_cap(client: Client, tap: Tap, fake_service: RunningService, tmp_path: Path) -> None:
    """A request body over 16 MiB is read to its end and refused as too large."""
    (tmp_path / "big").write_bytes(bytes(13 * 2**20))
    outcome = tap.perform(client, fake_service, inline_file=str(tmp_path / "big"))
    code = "BadRequest.TooLarge" if client.dialect == NATIVE else "request_too_large"
    assert (outcome.status, outcome.code) == (413, code), outcome.message
    if client.driver == "dashscope_client":
        assert outcome.error == CLIENT_CLASS[413]


class Crowded(FakeEngine):
    """An engine that is overloaded after three tokens of each caption."""

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        said = 0
        async for delta in super().generate(request_id, features, sampling, scheduling_class, on_started):
            if said == 3:
                raise Overloaded
            said += 1
            yield delta


class Loading(FakeEngine):
    """An engine that never finishes loading."""

    async def start(self) -> None:
        """See `Engine`."""
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return settings for services in this process."""
    uploads, spool = tmp_path_factory.mktemp("uploads"), tmp_path_factory.mktemp("downloads")
    return Settings(
        engine="fake", auth=False, audio_workers=1, stream_flush_interval_s=0, uploads_dir=uploads, download_dir=spool
    )


@pytest.fixture(scope="module")
def dying(settings: Settings) -> Iterator[ServedHere]:
    """The service with an engine that fails after three tokens."""
    with ServedHere(settings, FakeEngine(settings, faults=Faults(fail_after_tokens=3))) as service:
        yield service


@pytest.fixture(scope="module")
def crowded(settings: Settings) -> Iterator[ServedHere]:
    """The service with an engine that is overloaded after three tokens."""
    with ServedHere(settings, Crowded(settings)) as service:
        yield service


@pytest.fixture(scope="module")
def loading(settings: Settings) -> Iterator[ServedHere]:
    """The service whose engine is still loading."""
    with ServedHere(settings, Loading(settings)) as service:
        yield service


@every_client
@pytest.mark.parametrize("reason", ["dying", "crowded"])
def test_inside_a_stream(client: Client, reason: str, tap: Tap, request: pytest.FixtureRequest) -> None:
    """After a failure in mid-stream the client yields the pieces received, then the error; 1.x has its status, too."""
    outcome = tap.perform(client, request.getfixturevalue(reason), audio=CLIP, stream="default")
    status, code, openai_code, message = {
        "dying": (500, "InternalError.Algo", "internal_error", "inference internal error."),
        "crowded": (503, "ModelServingError", "service_unavailable", "Too many requests."),
    }[reason]
    assert len([piece for piece in outcome.pieces if piece.text]) == 3
    assert outcome.finish_reason in {None, "null"}
    assert outcome.code == (code if client.dialect == NATIVE else openai_code)
    assert message in (outcome.message or "")
    if client.is_1x:
        assert (outcome.status, outcome.error) == (status, None)  # without the `status:` line it would be 400
    else:
        assert outcome.error == ("DashScopeError" if client.driver == "dashscope_client" else "APIError")


@every_client
@every_way
def test_while_loading(client: Client, stream: str, tap: Tap, loading: ServedHere) -> None:
    """Until the engine has loaded, calls are refused as unavailable."""
    outcome = tap.perform(client, loading, audio=CLIP, stream=stream)
    failure = Failure((503, "ModelUnavailable", LOADING), (503, "model_unavailable", LOADING))
    assert_failed(outcome, client, failure)


RETRYING = [client for client in CLIENTS if not client.is_1x and client.protocol != "openai"]
RETRYING = list({(client.environment, client.driver): client for client in RETRYING}.values())


def test_retries_after_overload(tap: Tap) -> None:
    """After a refusal as overload, each client that retries waits for `retry-after`, and is served."""
    flags = ("--engine=fake", "--audio-workers=1", "--fake-tpot-s=0.15", f"--max-concurrent-requests={len(RETRYING)}")
    with RunningService(*flags) as service, ThreadPoolExecutor(2 * len(RETRYING)) as pool:
        for client in RETRYING:
            tap.perform(client, service, action="models")
        running = [pool.submit(ask_native, service.url, CLIP) for _ in RETRYING]
        while service.metric("captioner_engine_running") < len(RETRYING):
            time.sleep(0.02)
        waiting = [pool.submit(tap.perform, client, service, audio=CLIP, retries=2) for client in RETRYING]
        refused = tap.perform(CLIENTS[0], service, audio=CLIP)
        assert (refused.status, refused.code) == (503, "ModelServingError")
        caption = running[0].result().text
        outcomes = [call.result() for call in waiting]
        assert [(outcome.error, outcome.text) for outcome in outcomes] == [(None, caption)] * len(RETRYING)
    overloads = [exchange for exchange in tap.exchanges() if exchange.status == 503]
    assert len(overloads) == len(RETRYING) + 1
    told_s = {int(exchange.header("retry-after")) for exchange in overloads}
    assert min(outcome.elapsed_s for outcome in outcomes) > max(told_s) >= 1
