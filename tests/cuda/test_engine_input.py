"""The product's engine input through Model Runner V2's own code: positions, embeddings, preemption, messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cuda.build import CudaBuild

pytestmark = pytest.mark.timeout(300)

CLIPS = {"first": 30, "long": 2400, "second": 5, "third": 30}
OUTPUT_TOKENS = 120


@pytest.fixture(scope="module")
def seen(cuda_build: CudaBuild) -> Any:
    """A run over 40 minutes of audio in pieces and three clips, with too little KV cache for all their output."""
    return cuda_build.run(
        "engine_input", interpret=True, clips=CLIPS, output_tokens=OUTPUT_TOKENS, blocks=2020, dtype="float32"
    )


def test_every_token_gets_its_position_and_its_embedding(seen: dict[str, Any]) -> None:
    """In each step tokens, positions on all axes, the mask and the gathered embeddings are those of the requests."""
    assert seen["wrong"] == []
    assert seen["finished"] == sorted(CLIPS)
    # 13 tokens a second, and the clip that was preempted once more.
    assert seen["embeddings"] >= sum(CLIPS.values()) * 13


def test_a_preempted_caption_resumes(seen: dict[str, Any]) -> None:
    """A caption loses its KV cache while it is written, is computed again with its output, and finishes."""
    assert seen["preempted"] == 1
    assert seen["resumed_with_output"] == 1


def test_nothing_of_a_request_remains(seen: dict[str, Any]) -> None:
    """After the last caption no request is kept; encoded audio stays within the budget of the encoder's cache."""
    features, encoded_tokens, slots = seen["left_over"]
    assert (features, slots) == (0, 0)
    assert encoded_tokens <= 8192


def test_a_step_encodes_within_its_budget(seen: dict[str, Any]) -> None:
    """Long audio and clips together stay below the audio tokens that were profiled."""
    assert 0 < seen["most_encoder_tokens"] <= 8190


def test_audio_is_sent_to_workers_once(seen: dict[str, Any]) -> None:
    """The step in which 40 minutes start carries all their features (123 MB in float32); later steps carry 2 KB."""
    assert 123_000_000 < seen["largest_message_bytes"] < 128_000_000
    assert seen["later_message_bytes"] < 2048
