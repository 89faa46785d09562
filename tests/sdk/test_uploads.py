"""Local files that DashScope's clients upload: policy (E3), form (E4), then the call with `oss://`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.sdk.clients import CLIENTS, Client
from tests.support.service import RunningService
from tests.support.wire import ask_native, data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sdk.tap import Tap

NAMES = ["t ö+n%e.wav", "with space.wav", "a#b.wav", "what?.wav", "per%20cent%23.wav", "100%", "中文 & 'quotes'.amr"]

UPLOADERS = [client for client in CLIENTS if client.uploads]
every_uploader = pytest.mark.parametrize("client", UPLOADERS, ids=lambda client: client.name)


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningService]:
    """The service with a key."""
    with RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-one") as service:
        yield service


@every_uploader
@pytest.mark.parametrize("name", NAMES)
def test_any_name(client: Client, name: str, tap: Tap, fake_service: RunningService, tmp_path: Path) -> None:
    """A file of any name is uploaded, and this file is captioned."""
    clip = wav(1, frequency_hz=300 + 50 * NAMES.index(name))
    (tmp_path / name).write_bytes(clip)
    outcome = tap.perform(client, fake_service, audio="file://" + quote(str(tmp_path / name)), stream="delta")
    assert outcome.error is None, outcome.message
    assert outcome.text == ask_native(fake_service.url, data_url(clip)).text
    policy, upload, call = tap.exchanges()
    assert policy.target.startswith("/api/v1/uploads?")
    assert upload.method == "POST"
    assert "authorization" not in upload.request_headers
    assert call.request_headers["x-dashscope-ossresourceresolve"] == "enable"


@every_uploader
def test_bare_path(client: Client, tap: Tap, fake_service: RunningService, tmp_path: Path) -> None:
    """A path without `file://` is uploaded, too, and captioned completely."""
    clip = wav(1, frequency_hz=1000)
    (tmp_path / "clip.wav").write_bytes(clip)
    outcome = tap.perform(client, fake_service, audio=str(tmp_path / "clip.wav"))
    assert outcome.text == ask_native(fake_service.url, data_url(clip)).text, outcome.message


@every_uploader
def test_upload_is_bound_to_its_owner(
    client: Client, tap: Tap, fake_service: RunningService, guarded: RunningService, tmp_path: Path
) -> None:
    """A caller's upload is not found for another caller; with a wrong key nothing is uploaded."""
    (tmp_path / "clip.wav").write_bytes(wav(1))
    path = str(tmp_path / "clip.wav")
    assert tap.perform(client, fake_service, audio=path, api_key="sk-one").text
    reference = _uploaded_reference(tap.relay(fake_service).sent())
    again = tap.perform(client, fake_service, audio=reference, api_key="sk-one")
    assert again.text, again.message
    stolen = tap.perform(client, fake_service, audio=reference, api_key="sk-two")
    assert (stolen.status, stolen.text) == (400, "")
    assert "Failed to find the requested media resource" in (stolen.message or "")
    refused = tap.perform(client, guarded, audio=path, api_key="sk-wrong")
    assert refused.error is not None
    assert "InvalidApiKey" in f"{refused.code} {refused.message}"


@every_uploader
def test_file_over_the_limit(client: Client, tap: Tap, fake_service: RunningService, tmp_path: Path) -> None:
    """A file of 10 MiB is refused in the words of the object store, and no part of it is kept."""
    (tmp_path / "big.wav").write_bytes(wav(1) + bytes(10 * 2**20))
    before = set(fake_service.uploads.rglob("*"))
    outcome = tap.perform(client, fake_service, audio=f"file://{tmp_path}/big.wav")
    assert outcome.error is not None
    assert "EntityTooLarge" in (outcome.message or "")
    assert [path for path in set(fake_service.uploads.rglob("*")) - before if path.is_file()] == []


@pytest.mark.parametrize("client", [client for client in CLIENTS if not client.uploads], ids=lambda client: client.name)
def test_other_clients_send_the_path_as_it_is(
    client: Client, tap: Tap, fake_service: RunningService, tmp_path: Path
) -> None:
    """A client that does not upload gets a 400 for a local path: the service never opens one."""
    (tmp_path / "clip.wav").write_bytes(wav(1))
    outcome = tap.perform(client, fake_service, audio=f"file://{tmp_path}/clip.wav")
    assert (outcome.status, outcome.code, outcome.error) == (400, "invalid_parameter_error", "BadRequestError")


def _uploaded_reference(sent: bytes) -> str:
    """Return the `oss://` reference in the last request."""
    _, scheme, rest = sent.rpartition(b"oss://")
    return (scheme + rest.partition(b'"')[0]).decode()
