"""The files of the page: how they are served, and that their texts and links belong together."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.api import page_endpoint
from serving.api.admin import create_admin_app
from serving.api.app import create_app
from serving.config import Settings
from serving.tenancy.database import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAGE, ADMIN_PAGE = files("serving.api") / "page", files("serving.api") / "admin_page"
NAMES = sorted(entry.name for entry in PAGE.iterdir() if not entry.name.startswith("__") and entry.name != "README.md")


@asynccontextmanager
async def client(directory: Path, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of the application, which has not started: the page needs neither engine nor database."""
    given = {"engine": "fake", "data_dir": directory, "uploads_dir": directory / "uploads", **changes}
    app = create_app(Settings(**given))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as found:
        yield found


async def test_every_file_is_served_under_the_policy(tmp_path: Path) -> None:
    """Each file has its type, the strict policy and a tag; nothing inline, no other host, no frame."""
    async with client(tmp_path) as page:
        answers = [await page.get("/"), *[await page.get(f"/page/{name}") for name in NAMES]]
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].headers["content-type"] == "text/html; charset=utf-8"
    types = {
        name.rpartition(".")[2]: answer.headers["content-type"] for name, answer in zip(NAMES, answers[1:], strict=True)
    }
    assert types == {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
    for answer in answers:
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"


async def test_a_known_file_is_not_sent_again(tmp_path: Path) -> None:
    """The tag of a file is answered 304 without a body, a proxy's weak form of it, too; another tag is not."""
    async with client(tmp_path) as page:
        tag = (await page.get("/page/app.js")).headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = await page.get("/page/app.js", headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
            assert "content-security-policy" in again.headers
        assert (await page.get("/page/app.js", headers={"if-none-match": '"other"'})).status_code == 200
        head = await page.head("/")
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/README.md", "/page/../routes.py", "/page/%2e%2e%2froutes.py", "/page"]
)
async def test_nothing_else_is_served(tmp_path: Path, path: str) -> None:
    """No name outside of the directory is found."""
    async with client(tmp_path) as page:
        assert (await page.get(path)).status_code == 404


async def test_the_administrators_page_needs_no_token_and_its_api_does(tmp_path: Path) -> None:
    """Its files are answered under the same policy, all else on that port is 401; switched off, all of it is."""
    database = connect(f"sqlite:///{tmp_path / 'captioner.db'}")
    names = ["admin.js", "admin.css", "admin_api.js", "confirm.js", "usage.js", "texts.en.js", "texts.zh.js", "dom.js"]
    paths = ["/", *[f"/page/{name}" for name in names]]
    for shown in (True, False):
        settings = Settings(data_dir=tmp_path, admin_token="a-token-of-16-or-more", page=shown)  # noqa: S106
        transport = httpx.ASGITransport(create_admin_app(settings, database))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as page:
            answers = [await page.get(path) for path in paths]
            assert {answer.status_code for answer in answers} == {200 if shown else 401}
            if shown:
                assert "captioner administration" in answers[0].text
                assert all("frame-ancestors 'none'" in answer.headers["content-security-policy"] for answer in answers)
                assert "suspendTitle" in answers[6].text
            for path in ("/v1/tenants", "/page/app.js", "/page/", "/none"):
                assert (await page.get(path)).status_code == 401
    database.dispose()


async def test_the_page_is_switched_off(tmp_path: Path) -> None:
    """Without the page its paths are unknown, as they were before it."""
    async with client(tmp_path, page=False) as page:
        for path in ("/", "/page/app.js"):
            answer = await page.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "NotFound")


def _names(directory: Any) -> set[str]:
    return {entry.name for entry in directory.iterdir() if entry.name != "README.md"}


@pytest.mark.parametrize("directory", [PAGE, ADMIN_PAGE], ids=["page", "admin_page"])
def test_links_are_relative_and_exist(directory: Any) -> None:
    """The pages work behind any path prefix: they link and import their files by relative names only."""
    known = _names(directory) | (set() if directory is PAGE else set(page_endpoint._SHARED))
    html = (directory / "index.html").read_text()
    assert {name.removeprefix("page/") for name in re.findall(r'(?:href|src)="([^"#]+)"', html)} <= known
    assert not re.search(r"<style|<script>| style=| on[a-z]+=", html)
    for name in _names(directory):
        text = (directory / name).read_text()
        if name.endswith(".js"):
            assert set(re.findall(r'from "\./([^"]+)"', text)) <= known
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert "innerHTML" not in text
        assert len(text.splitlines()) < 400


@pytest.mark.parametrize(("directory", "least"), [(PAGE, 80), (ADMIN_PAGE, 60)], ids=["page", "admin_page"])
def test_both_languages_have_every_text(directory: Any, least: int) -> None:
    """English and Chinese have the same keys and placeholders, and every key that a page names is among them."""
    texts = {
        language: dict(
            re.findall(r'^  "?([\w.]+)"?: "(.*)",$', (directory / f"texts.{language}.js").read_text(), re.MULTILINE)
        )
        for language in ("en", "zh")
    }
    assert len(texts["en"]) > least
    assert texts["en"].keys() == texts["zh"].keys()
    for key, text in texts["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", texts["zh"][key])), key
    named = set(re.findall(r'data-i18n(?:-label)?="([^"]+)"', (directory / "index.html").read_text()))
    for name in _names(directory):
        if name.endswith(".js"):
            named |= set(re.findall(r'(?<![.\w])(?:t|add)\("([^"]+)"', (directory / name).read_text()))
    assert named <= texts["en"].keys()
