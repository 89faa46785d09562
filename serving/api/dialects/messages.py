"""Selection of the single audio among the messages (PROTOCOL 5.4, 7.1). Each dialect accepts both dialects' parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

MISSING_AUDIO = "Required parameter(audio) missing or invalid, please check the request parameters."
NOT_A_MODAL = "The item of content should be a message of a certain modal."  # sic
NO_USER = "The input messages do not contain elements with the role of user."
SINGLE_TURN = "This model only supports a single turn: one message with the role of user."
ONE_AUDIO = "This model only supports one audio per request."
USER_AUDIO = "Audio is only supported in a message with the role of user."

_TEXT_ALONE = (
    'A text alone gets no answer: add the audio as a part, {"audio": "https://…"} or {"type": "input_audio", '
    '"input_audio": {"data": "https://…"}}. To probe the service use GET /health.'
)
_DATA = "is missing, or no text: it should be a URL, a data URL, or (input_audio and file) base64."

ROLES = ("system", "developer", "user", "assistant", "tool")
ACCEPTED = ("text", "audio", "input_audio", "audio_url", "file")
MODALS = frozenset(ACCEPTED) | {"image", "video", "image_url", "video_url"}

_FIELDS = {"input_audio": "data", "audio_url": "url", "file": "file_data"}
"""Field of a part's object that holds the audio."""


@dataclass(frozen=True, slots=True)
class AudioPart:
    """An audio reference as the client wrote it. Not all kinds of parts may hold base64 without a `data:` prefix."""

    reference: str
    may_be_bare: bool = False


def only_audio(messages: list[Any]) -> AudioPart:
    """Return the audio of a single turn; texts and system messages are ignored. Raises `InvalidRequest`."""
    users = turns = 0
    audios: list[AudioPart] = []
    for index, message in enumerate(messages):
        role = _role(message, index)
        found = list(_audios(message.get("content"), f"messages.{index}.content"))
        if role == "user":
            users += 1
            turns += bool(message.get("content"))
            audios += found
        elif found:
            raise InvalidRequest(USER_AUDIO, param="messages")
    if not users:
        raise InvalidRequest(NO_USER, param="messages")
    if turns > 1:
        raise InvalidRequest(SINGLE_TURN, param="messages")
    if not audios:
        raise InvalidRequest.because(_TEXT_ALONE, sentence=MISSING_AUDIO, param="messages")
    if len(audios) > 1:
        raise InvalidRequest(ONE_AUDIO, param="messages")
    return audios[0]


def _role(message: object, index: int) -> str:
    if not isinstance(message, dict):
        raise InvalidRequest.because(f"'messages.{index}' must be Object.", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        name = repr(role)[:64]
        raise InvalidRequest(f"{name} is not one of {list(ROLES)} - 'messages.{index}.role'", param="messages")
    if role in ("assistant", "tool"):
        raise InvalidRequest(SINGLE_TURN, param="messages")
    return role


def _audios(content: object, place: str) -> Iterator[AudioPart]:
    """Yield every audio of one message's content, which is at `place`."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidRequest.because(f"'{place}' must be a list of parts.", sentence=MISSING_AUDIO, param="messages")
    for index, part in enumerate(content):
        part_place = f"{place}.{index}"
        if not isinstance(part, dict):
            raise InvalidRequest.because(f"'{part_place}' must be Object.", sentence=NOT_A_MODAL, param="messages")
        for kind in _kinds(part, part_place):
            yield from _audios_of_kind(part, kind, part_place)


def _kinds(part: dict[str, Any], place: str) -> list[str]:
    """Return the kinds of content in a part: OpenAI's parts name them by `type`, DashScope's by their keys."""
    kinds = [part["type"]] if "type" in part else [key for key in part if key in MODALS]
    wrong = [kind for kind in kinds if not isinstance(kind, str) or kind not in ACCEPTED]
    if wrong or not kinds:
        name = f"is {repr(wrong[0])[:64]}, and" if wrong else "has no type, and"
        raise InvalidRequest.because(
            f"'{place}' {name} accepted are {', '.join(ACCEPTED)}.", sentence=NOT_A_MODAL, param="messages"
        )
    return kinds


def _audios_of_kind(part: dict[str, Any], kind: str, place: str) -> Iterator[AudioPart]:
    if kind == "text":
        return
    value, place = part.get(kind), f"{place}.{kind}"
    if kind == "audio":
        references = value if isinstance(value, list) else [value]
    else:
        field = _FIELDS[kind]
        if isinstance(value, dict) and kind == "file" and value.get("file_id") and not value.get(field):
            raise InvalidRequest.because(
                f"'{place}.file_id' is not supported: send the audio as file_data.",
                sentence=MISSING_AUDIO,
                param="messages",
            )
        references, place = [value.get(field)] if isinstance(value, dict) else [None], f"{place}.{field}"
    for reference in references:
        if not reference or not isinstance(reference, str):
            raise InvalidRequest.because(f"'{place}' {_DATA}", sentence=MISSING_AUDIO, param="messages")
        yield AudioPart(reference, may_be_bare=kind in ("input_audio", "file"))
