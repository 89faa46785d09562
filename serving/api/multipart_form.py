"""Parser of HTTP forms (multipart/form-data) within bounds, incremental or of a complete body."""

from __future__ import annotations

from typing import Self

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.errors import InvalidRequest

MAX_FIELDS_BYTES = 65_536
"""Limit of all fields together; no client's form reaches it."""
_MAX_PARTS = 64
"""Limit of parts; a client's form has about eight. A name takes memory even without a value."""
MAX_OVERHEAD_BYTES = MAX_FIELDS_BYTES + _MAX_PARTS * 4096
"""Limit of a body before its file, and in addition to it: all values, and 4 KiB of headers for each part."""
_MAX_HEADERS_BYTES = 4096
_MAX_BOUNDARY_BYTES = 256


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a form. Raises `InvalidRequest` for any other content type."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The request must be a form: multipart/form-data with a boundary.")
    if len(boundary) > _MAX_BOUNDARY_BYTES:
        raise InvalidRequest("The boundary of the form is too long.")
    return boundary


class MultipartForm:
    """Incremental parser: yields each part's name once, without data, and then the part's data."""

    def __init__(self, boundary: bytes) -> None:
        self.complete = False
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

    @classmethod
    def of(cls, content_type: str) -> Self:
        """Return the parser of a body of this content type. Raises `InvalidRequest`."""
        return cls(boundary_of(content_type))

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
        if self._parts > _MAX_PARTS:
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


def read_form(body: bytes, content_type: str) -> tuple[dict[str, list[str]], bytes | None]:
    """Parse a complete body: return the values of each field, and the part with the name `file`, if there is one.

    26 MB cost some 20 ms, whatever they are (`MultipartForm`: 5 s if all of them resemble boundaries). Raises
    `InvalidRequest`.
    """
    fields: dict[str, list[str]] = {}
    file: bytes | None = None
    size = 0
    for part in _parts(body, boundary_of(content_type)):
        name, data = _named(part)
        if name == "file":
            if file is not None:
                raise InvalidRequest("The form has more than one part with the name file.", param="file")
            file = data
            continue
        size += len(data)
        if size > MAX_FIELDS_BYTES:
            raise InvalidRequest("The fields of the form are too large.")
        try:
            fields.setdefault(name, []).append(data.decode())
        except UnicodeDecodeError:
            raise InvalidRequest("A field of the form is not UTF-8.", param=name[:64]) from None
    return fields, file


def _parts(body: bytes, boundary: bytes) -> list[bytes]:
    """Return the parts, each with its headers."""
    first, last = b"--%b\r\n" % boundary, b"\r\n--%b--" % boundary
    preamble, *parts = body.split(b"\r\n" + first, _MAX_PARTS + 1)
    if preamble.startswith(first):
        parts.insert(0, preamble[len(first) :])
    if not parts:
        raise InvalidRequest("The form is malformed: it does not begin with its boundary.")
    if len(parts) > _MAX_PARTS:
        raise InvalidRequest("The form has too many parts.")
    for index, part in enumerate(parts):
        data, end, _ = part.partition(last)
        if end:  # what follows is no part of the form
            return [*parts[:index], data]
    raise InvalidRequest("The form is cut off: its last boundary is missing.")


def _named(part: bytes) -> tuple[str, bytes]:
    """Return name and data of a part; "-" for a part without a name."""
    end = part.find(b"\r\n\r\n", 0, _MAX_HEADERS_BYTES)
    if end < 0:
        raise InvalidRequest("The form is malformed: a part has no end of its headers, or too many headers.")
    name = b""
    for line in part[:end].split(b"\r\n"):
        field, colon, value = line.partition(b":")
        if not colon:
            raise InvalidRequest("The form is malformed: a header of a part has no colon.")
        if field.strip().lower() == b"content-disposition":
            name = parse_options_header(value.strip())[1].get(b"name", b"")
    return name.decode(errors="replace") or "-", part[end + 4 :]
