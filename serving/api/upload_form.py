"""Streaming reception of one file by HTTP form (E4 of PROTOCOL 6.2): fields first, the file last.

Nothing is stored before the fields have shown a valid policy; then the file is written to the store as it arrives.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from serving.api.multipart_form import MAX_FIELDS_BYTES, MAX_OVERHEAD_BYTES, MultipartForm
from serving.errors import CaptionerError, InvalidRequest, PolicyInvalid, UploadTooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.api.request_body import Body
    from serving.storage.upload_policies import UploadGrant
    from serving.storage.uploads import Upload, UploadStore


class _UploadForm(MultipartForm):
    grant: UploadGrant | None = None
    """Rights that the form's policy grants; `None` until the policy was found valid."""


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
    form = _UploadForm.of(content_type)
    try:
        await _store(form, body, uploads, admit, max_file_bytes)
    except CaptionerError:
        if form.grant is not None:
            with suppress(CaptionerError):
                await body.drain()
        raise


async def _store(
    form: _UploadForm,
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
                if size > MAX_FIELDS_BYTES:
                    raise InvalidRequest("The fields of the form are too large.")
                fields.setdefault(name, bytearray()).extend(data)
            total += len(piece)  # counts bytes without meaning, too, such as those after the last part
            if total > MAX_OVERHEAD_BYTES + (max_file_bytes if file is not None else 0):
                raise UploadTooLarge
        if file is None or not form.complete:
            raise InvalidRequest("The form is cut off, or has no part with the name file.")


def _grant(fields: dict[str, bytearray], uploads: UploadStore) -> UploadGrant:
    try:
        policy, signature, key = (fields[name].decode() for name in ("policy", "Signature", "key"))
    except (KeyError, UnicodeDecodeError):
        raise PolicyInvalid from None
    return uploads.check(policy=policy, signature=signature, key=key)
