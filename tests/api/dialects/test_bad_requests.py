"""Every bad request is refused by the codec with its status, code and message, in the dialect's shape."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.config import Settings
from serving.errors import ClientError
from tests.api.dialects.bad_requests import DASHSCOPE, OPENAI, Case

if TYPE_CHECKING:
    from serving.api.dialects.base import Codec, HttpError

SETTINGS = Settings()
REQUEST_ID = "d532f72c-e75b-4ffb-a1ef-d2465e758958"


def refused(codec: Codec, case: Case) -> HttpError:
    """Return the codec's error for a bad request."""
    with pytest.raises(ClientError) as raised:
        codec.decode_request(case.body, case.headers, REQUEST_ID)
    return codec.error(raised.value, REQUEST_ID)


def checked(answer: HttpError, case: Case) -> dict[str, Any]:
    """Return the error's body, after checks that hold in both dialects."""
    assert answer.status == case.status
    assert answer.content_type == "application/json"
    assert answer.headers["x-request-id"] == REQUEST_ID
    assert len(answer.body) < 1024, "what the client sent is not sent back whole"
    body: dict[str, Any] = json.loads(answer.body)
    return body


@pytest.mark.parametrize("case", [case for case in DASHSCOPE if not case.beyond_codec], ids=lambda case: case.name)
def test_native_is_refused(case: Case) -> None:
    """A bad native request gets its native error."""
    body = checked(refused(DashScopeCodec(SETTINGS), case), case)
    assert body.keys() == {"code", "message", "request_id"}
    assert body["code"] == case.code
    assert case.message in body["message"]
    assert body["request_id"] == REQUEST_ID


@pytest.mark.parametrize("case", [case for case in OPENAI if not case.beyond_codec], ids=lambda case: case.name)
def test_compatible_is_refused(case: Case) -> None:
    """A bad compatible request gets its compatible error."""
    body = checked(refused(OpenAICodec(SETTINGS), case), case)
    assert body.keys() == {"error", "request_id"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"]) == ("invalid_request_error", case.code)
    assert case.message in body["error"]["message"]


@pytest.mark.parametrize(("codec", "cases"), [(DashScopeCodec, DASHSCOPE), (OpenAICodec, OPENAI)])
def test_the_list_is_large_and_consistent(codec: type[DashScopeCodec | OpenAICodec], cases: tuple[Case, ...]) -> None:
    """The list has at least 150 distinct cases, and the codec accepts those that are beyond it."""
    assert len({case.name for case in cases}) == len(cases) >= 150
    assert len({(case.body, *case.headers.items()) for case in cases}) == len(cases)
    for case in cases:
        if case.beyond_codec:
            codec(SETTINGS).decode_request(case.body, case.headers, REQUEST_ID)


@pytest.mark.parametrize("codec", [DashScopeCodec, OpenAICodec])
def test_no_bad_request_stalls_the_event_loop(codec: type[DashScopeCodec | OpenAICodec]) -> None:
    """The worst bad request costs a few milliseconds, not the time to build the objects that it describes."""
    cases = DASHSCOPE if codec is DashScopeCodec else OPENAI
    worst = 0.0
    for case in (case for case in cases if not case.beyond_codec):
        took = []
        for _ in range(3):  # the least: a collection of garbage, or a first import, is not the request's cost
            began = time.thread_time()
            refused(codec(SETTINGS), case)
            took.append(time.thread_time() - began)
        worst = max(worst, min(took))
    assert worst < 0.25
