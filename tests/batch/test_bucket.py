"""Files and batches in a bucket: frontends share no disk, and what is stored twice is the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from serving.errors import NotFound
from serving.storage.files import files_directory, open_files
from tests.batch.served import jsonl, line, served
from tests.batch.test_batches import created, ended, results
from tests.storage.s3 import S3Server, bucket_settings
from tests.support.wire import COMPATIBLE, compatible_body, wav

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("in_process", "hurried_batches")


async def test_a_batch_with_its_files_in_a_bucket(tmp_path: Path) -> None:
    """Input, output and audio are objects; nothing of them stays on the local disk, and deleted files are gone."""
    with S3Server() as server:
        bucket = server.bucket()
        given: dict[str, Any] = bucket_settings(server.url, bucket)
        async with served(tmp_path, **given) as running:
            audio = await running.upload(wav(1), "user_data", "a.wav")
            answer = await running.one.post(COMPATIBLE, json=compatible_body(audio))
            assert answer.json()["usage"]["prompt_tokens"] == 21
            shown = await ended(running, (await created(running, [line("a", audio), line("b"), line("c", "x")]))["id"])
            assert (shown["status"], shown["request_counts"]) == (
                "completed",
                {"total": 3, "completed": 2, "failed": 1},
            )
            assert set(await results(running, shown["output_file_id"])) == {"a", "b"}
            ids = {audio, shown["input_file_id"], shown["output_file_id"], shown["error_file_id"]}
            assert {name.rpartition("/")[2] for name in server.objects(bucket)} == ids
            assert [*files_directory(running.components.settings).iterdir()] == []
            for file_id in ids:
                assert (await running.one.delete(f"/v1/files/{file_id}")).status_code == 200
            assert server.objects(bucket) == []
            stored = open_files(running.components.settings)
            for _ in range(2):  # as by a process that takes over after the first
                with stored.receive("one", max_bytes=1000) as partial:
                    partial.write(jsonl([line("a")])[:500])
                    await stored.publish(partial, "file-again")
            assert await stored.older(-60) == ["file-again"]
            async with stored.reading("file-again", owner="one") as path:
                assert (await asyncio.to_thread(path.read_bytes)) == jsonl([line("a")])[:500]
            with pytest.raises(NotFound):
                async with stored.reading("file-none", owner="one"):
                    pass
