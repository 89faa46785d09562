"""Streaming reception of a file of `/v1/files`: a form whose fields may come before the file or after it."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.api.multipart_form import MAX_FIELDS_BYTES, MAX_OVERHEAD_BYTES, MultipartForm
from serving.errors import BodyTooLarge, CaptionerError, InvalidRequest, UploadTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.api.request_body import Body
    from serving.storage.files import PartialBytes

_FILE = "file"
_NAME_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class ReceivedForm:
    """The fields of a complete form, and the name of its file."""

    fields: Mapping[str, str]
    filename: str


async def receive_form(body: Body, content_type: str, file: PartialBytes, *, max_file_bytes: int) -> ReceivedForm:
    """Write the form's file to `file` as it arrives; return the rest. After an error the rest of the body is read.

    Raises `InvalidRequest` for a body that is no such form, and `BodyTooLarge` past the largest file.
    """
    try:
        with _limits_named(max_file_bytes):
            return await _receive(body, content_type, file, max_file_bytes)
    except CaptionerError:
        with suppress(CaptionerError):
            await body.drain()
        raise


async def _receive(body: Body, content_type: str, file: PartialBytes, max_file_bytes: int) -> ReceivedForm:
    form = MultipartForm.of(content_type)
    fields: dict[str, bytearray] = {}
    name, size, total, seen, filename = "", 0, 0, False, ""
    async for piece in body:
        for part, data in form.feed(piece):
            if part == _FILE and seen:
                raise InvalidRequest("The form has more than one file.", param=_FILE)
            name = part or name
            if name == _FILE:
                seen, filename = True, form.filename
                if data:
                    file.write(data)
                continue
            size += len(data)
            if size > MAX_FIELDS_BYTES:
                raise InvalidRequest("The fields of the form are too large.")
            fields.setdefault(name, bytearray()).extend(data)
        total += len(piece)  # counts bytes without meaning, too, such as those after the last part
        if total > MAX_OVERHEAD_BYTES + max_file_bytes:
            raise UploadTooLarge
    if not seen or not form.complete:
        raise InvalidRequest("The form is cut off, or has no part with the name file.", param=_FILE)
    if not file.size:
        raise InvalidRequest("The file is empty.", param=_FILE)
    texts = {name: bytes(value).decode(errors="replace") for name, value in fields.items()}
    return ReceivedForm(texts, _clean(filename))


def _clean(filename: str) -> str:
    """Return a name that is safe to show: printable, of bounded length, without directories."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, last))[:_NAME_CHARACTERS] or "file"


@contextmanager
def _limits_named(max_file_bytes: int) -> Iterator[None]:
    try:
        yield
    except UploadTooLarge:
        raise BodyTooLarge(f"The file is too large: at most {max_file_bytes} bytes are accepted.") from None
