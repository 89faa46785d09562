"""Two services that share nothing but a bucket: uploads of one are captioned by the other; faults are clear errors."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.storage.s3 import KEY_ID, SECRET, FaultProxy, S3Server
from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    MODEL,
    NATIVE,
    ask_compatible,
    ask_native,
    compatible_body,
    native_body,
    upload,
    upload_fields,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

RESOLVE = {"X-DashScope-OssResourceResolve": "enable"}
MESSAGE = "The storage of uploaded files is unavailable, please try again later."


@pytest.fixture(scope="module")
def between(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy between the services and the S3 server."""
    with FaultProxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def frontends(s3_server: S3Server, between: FaultProxy) -> Iterator[tuple[RunningService, RunningService]]:
    """Two services, each with separate directories."""
    flags = (
        "--engine=fake",
        "--audio-workers=1",
        "--upload-secret=the-same-for-both",
        f"--object-store-url=s3://{s3_server.bucket()}/some/prefix",
        f"--object-store-endpoint={between.url}",
        f"--object-store-access-key-id={KEY_ID}",
        f"--object-store-secret-key={SECRET}",
        "--object-store-timeout-s=3",
    )
    with RunningService(*flags) as one, RunningService(*flags) as two:
        yield one, two


@pytest.fixture(autouse=True)
def without_faults(between: FaultProxy) -> Iterator[None]:
    """After each test the proxy makes no fault."""
    yield
    between.fault = lambda _: False


def files(service: RunningService) -> list[str]:
    """Return the names of files on the service's own disk for uploads."""
    return [path.name for path in service.uploads.rglob("*") if path.is_file()]


def test_an_upload_at_one_frontend_is_captioned_by_the_other(frontends: tuple[RunningService, RunningService]) -> None:
    """In both dialects; no file stays on either disk, and the first frontend's disk may be lost."""
    one, two = frontends
    address = upload(one.url, wav(2), name="t ö+n%e.wav")
    assert (files(one), files(two)) == ([], [])
    kept = next(one.uploads.iterdir())
    shutil.rmtree(kept)
    native = ask_native(two.url, address, headers=RESOLVE)
    assert native.text == ask_compatible(two.url, address, headers=RESOLVE).text
    assert native.usage["input_tokens_details"]["audio_tokens"] == 25
    assert (files(one), files(two)) == ([], [])
    assert one.metric("captioner_uploads_bytes") == len(wav(2))
    assert two.metric("captioner_stage_seconds_count", stage="fetch") >= 2
    kept.mkdir(mode=0o700)
    assert ask_native(one.url, upload(one.url, wav(1)), headers=RESOLVE).text


def test_a_fault_of_the_bucket_is_503_in_each_dialect(
    frontends: tuple[RunningService, RunningService], between: FaultProxy
) -> None:
    """Uploads and captions of uploads get 503 with Retry-After, other captions are made, and nothing is counted."""
    one, two = frontends
    address = upload(one.url, wav(1))
    before = one.metric("captioner_uploads_bytes")
    policy = httpx.get(f"{one.url}/api/v1/uploads", params={"action": "getPolicy", "model": MODEL}).json()["data"]
    form: dict[str, Any] = {
        "data": upload_fields(policy, f"{policy['upload_dir']}/clip.wav"),
        "files": {"file": ("clip.wav", wav(1))},
    }
    between.fault = lambda handler: handler.refuse(503, "SlowDown")
    refused = httpx.post(f"{one.url}/oss-upload", **form, timeout=30)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert refused.text == f"<Error><Code>ServiceUnavailable</Code><Message>{MESSAGE}</Message></Error>"
    native = httpx.post(two.url + NATIVE, json=native_body(address), headers=RESOLVE, timeout=30)
    assert (native.status_code, native.headers["retry-after"]) == (503, "10")
    assert (native.json()["code"], native.json()["message"]) == ("ServiceUnavailable", MESSAGE)
    streamed = httpx.post(two.url + NATIVE, json=native_body(address), headers=RESOLVE | {"X-DashScope-SSE": "enable"})
    assert streamed.status_code == 503
    compatible = httpx.post(two.url + COMPATIBLE, json=compatible_body(address), headers=RESOLVE, timeout=30)
    assert (compatible.status_code, compatible.headers["retry-after"]) == (503, "10")
    assert compatible.json()["error"]["message"] == MESSAGE
    assert one.metric("captioner_uploads_bytes") == before
    assert one.metric("captioner_uploads_total", code="storage_unavailable") == 1
    assert httpx.get(f"{one.url}/readyz").status_code == 200
    between.fault = lambda _: False
    assert httpx.post(f"{one.url}/oss-upload", **form, timeout=30).status_code == 200
    assert ask_native(two.url, address, headers=RESOLVE).text
    for service in frontends:
        service.settle()
        assert service.metric("captioner_requests_total", code="internal") == 0
        assert SECRET not in service.log()
        assert KEY_ID not in service.log()
