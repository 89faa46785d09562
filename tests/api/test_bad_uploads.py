"""Bad upload forms and policy requests: the object store's errors, and nothing stored."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.service import RunningService
from tests.support.wire import MODEL, ask_native, data_url, upload_fields, wav

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with default limits of uploads."""
    with RunningService("--engine=fake", "--audio-workers=1") as running:
        yield running


UPLOADS: dict[str, tuple[dict[str, str | None], int, str]] = {
    "no policy": ({"policy": None}, 403, "AccessDenied"),
    "no signature": ({"Signature": None}, 403, "AccessDenied"),
    "no key": ({"key": None}, 403, "AccessDenied"),
    "forged policy": ({"policy": base64.b64encode(b'{"expires":9e9}').decode()}, 403, "AccessDenied"),
    "policy that is no base64": ({"policy": "%%%"}, 403, "AccessDenied"),
    "forged signature": ({"Signature": "AAAA"}, 403, "AccessDenied"),
    "signature beyond ASCII": ({"Signature": "ü"}, 403, "AccessDenied"),
    "key elsewhere": ({"key": "elsewhere/clip.wav"}, 403, "AccessDenied"),
    "key above": ({"key": "{dir}/../clip.wav"}, 403, "AccessDenied"),
    "key of two segments": ({"key": "{dir}/a/b.wav"}, 403, "AccessDenied"),
    "key with a backslash": ({"key": "{dir}/a\\b.wav"}, 403, "AccessDenied"),
    "key with NUL": ({"key": "{dir}/a\x00.wav"}, 403, "AccessDenied"),
    "key without a name": ({"key": "{dir}/"}, 403, "AccessDenied"),
    "key of dots": ({"key": "{dir}/.."}, 403, "AccessDenied"),
    "endless key": ({"key": "{dir}/" + "a" * 2000}, 403, "AccessDenied"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_bad_upload_fields(service: RunningService, name: str) -> None:
    """A form that the policy does not cover is refused in the object store's XML."""
    changes, status, code = UPLOADS[name]
    fields = _policy_fields(service)
    for field, value in changes.items():
        if value is None:
            del fields[field]
        else:
            fields[field] = value.replace("{dir}", fields["key"].rpartition("/")[0])
    _assert_xml(_post_form(service, fields, wav(1)), status, code)


def test_bad_upload_bodies(service: RunningService) -> None:
    """A body that is no form, has no file, is cut off or is too large is refused in XML, and nothing is stored."""
    url = f"{service.url}/oss-upload"
    _assert_xml(httpx.post(url), 400, "InvalidArgument")
    _assert_xml(httpx.post(url, json={"file": "x"}), 400, "InvalidArgument")
    _assert_xml(httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}), 400, "InvalidArgument")
    form = {"content-type": "multipart/form-data; boundary=x"}
    _assert_xml(httpx.post(url, content=b"no boundary here", headers=form), 400, "InvalidArgument")
    _assert_xml(httpx.post(url, content=b"--x\r\ncontent-disp", headers=form), 400, "InvalidArgument")
    fields = _policy_fields(service)
    _assert_xml(httpx.post(url, data=fields, files={"other": b"x"}), 400, "InvalidArgument")
    _assert_xml(_post_form(service, fields | {"x": "y" * 100_000}, wav(1)), 400, "InvalidArgument")
    _assert_xml(_post_form(service, fields, bytes(10 * 2**20)), 400, "EntityTooLarge")
    stored = [path for path in service.uploads.rglob("*") if path.is_file() and path.stat().st_size >= 10 * 2**20]
    assert stored == []
    assert _post_form(service, fields, wav(1)).status_code == 200
    _assert_xml(_post_form(service, fields, wav(2)), 409, "FileAlreadyExists")


def test_upload_bodies_are_bounded(service: RunningService) -> None:
    """An endless number of empty parts is refused, and so is an endless body after the end of its form."""
    url, form = f"{service.url}/oss-upload", {"content-type": "multipart/form-data; boundary=x"}
    empty = b"".join(b"--x\r\ncontent-disposition: form-data; name=%d\r\n\r\n\r\n" % number for number in range(100))
    many = httpx.post(url, content=empty + b"--x--\r\n", headers=form, timeout=30)
    _assert_xml(many, 400, "InvalidArgument")
    assert "too many parts" in many.text
    endless = httpx.post(url, content=b"--x--\r\n" + b" " * (11 * 2**20), headers=form, timeout=30)
    _assert_xml(endless, 400, "EntityTooLarge")


def _policy_fields(service: RunningService) -> dict[str, str]:
    query = {"action": "getPolicy", "model": MODEL}
    policy = httpx.get(f"{service.url}/api/v1/uploads", params=query).json()["data"]
    return upload_fields(policy, f"{policy['upload_dir']}/clip.wav")


def _post_form(service: RunningService, fields: dict[str, str], data: bytes) -> httpx.Response:
    return httpx.post(f"{service.url}/oss-upload", data=fields, files={"file": ("clip.wav", data)}, timeout=30)


def _assert_xml(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/xml"
    assert response.headers["x-request-id"]
    assert f"<Code>{code}</Code>" in response.text


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({}, "InvalidParameter"),
        ({"action": "getPolicy"}, "InvalidParameter"),
        ({"action": "drop", "model": MODEL}, "InvalidParameter"),
        ({"action": "getPolicy", "model": "gpt"}, "InvalidParameter"),
        ({"action": "getPolicy", "model": ""}, "InvalidParameter"),
    ],
)
def test_bad_policy_requests(service: RunningService, query: dict[str, str], code: str) -> None:
    """A policy is issued only for a served model."""
    response = httpx.get(f"{service.url}/api/v1/uploads", params=query)
    assert (response.status_code, response.json()["code"]) == (400, code)


def test_the_service_still_answers(service: RunningService) -> None:
    """At the end the service answers, holds nothing, and has logged no error."""
    service.settle()
    assert ask_native(service.url, data_url(wav(1))).text
    for outcome in ("failed", "failed_midstream"):
        assert service.metric("captioner_requests_total", outcome=outcome) == 0
    lines = [json.loads(line) for line in service.log().splitlines()]
    assert [line for line in lines if line["level"] == "error"] == []
