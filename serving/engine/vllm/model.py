"""vLLM's Qwen3-Omni thinker for one audio in several pieces. The import of this module registers it with vLLM.

The audio tower attends within windows of 8 s and convolves within single seconds, so pieces that end at the ends of
windows are encoded exactly as in the whole audio. As separate items the pieces are encoded one by one, each when the
prompt's chunked prefill reaches it, and not all in one engine step that every other caption would wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeThinkerForConditionalGeneration

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


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
