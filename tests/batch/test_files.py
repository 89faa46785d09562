"""`/v1/files`: what is stored, listed, bounded, hidden from other tenants and removed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from serving.storage.files import files_directory
from serving.tenancy import schema
from tests.batch.served import Served, served
from tests.support.wire import COMPATIBLE, compatible_body, wav

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("in_process")

CONTENT = b'{"custom_id": "a"}\n'


def _stored(running: Served) -> set[str]:
    return {path.name for path in files_directory(running.components.settings).iterdir()}


async def test_a_file_is_stored_shown_read_and_deleted(tmp_path: Path) -> None:
    """Upload, retrieve, content and delete answer as OpenAI's files do, under both prefixes."""
    async with served(tmp_path) as running:
        for prefix in ("/v1", "/compatible-mode/v1"):
            created = await running.one.post(
                f"{prefix}/files", data={"purpose": "batch"}, files={"file": ("../in put.jsonl", CONTENT)}
            )
            shown = created.json()
            file_id = shown["id"]
            assert created.status_code == 200
            assert shown == {
                "id": file_id,
                "object": "file",
                "bytes": 19,
                "created_at": shown["created_at"],
                "expires_at": shown["created_at"] + 30 * 24 * 3600,
                "filename": "in put.jsonl",
                "purpose": "batch",
                "status": "processed",
                "status_details": None,
            }
            assert abs(time.time() - shown["created_at"]) < 60
            assert (await running.one.get(f"{prefix}/files/{file_id}")).json() == shown
            content = await running.one.get(f"{prefix}/files/{file_id}/content")
            assert (content.content, content.headers["content-length"]) == (CONTENT, "19")
            assert content.headers["content-type"] == "application/octet-stream"
            deleted = await running.one.delete(f"{prefix}/files/{file_id}")
            assert deleted.json() == {"id": file_id, "object": "file", "deleted": True}
            assert (await running.one.get(f"{prefix}/files/{file_id}")).status_code == 404
        assert _stored(running) == set()


async def test_fields_may_follow_the_file(tmp_path: Path) -> None:
    """A form with its purpose after its file, as the Node SDK may send it, is accepted; the row has the hash."""
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + CONTENT + b"\r\n"
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    )
    async with served(tmp_path) as running:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await running.one.post("/v1/files", content=form, headers=headers)
        assert (answer.status_code, answer.json()["filename"]) == (200, "a.jsonl")
        with running.administration.database.connect() as connection:
            assert connection.scalar(sa.select(schema.files.c.sha256)) == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("fields", "content", "status", "param"),
    [
        ({}, CONTENT, 400, "purpose"),
        ({"purpose": "fine-tune"}, CONTENT, 400, "purpose"),
        ({"purpose": "batch_output"}, CONTENT, 400, "purpose"),
        ({"purpose": "batch"}, b"", 400, "file"),
        ({"purpose": "batch"}, b"x" * 5000, 413, None),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            b"x",
            400,
            "expires_after",
        ),
        (
            {"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "7200"},
            b"x",
            400,
            "expires_after",
        ),
    ],
)
async def test_what_cannot_be_stored_is_refused(
    tmp_path: Path, fields: dict[str, str], content: bytes, status: int, param: str | None
) -> None:
    """A wrong purpose, an empty file, one over the limit and a wrong expiry are errors in OpenAI's form."""
    async with served(tmp_path, max_file_bytes=4096) as running:
        answer = await running.one.post("/v1/files", data=fields, files={"file": ("a.jsonl", content)})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
        assert _stored(running) == set()


async def test_a_list_has_pages_purposes_and_an_order(tmp_path: Path) -> None:
    """`limit`, `after`, `purpose` and `order` select files, the latest first by default."""
    async with served(tmp_path) as running:
        ids = [await running.upload(CONTENT, "user_data" if number == 1 else "batch") for number in range(4)]

        async def listed(**query: str | int) -> tuple[list[int], bool]:
            page = (await running.one.get("/v1/files", params=query)).json()
            assert (page["object"], page["first_id"]) == ("list", page["data"][0]["id"] if page["data"] else None)
            return [ids.index(each["id"]) for each in page["data"]], page["has_more"]

        everything = (await listed(order="asc"))[0]
        assert sorted(everything) == [0, 1, 2, 3]
        assert await listed() == (everything[::-1], False)
        assert await listed(order="asc", limit=2) == (everything[:2], True)
        assert await listed(order="asc", limit=2, after=ids[everything[1]]) == (everything[2:], False)
        assert await listed(limit=1, after=ids[everything[2]]) == ([everything[1]], True)
        assert await listed(purpose="user_data") == ([1], False)
        for query in ("limit=0", "limit=x", "limit=10001", "order=up"):
            assert (await running.one.get(f"/v1/files?{query}")).status_code == 400
        assert (await running.one.get("/v1/files?after=file-none")).status_code == 404


async def test_another_tenants_file_does_not_exist(tmp_path: Path) -> None:
    """Each verb on another tenant's file is the 404 of an unknown one; no key is 401."""
    async with served(tmp_path) as running:
        file_id = await running.upload(wav(1), "user_data", "a.wav")
        for name in (file_id, "file-unknown"):
            for answer in (
                await running.two.get(f"/v1/files/{name}"),
                await running.two.get(f"/v1/files/{name}/content"),
                await running.two.delete(f"/v1/files/{name}"),
            ):
                assert answer.status_code == 404
                assert answer.json()["error"]["message"] == f"No such File object: {name}"
        assert (await running.two.get("/v1/files")).json()["data"] == []
        assert (await running.two.post(COMPATIBLE, json=compatible_body(file_id))).status_code == 404
        assert (await running.one.get("/v1/files", headers={"authorization": ""})).status_code == 401
        assert (await running.one.get(f"/v1/files/{file_id}")).status_code == 200


async def test_a_caption_of_a_file(tmp_path: Path) -> None:
    """An audio is captioned by its file's id, in each kind of part that carries an address."""
    async with served(tmp_path) as running:
        file_id = await running.upload(wav(1), "user_data", "a.wav")
        parts = [
            {"type": "input_audio", "input_audio": {"data": file_id}},
            {"type": "audio_url", "audio_url": {"url": file_id}},
        ]
        for part in parts:
            body = compatible_body("") | {"messages": [{"role": "user", "content": [part]}]}
            answer = await running.one.post(COMPATIBLE, json=body)
            assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 21)


async def test_files_of_a_tenant_are_bounded(tmp_path: Path) -> None:
    """Past the number of files, or a tenant's share of the space, a file is refused; a deleted file gives room."""
    async with served(tmp_path, max_files_per_tenant=2) as running:
        first, _ = await running.upload(CONTENT), await running.upload(CONTENT)
        refused = await running.one.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", CONTENT)})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")
        await running.one.delete(f"/v1/files/{first}")
        await running.upload(CONTENT)
    async with served(tmp_path, max_files_bytes=2**20) as running:
        await running.upload(b"x" * 400_000)
        refused = await running.one.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * 200_000)})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")
        answer = await running.two.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * 200_000)})
        assert answer.status_code == 200  # another tenant has its share
        assert len(_stored(running)) == 4


async def test_expired_files_and_bytes_without_a_row_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is not found once it has expired; the sweep removes it, and what a killed process has left."""
    async with served(tmp_path) as running:
        expired, kept = await running.upload(CONTENT), await running.upload(CONTENT)
        directory = files_directory(running.components.settings)
        (directory / "file-orphan").write_bytes(b"x")
        table = schema.files
        with running.administration.database.begin() as connection:
            connection.execute(table.update().where(table.c.id == expired).values(expires_at=1))
        assert (await running.one.get(f"/v1/files/{expired}")).status_code == 404
        assert [each["id"] for each in (await running.one.get("/v1/files")).json()["data"]] == [kept]
        await running.components.files.sweep()
        assert _stored(running) == {kept, "file-orphan"}  # as an upload that is about to get its row
        for name in ("file-orphan", kept):
            os.utime(directory / name, (1, 1))
        await running.components.files.sweep()
        assert _stored(running) == {kept}


async def test_an_upload_without_an_end_leaves_nothing(tmp_path: Path) -> None:
    """A form that is cut off is refused, and its bytes are removed."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    async with served(tmp_path) as running:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        cut = await running.one.post("/v1/files", content=head + b"x" * 100_000, headers=headers)
        assert cut.status_code == 400
        await asyncio.sleep(0)
        assert _stored(running) == set()
