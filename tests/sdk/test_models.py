"""Other requests of clients: model lists, the check of a key, and a public key for encryption, which does not exist."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.sdk.clients import CLIENTS, NATIVE, Client
from tests.sdk.drivers.calls import MODEL
from tests.sdk.environments import bare_variables, python_environment
from tests.support.service import RunningService
from tests.support.wire import data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sdk.tap import Tap

LISTING = [client for client in CLIENTS if client.protocol != "openai"]
every_listing_client = pytest.mark.parametrize("client", LISTING, ids=lambda client: client.name)


@pytest.fixture(scope="module")
def named() -> Iterator[RunningService]:
    """The service with one key, and a second name for the model."""
    with RunningService(
        "--engine=fake", "--audio-workers=1", "--api-keys=sk-right-key", "--model-aliases=omni-alias"
    ) as service:
        yield service


@every_listing_client
def test_list(client: Client, tap: Tap, named: RunningService) -> None:
    """Every served name is listed."""
    outcome = tap.perform(client, named, action="models", api_key="sk-right-key")
    assert outcome.models == [MODEL, "omni-alias"], outcome.message


@every_listing_client
def test_one(client: Client, tap: Tap, named: RunningService) -> None:
    """One model is shown, another is not found."""
    shown = tap.perform(client, named, action="model", model="omni-alias", api_key="sk-right-key")
    assert shown.models == ["omni-alias"], shown.message
    missing = tap.perform(client, named, action="model", model="none", api_key="sk-right-key")
    assert missing.models == []
    assert missing.error == (None if client.is_1x else "NotFoundError"), missing.message
    if client.is_1x:  # 1.24.10 requests by path, and receives the native 400; 2.0.2 filters the list, and raises 404
        assert missing.status == {"dashscope-1.24.10": 400, "dashscope-2.0.2": 404}[client.environment]


@every_listing_client
def test_wrong_key(client: Client, tap: Tap, named: RunningService) -> None:
    """The list requires a key."""
    outcome = tap.perform(client, named, action="models", api_key="sk-wrong")
    assert (outcome.status, outcome.models) == (401, [])


@pytest.mark.parametrize(("key", "verdict"), [("sk-right-key", "Authenticated"), ("sk-wrong-key", "Invalid API key")])
def test_whoami(key: str, verdict: str, tap: Tap, named: RunningService, tmp_path: Path) -> None:
    """`dashscope auth whoami` distinguishes a good key from a bad one."""
    origin = tap.relay(named).origin
    variables = bare_variables(tmp_path) | {"DASHSCOPE_API_KEY": key, "DASHSCOPE_HTTP_BASE_URL": f"{origin}/api/v1"}
    command = [str(python_environment("dashscope-2.0.2") / "bin" / "dashscope"), "auth", "whoami"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert verdict in done.stdout + done.stderr
    assert done.returncode == (0 if key == "sk-right-key" else 2)
    assert [exchange.target for exchange in tap.exchanges()] == ["/api/v1/models?page_no=1&page_size=1"]


@pytest.mark.parametrize("client", [client for client in CLIENTS if client.is_1x], ids=lambda client: client.name)
def test_encryption(client: Client, tap: Tap, fake_service: RunningService) -> None:
    """A client that wants to encrypt receives no public key, and is served in plain text."""
    assert client.dialect == NATIVE
    outcome = tap.perform(client, fake_service, audio=data_url(wav(1)), parameters={"enable_encryption": True})
    assert outcome.finish_reason == "stop", outcome.message
    keys, caption = tap.exchanges()
    assert (keys.method, keys.target, keys.status) == ("GET", "/api/v1/public-keys/latest", 404)
    assert caption.status == 200
