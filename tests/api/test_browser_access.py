"""Web pages: CORS by setting; and no captions for pages of other sites where nobody has to have a key.

The headers are those that Chrome, Firefox and Safari send with the requests of a page.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import Settings
from tests.support.served import served
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav

pytestmark = pytest.mark.usefixtures("in_process")

CLIP = data_url(wav(1))
PATH = "/v1/audio/transcriptions"
EVIL = "https://evil.example"
CHROME_FORM = {
    "origin": EVIL,
    "sec-fetch-site": "cross-site",
    "sec-fetch-mode": "navigate",
    "sec-fetch-dest": "document",
}
CHROME_FETCH = {"origin": EVIL, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "empty"}
SAFARI_15 = {"origin": EVIL}
FIREFOX_FRAME = {"origin": "null", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
REFERRER_LESS = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
REBOUND = {"origin": "http://rebound.example:8000", "host": "rebound.example:8000", "sec-fetch-site": "same-origin"}
FORM_TYPES = ("text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "TEXT/PLAIN", "")

OWN_PAGE = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
DEVELOPMENT_PAGE = {"origin": "http://localhost:5173", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}
V6_PAGE = {"origin": "http://[::1]:8000"}
EXTENSION = {"origin": "chrome-extension://abcdefghijklmnop", "sec-fetch-site": "none"}
DESKTOP_APPLICATION = {"origin": "null"}


@pytest.mark.parametrize(
    "headers",
    [CHROME_FORM, CHROME_FETCH, SAFARI_15, FIREFOX_FRAME, REFERRER_LESS, REBOUND],
    ids=["form", "fetch", "no Sec-Fetch", "sandboxed frame", "no Origin", "DNS rebinding"],
)
async def test_pages_of_other_sites_get_no_captions(headers: dict[str, str]) -> None:
    """A request that a page can send without permission is 403 in the path's dialect, whatever it holds."""
    async with served() as client:
        for content_type in FORM_TYPES:
            sent = headers | {"content-type": content_type}
            compatible = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=sent)
            assert (compatible.status_code, compatible.json()["error"]["code"]) == (403, "access_denied")
            assert "the setting cors_origins" in compatible.json()["error"]["message"]
            assert len(compatible.headers["x-request-id"]) == 36
            native = await client.post(NATIVE, json=native_body(CLIP), headers=sent)
            assert (native.status_code, native.json()["code"]) == (403, "AccessDenied")
        form = await client.post(PATH, files={"file": wav(1)}, headers=headers)
        assert form.status_code == 403
        upload = await client.post("/oss-upload", files={"file": wav(1)}, headers=headers)
        assert upload.status_code == 403


@pytest.mark.parametrize("headers", [CHROME_FETCH, SAFARI_15, REBOUND])
async def test_pages_by_json_get_none_either(headers: dict[str, str]) -> None:
    """JSON from a page needs a preflight, which fails; a page after DNS rebinding needs none, and is refused, too."""
    async with served() as client:
        answer = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=headers)
        assert answer.status_code == 403
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        asked = await client.options(COMPATIBLE, headers=headers | preflight)
        assert asked.status_code == 405
        assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    "headers",
    [{}, OWN_PAGE, DEVELOPMENT_PAGE, V6_PAGE, EXTENSION, DESKTOP_APPLICATION, {"sec-fetch-site": "none"}],
    ids=["a program", "own page", "development server", "IPv6", "extension", "desktop application", "address bar"],
)
async def test_others_are_served(headers: dict[str, str]) -> None:
    """Programs, pages of this machine, extensions and applications get captions as before."""
    async with served() as client:
        answer = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=headers)
        assert answer.status_code == 200, answer.text
        assert "access-control-allow-origin" not in answer.headers


async def test_a_program_may_use_any_content_type() -> None:
    """Without a browser's headers the content type does not matter, as PROTOCOL 2.6 says."""
    async with served() as client:
        for content_type in FORM_TYPES:
            answer = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers={"content-type": content_type})
            assert answer.status_code == 200


async def test_with_keys_the_origin_does_not_matter() -> None:
    """A page without a key is refused as any caller; one with a key is served."""
    async with served(auth=True, api_keys="sk-one-of-the-settings") as client:
        assert (await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=CHROME_FETCH)).status_code == 401
        headers = CHROME_FETCH | {"authorization": "Bearer sk-one-of-the-settings"}
        assert (await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=headers)).status_code == 200


@pytest.mark.parametrize("auth", [True, False])
async def test_cors(*, auth: bool) -> None:
    """A page of an allowed origin passes the preflight and reads answers, errors, and the headers of limits."""
    settings: dict[str, Any] = {"auth": auth, "api_keys": "sk-one-of-the-settings"}
    page = {"origin": "https://app.example.com", "sec-fetch-site": "cross-site"}
    key = {"authorization": "Bearer sk-one-of-the-settings"}
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
        "access-control-request-private-network": "true",
    }
    async with served(**settings, cors_origins=("https://app.example.com",)) as client:
        preflight = await client.options(COMPATIBLE, headers=page | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example.com"
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        assert preflight.headers["access-control-allow-private-network"] == "true"
        answer = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=page | key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
        assert {"x-request-id", "retry-after"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        refused = await client.post(COMPATIBLE, content=b"", headers=page | key)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, "https://app.example.com")
        other = await client.options(COMPATIBLE, headers={"origin": EVIL} | asked)
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        read = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers={"origin": EVIL} | key)
        assert (read.status_code, "access-control-allow-origin" in read.headers) == (200 if auth else 403, False)


async def test_every_origin_can_be_allowed() -> None:
    """`*` allows all pages, also without keys."""
    async with served(cors_origins="*") as client:
        answer = await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=CHROME_FETCH)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


async def test_the_services_public_origin_is_its_own() -> None:
    """A page that is served under `public_url` is no other site."""
    async with served(public_url="https://captions.example.com") as client:
        headers = {"origin": "https://captions.example.com", "sec-fetch-site": "same-origin"}
        assert (await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=headers)).status_code == 200
        headers = {"origin": "http://captions.example.com"}
        assert (await client.post(COMPATIBLE, json=compatible_body(CLIP), headers=headers)).status_code == 403


@pytest.mark.parametrize(
    "origin",
    [
        "app.example.com",
        "https://App.example.com",
        "https://app.example.com/",
        "https://a.example/b",
        "null",
        "https://",
    ],
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    """A setting that no browser's origin would equal is refused at the start."""
    with pytest.raises(ValidationError, match="is not an origin such as"):
        Settings(cors_origins=origin)
