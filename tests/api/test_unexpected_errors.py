"""Unexpected exceptions are answered like any other error: in the dialect, with the request's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.api.app import create_app
from serving.api.error_handlers import UnexpectedErrorMiddleware
from serving.config import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.applications import Starlette
    from starlette.types import Message, Receive, Scope, Send


@pytest.fixture
def app(tmp_path: Path) -> Starlette:
    """The application, not started: its endpoints answer all the same."""
    app = create_app(Settings(engine="fake", auth=False, data_dir=tmp_path, uploads_dir=tmp_path))
    app.state.components.keys.waiting_for = None  # as after a start with a database
    return app


def fail(*_: object, **__: object) -> Any:
    """Raise an exception outside the error tree."""
    raise ZeroDivisionError("inside")


async def ask(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    """Make one request; an exception that leaves the application fails the test."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/models"])
async def test_an_error_is_rendered_in_the_dialect(app: Starlette, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """An endpoint that raises answers 500 in its dialect, with an id, a log line, and no internals."""
    monkeypatch.setattr("serving.api.dialects.openai.models_page", fail)
    monkeypatch.setattr("serving.api.dialects.dashscope.models_page", fail)
    answer = await ask(app, "GET", path, content=b"a body that nobody wants")
    body = answer.json()
    assert answer.status_code == 500
    assert (body["error"]["code"] if path.startswith("/v1") else body["code"]) in {"internal_error", "InternalError"}
    assert len(answer.headers["x-request-id"]) == 36
    assert "inside" not in answer.text


async def test_an_error_of_an_upload_is_rendered_in_xml(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that raises answers as the object store does."""
    monkeypatch.setattr("serving.api.routes.receive_upload", fail)
    answer = await ask(app, "POST", "/oss-upload", content=b"x")
    assert answer.status_code == 500
    assert "<Code>InternalError</Code>" in answer.text
    assert len(answer.headers["x-request-id"]) == 36


async def test_a_boundary_may_be_too_long(app: Starlette) -> None:
    """A form whose boundary no parser accepts is the client's error."""
    headers = {"content-type": f"multipart/form-data; boundary={'a' * 300}"}
    answer = await ask(app, "POST", "/oss-upload", content=b"x", headers=headers)
    assert answer.status_code == 400
    assert "<Code>InvalidArgument</Code>" in answer.text


async def test_a_started_response_is_not_followed_by_another(app: Starlette) -> None:
    """An exception after the response has started is passed to the server, which closes the connection."""
    sent: list[Message] = []

    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        fail()

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(ZeroDivisionError):
        await UnexpectedErrorMiddleware(breaks, app.state.components)({"type": "http"}, fail, send)
    assert [message["type"] for message in sent] == ["http.response.start"]
