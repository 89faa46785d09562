"""vLLM's Qwen3-Omni thinker for one audio in several pieces. The import of this module registers it with vLLM.

The audio tower attends within windows of 8 s and convolves within single seconds, so pieces that end at the ends of
windows are encoded exactly as in the whole audio. As separate items the pieces are encoded one by one, each when the
prompt's chunked prefill reaches it, and not all in one engine step that every other caption would wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerDummyInputsBuilder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerMultiModalProcessor,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from serving.engine.base import audio_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.multimodal.inputs import MultiModalFeatureSpec


_PROFILED_FRAMES = 3000
"""Length of each audio that vLLM encodes at start to measure memory: 30 s, the feature extractor's longest."""


def profiled_audio_tokens(step_tokens: int) -> int:
    """Return the audio tokens that vLLM encodes at once when it measures memory at start.

    A step may encode no more, or it could need memory that the KV cache has taken.
    """
    item = audio_tokens(_PROFILED_FRAMES)
    return max(1, step_tokens // item) * item


class ProcessingInfo(Qwen3OmniMoeThinkerProcessingInfo):  # type: ignore[misc]
    """vLLM's facts about the model, with the true number of tokens of the longest profiled audio.

    vLLM says 750 tokens for 30 s (another model's rate), and so measures memory with half of the audio that it later
    lets a step encode: 300 s instead of 630 s for steps of 8192 tokens.
    """

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int] | None = None) -> Mapping[str, int]:
        """Return the tokens of the longest item of each modality."""
        most: Mapping[str, int] = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        return {**most, "audio": audio_tokens(_PROFILED_FRAMES)} if "audio" in most else most


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3OmniMoeThinkerMultiModalProcessor,
    info=ProcessingInfo,
    dummy_inputs=Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class Thinker(Qwen3OmniMoeThinkerForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with other positions of the tokens."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return positions (3, tokens), and 0: the next token's position less the number of tokens before it.

        For audio alone vLLM too counts 0, 1, 2, … on all three axes, but it requires a text token after each audio.
        """
        if any(feature.modality != "audio" for feature in mm_features):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[no-any-return]
        return torch.arange(len(input_tokens)).expand(3, -1), 0


ModelRegistry.register_model("Qwen3OmniMoeForConditionalGeneration", Thinker)
