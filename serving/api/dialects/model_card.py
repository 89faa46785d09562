"""Model cards for the model lists (PROTOCOL 11). The card of a stand-in identifies it as a stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest, MissingModel, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings

_LISTED = 4
"""Most names that an error lists."""

CREATED = 1_758_002_134
"""Unix time, in seconds, of every model in every list: the manual's value."""

EMBEDDED_SOUNDS = 65
"""Kinds of sound that the embedded checkpoint knows: the length of `SOUNDS` in `deploy/embedded/corpus/captions.py`."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Title, owner (`owned_by`, `provider`; `None`: the dialect's default) and a description in a sentence or two."""

    title: str
    owner: str | None
    description: str


CAPTIONER = ModelCard(
    title="Qwen3-Omni-30B-A3B-Captioner",
    owner=None,
    description="Describes any audio of up to 40 minutes in detailed English.",
)
EMBEDDED = ModelCard(
    title="Embedded stand-in for Qwen3-Omni-30B-A3B-Captioner",
    owner="captioner-embedded",
    description="A small stand-in in the architecture of Qwen3-Omni-30B-A3B-Captioner, which makes this service run "
    "without a GPU. It is not the 30B captioner: in set phrases it says which of "
    f"{EMBEDDED_SOUNDS} kinds of sound, eight families of instruments and six languages it takes a clip for, and it is "
    "often wrong.",
)
FAKE = ModelCard(
    title="Fake engine in place of Qwen3-Omni-30B-A3B-Captioner",
    owner="captioner-fake",
    description="No model: set text at a set speed, for tests and load generators.",
)


def model_card(settings: Settings) -> ModelCard:
    """Return the card of the served model, under any of its names."""
    if settings.engine == "fake":
        return FAKE
    return EMBEDDED if settings.is_embedded else CAPTIONER


def served_names(settings: Settings) -> list[str]:
    """Return every accepted model name once, the main name first."""
    return list(dict.fromkeys((settings.served_model_name, *settings.model_aliases)))


def check_served(settings: Settings, model: str) -> None:
    """Raise `ModelNotFound` for a name that is not served. The message has at most 128 characters of the name."""
    if model not in settings.model_names:
        names = served_names(settings)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise ModelNotFound(model[:128], f"This server serves {', '.join(names[:_LISTED])}{more}.")


def requested_model(values: Mapping[str, Any], settings: Settings, *, required: bool = True) -> str:
    """Return the request's `model`; without one, and unless it is `required`, the name of the served model.

    Raises `MissingModel`, `InvalidRequest` and `ModelNotFound`.
    """
    model = values.get("model")
    if model is None or model == "":
        if required:
            raise MissingModel(param="model")
        return settings.served_model_name
    if not isinstance(model, str):
        raise InvalidRequest("'model' must be String", param="model")
    check_served(settings, model)
    return model
