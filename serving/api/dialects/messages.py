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

ROLES = ("system", "developer", "user", "assistant", "tool")
ACCEPTED = frozenset(("text", "audio", "input_audio", "audio_url"))
MODALS = ACCEPTED | {"image", "video", "image_url", "video_url", "file"}


@dataclass(frozen=True, slots=True)
class AudioPart:
    """An audio reference as the client wrote it. Only `input_audio` may hold base64 without a `data:` prefix."""

    reference: str
    may_be_bare: bool = False


def only_audio(messages: list[Any]) -> AudioPart:
    """Return the audio of a single turn; texts and system messages are ignored. Raises `InvalidRequest`."""
    users = turns = 0
    audios: list[AudioPart] = []
    for index, message in enumerate(messages):
        role = _role(message, index)
        found = list(_audios(message.get("content")))
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
    if len(audios) != 1:
        raise InvalidRequest(ONE_AUDIO if audios else MISSING_AUDIO, param="messages")
    return audios[0]


def _role(message: object, index: int) -> str:
    if not isinstance(message, dict):
        raise InvalidRequest(param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        name = repr(role)[:64]
        raise InvalidRequest(f"{name} is not one of {list(ROLES)} - 'messages.{index}.role'", param="messages")
    if role in ("assistant", "tool"):
        raise InvalidRequest(SINGLE_TURN, param="messages")
    return role


def _audios(content: object) -> Iterator[AudioPart]:
    """Yield every audio of one message's content."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidRequest(MISSING_AUDIO, param="messages")
    for part in content:
        if not isinstance(part, dict):
            raise InvalidRequest(NOT_A_MODAL, param="messages")
        for kind in _kinds(part):
            yield from _audios_of_kind(part, kind)


def _kinds(part: dict[str, Any]) -> list[str]:
    """Return the kinds of content in a part: OpenAI's parts name them by `type`, DashScope's by their keys."""
    kinds = [part["type"]] if "type" in part else [key for key in part if key in MODALS]
    if not kinds or not all(isinstance(kind, str) and kind in ACCEPTED for kind in kinds):
        raise InvalidRequest(NOT_A_MODAL, param="messages")
    return kinds


def _audios_of_kind(part: dict[str, Any], kind: str) -> Iterator[AudioPart]:
    if kind == "text":
        return
    value = part.get(kind)
    if kind == "audio":
        references = value if isinstance(value, list) else [value]
    else:
        field = "data" if kind == "input_audio" else "url"
        references = [value.get(field)] if isinstance(value, dict) else [None]
    for reference in references:
        if not reference or not isinstance(reference, str):
            raise InvalidRequest(MISSING_AUDIO, param="messages")
        yield AudioPart(reference, may_be_bare=kind == "input_audio")
