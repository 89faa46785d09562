"""Streaming reception of one file by HTTP form (E4 of PROTOCOL 6.2): fields first, the file last.

Nothing is stored before the fields have shown a valid policy; then the file is written to the store as it arrives.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.errors import CaptionerError, InvalidRequest, PolicyInvalid, UploadTooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.api.request_body import Body
    from serving.storage.upload_policies import UploadGrant
    from serving.storage.uploads import Upload, UploadStore

FIELDS_BYTES = 65_536
"""Limit of all fields together; no client's form reaches it."""
_PARTS = 64
"""Limit of parts; a client's form has about eight. A name takes memory even without a value."""
OVERHEAD_BYTES = FIELDS_BYTES + _PARTS * 4096
"""Limit of a body before its file, and in addition to it: all values, and 4 KiB of headers for each part."""


async def receive_upload(
    body: Body,
    content_type: str,
    uploads: UploadStore,
    *,
    admit: Callable[[UploadGrant], Awaitable[None]],
    max_file_bytes: int,
) -> None:
    """Store the single file of a form. After an error the rest of the body is read if the policy was valid.

    `admit` is awaited once the fields have shown a valid policy; what it raises refuses the file.

    Raises `InvalidRequest` for a body that is no such form, `UploadRejected` if the policy or the store refuses the
    file, and `Overloaded`.
    """
    form = open_form(content_type)
    try:
        await _store(form, body, uploads, admit, max_file_bytes)
    except CaptionerError:
        if form.grant is not None:
            with suppress(CaptionerError):
                await body.drain()
        raise


async def _store(
    form: Form,
    body: Body,
    uploads: UploadStore,
    admit: Callable[[UploadGrant], Awaitable[None]],
    max_file_bytes: int,
) -> None:
    fields: dict[str, bytearray] = {}
    name, size, total = "", 0, 0
    async with AsyncExitStack() as stack:
        file: Upload | None = None
        async for piece in body:
            for part, data in form.feed(piece):
                name = part or name
                if name == "file":
                    if file is None:
                        form.grant = _grant(fields, uploads)
                        await admit(form.grant)
                        file = await stack.enter_async_context(uploads.receive(form.grant))
                    await file.write(data)
                    continue
                size += len(data)
                if size > FIELDS_BYTES:
                    raise InvalidRequest("The fields of the form are too large.")
                fields.setdefault(name, bytearray()).extend(data)
            total += len(piece)  # counts bytes without meaning, too, such as those after the last part
            if total > OVERHEAD_BYTES + (max_file_bytes if file is not None else 0):
                raise UploadTooLarge
        if file is None or not form.complete:
            raise InvalidRequest("The form is cut off, or has no part with the name file.")


def open_form(content_type: str) -> Form:
    """Return the parser of a form with this content type. Raises `InvalidRequest`."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The request must be a form: multipart/form-data with a boundary.")
    try:
        return Form(boundary)
    except FormParserError:
        raise InvalidRequest("The boundary of the form is too long.") from None


def _grant(fields: dict[str, bytearray], uploads: UploadStore) -> UploadGrant:
    try:
        policy, signature, key = (fields[name].decode() for name in ("policy", "Signature", "key"))
    except (KeyError, UnicodeDecodeError):
        raise PolicyInvalid from None
    return uploads.check(policy=policy, signature=signature, key=key)


class Form:
    """Incremental parser: yields each part's name once, without data, and then the part's data."""

    def __init__(self, boundary: bytes) -> None:
        self.complete = False
        self.grant: UploadGrant | None = None
        """Rights that the form's policy grants; `None` until the policy was found valid."""
        self.filename = ""
        """Name of the last part that has one for its file, as the client wrote it."""
        self._found: list[tuple[str, bytes]] = []
        self._data: list[bytes] = []
        self._header = self._value = b""
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    def feed(self, piece: bytes) -> list[tuple[str, bytes]]:
        """Parse the next bytes; return the names and data found in them. Raises `InvalidRequest`."""
        try:
            self._parser.write(piece)
        except FormParserError:
            raise InvalidRequest("The form is malformed.") from None
        self._flush()
        found, self._found = self._found, []
        return found

    def _on_part_begin(self) -> None:
        # Raised here, it stops the parser within a piece: each part costs 25 microseconds.
        self._parts += 1
        if self._parts > _PARTS:
            raise InvalidRequest("The form has too many parts.")
        self._flush()
        self._found.append(("-", b""))  # until it has a name: its data does not continue the part before

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._flush()
            options = parse_options_header(self._value)[1]
            name = options.get(b"name", b"")
            self.filename = options.get(b"filename", self.filename.encode()).decode(errors="replace")
            self._found.append((name.decode(errors="replace") or "-", b""))
        self._header = self._value = b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _flush(self) -> None:
        """Join the data of one part: text that resembles boundaries comes in pieces of a few bytes."""
        if self._data:
            self._found.append(("", b"".join(self._data)))
            self._data.clear()

    def _on_end(self) -> None:
        self.complete = True
