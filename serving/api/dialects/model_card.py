"""What the model lists tell about the model that answers (PROTOCOL 11). A stand-in says that it is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest, MissingModel, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings

CREATED = 1_758_002_134
"""Unix time that every list gives for every model: the manual's."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Title, owner (`owned_by`, `provider`) and a sentence or two."""

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
    "without a GPU. It is not the 30B captioner: in set phrases it tells which of 64 kinds of sound, eight families of "
    "instruments and six languages it takes a clip for, and it is often wrong.",
)
FAKE = ModelCard(
    title="Fake engine in place of Qwen3-Omni-30B-A3B-Captioner",
    owner="captioner-fake",
    description="No model: set text at a set speed, for tests and load generators.",
)


def model_card(settings: Settings) -> ModelCard:
    """The card of what is served, whatever its name."""
    if settings.engine == "fake":
        return FAKE
    return EMBEDDED if settings.is_embedded else CAPTIONER


def served_names(settings: Settings) -> list[str]:
    """Every accepted model name, once each, the main one first."""
    return list(dict.fromkeys((settings.served_model_name, *settings.model_aliases)))


def check_served(settings: Settings, model: str) -> None:
    """Raise `ModelNotFound` for a name that is not served. What it tells of the name is short."""
    if model not in settings.model_names:
        raise ModelNotFound(model[:128])


def requested_model(values: Mapping[str, Any], settings: Settings) -> str:
    """The request's `model`. Raises `MissingModel`, `InvalidRequest` and `ModelNotFound`."""
    model = values.get("model")
    if model is None or model == "":
        raise MissingModel(param="model")
    if not isinstance(model, str):
        raise InvalidRequest("'model' must be String", param="model")
    check_served(settings, model)
    return model
