"""The model card of the embedded stand-in agrees with its training data and with the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.embedded.corpus.captions import INSTRUMENTS, LANGUAGES, SOUNDS
from serving.api.dialects.model_card import EMBEDDED, EMBEDDED_SOUNDS

ROOT = Path(__file__).parents[3]
PHRASE = f"{EMBEDDED_SOUNDS} kinds of sound"


def test_the_card_has_the_numbers_of_the_captions_grammar() -> None:
    """The numbers of sounds, instruments and languages are those of the grammar that the checkpoint learned."""
    assert (len(SOUNDS), len(INSTRUMENTS), len(LANGUAGES)) == (EMBEDDED_SOUNDS, 8, 6)
    assert f"{PHRASE}, eight families of instruments and six languages" in EMBEDDED.description


@pytest.mark.parametrize("path", ["README.md", "serving/embedded/README.md", "deploy/embedded/card.md"])
def test_documents_have_the_number_of_the_card(path: str) -> None:
    """The README files and the template of the embedded model's card name the same number of sounds."""
    assert PHRASE in " ".join((ROOT / path).read_text().split())
