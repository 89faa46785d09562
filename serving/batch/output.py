"""Output files of a batch: a line of JSON for each line of the input that was completed, and another file of the rest.

The ids of the files follow from the batch's id, and their bytes from its lines, of which none runs any more. So a
process that takes over after another one was killed writes the same files again.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from serving.batch.files import Files
    from serving.batch.store import Batch, BatchStore

_PAGE = 500
PURPOSE = "batch_output"


async def write_output(files: Files, store: BatchStore, batch: Batch, *, completed: bool) -> str | None:
    """Store the file of the lines that were completed, or of those that failed; return its id, `None` without lines.

    Raises `StorageUnavailable`, `Overloaded`, and errors of the database.
    """
    kind = "output" if completed else "error"
    after = 0
    with files.receive(batch.tenant_id, max_bytes=sys.maxsize) as file:
        while rows := await asyncio.to_thread(store.results, batch.id, completed=completed, after=after, limit=_PAGE):
            after = rows[-1][0]
            await asyncio.to_thread(_write, file.write, batch, rows)
        if not file.size:
            return None
        stored = await files.add(
            file,
            tenant_id=batch.tenant_id,
            purpose=PURPOSE,
            filename=f"{batch.id}_{kind}.jsonl",
            ttl_s=batch.output_ttl_s,
            file_id=f"file-{hashlib.sha256(f'{batch.id}:{kind}'.encode()).hexdigest()[:32]}",
            bounded=False,
        )
    return stored.id


def _write(write: object, batch: Batch, rows: list[tuple[int, str, int | None, str]]) -> None:
    assert callable(write)  # noqa: S101
    write(b"".join(_line(batch, *row) for row in rows))


def _line(batch: Batch, number: int, custom_id: str, status_code: int | None, body: str) -> bytes:
    """Render one line; `body` is JSON already."""
    begin = orjson.dumps({"id": f"batch_req_{batch.id.removeprefix('batch_')}_{number}", "custom_id": custom_id})[:-1]
    if status_code is None:
        return b'%s,"response":null,"error":%s}\n' % (begin, body.encode())
    response = b'{"status_code":%d,"request_id":"%s-%d","body":%s}' % (
        status_code,
        batch.id.encode(),
        number,
        body.encode(),
    )
    return b'%s,"response":%s,"error":null}\n' % (begin, response)
