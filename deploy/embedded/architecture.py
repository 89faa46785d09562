"""Architecture of the embedded checkpoint: the captioner's, with small sizes, and untrained weights for it.

`python deploy/embedded/architecture.py` writes the untrained checkpoint to `serving/embedded/checkpoint`, the same
bytes each time. The training imports `build_tokenizer`, `build_config`, `build_model` and `save_checkpoint`.

Everything that affects how vLLM and the service handle the model is as in Qwen3-Omni-30B-A3B-Captioner: the classes
(`Qwen3OmniMoeForConditionalGeneration`, thinker only), the audio tower with its windows of 1 s and 8 s, 13 tokens per
second, interleaved M-RoPE, routed experts, the roles of the special tokens, the chat template and the processor files.
Only widths, depths and the vocabulary are smaller. The vision tower exists because the class requires it; it is never
used.
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)
from transformers import Qwen3OmniMoeForConditionalGeneration as Model

if TYPE_CHECKING:
    from collections.abc import Iterable

CHECKPOINT = Path(__file__).resolve().parents[2] / "serving" / "embedded" / "checkpoint"
"""Directory from which the service loads the checkpoint by default."""

CONTEXT_TOKENS = 65_536
"""Positions of the text model; 40 minutes of audio take 31,200."""

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

ROLES = {
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
    "audio_token": "<|audio_pad|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
"""Special tokens that the processor reads from the tokenizer, by attribute."""

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *ROLES.values())

CHAT_ROLES = ("user", "assistant", "system")
"""Single tokens, as in the captioner, so that the prompt around the audio has the same length."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type in ('audio', 'audio_url', 'input_audio') or 'audio' in part %}"
    "{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Chat template that renders audio and text parts as the captioner's template does."""

UNTRAINED_TEXTS = (
    "The audio clip opens with a male speaker who talks calmly in English for about three seconds.",
    "A female voice speaks Mandarin quickly, and then a piano plays a slow melody in a minor key.",
    "In the background there is faint white noise, and the recording is clear, with little reverberation.",
    "After a short silence a dog barks twice, a door is closed, and footsteps are heard on a wooden floor.",
    "Three loud beeps follow one another at a steady rate, before the sound of rain and distant thunder.",
    "A guitar is strummed at a moderate tempo while a child laughs; the clip lasts roughly 12 seconds.",
    "The recording is muffled and noisy, as if it had been made on a telephone, and it ends abruptly.",
    "Hammering on metal at 4 strikes per second is mixed with the hum of an engine and a passing car.",
)
"""English text from which the untrained checkpoint's vocabulary of complete words is trained."""


def build_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with the captioner's pre-tokenization and special tokens.

    Every string can be encoded, because all 256 bytes are tokens; digits are split. The special tokens come last.
    `vocab_size` includes all tokens; few `texts` give a smaller vocabulary.
    """
    bpe = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(chain(texts, CHAT_ROLES * 100_000), trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=ROLES,
        model_max_length=CONTEXT_TOKENS,
    )
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen3OmniMoeConfig:
    """Return the captioner's configuration with small sizes, for the vocabulary of `tokenizer`."""
    ids = tokenizer.get_vocab()
    hidden_size, vision_grid = 192, 4
    return Qwen3OmniMoeConfig(
        thinker_config={
            "audio_config": {
                "d_model": 192,
                "encoder_layers": 3,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 768,
                "downsample_hidden_size": 32,
                "output_dim": hidden_size,
            },
            "text_config": {
                "vocab_size": len(tokenizer),
                "hidden_size": hidden_size,
                "head_dim": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 4,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 256,
                "intermediate_size": 256,
                "max_position_embeddings": CONTEXT_TOKENS,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [8, 8, 8],
                    "mrope_interleaved": True,
                    "interleaved": True,
                },
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": hidden_size,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": vision_grid**2,
                # vLLM reads these two; transformers does not define them.
                "image_size": 16 * vision_grid,
                "apply_vit_abs_pos_embed": True,
            },
            "position_id_per_seconds": 13,
            "seconds_per_chunk": 2,
            "audio_token_id": ids[ROLES["audio_token"]],
            "audio_start_token_id": ids[ROLES["audio_bos_token"]],
            "audio_end_token_id": ids[ROLES["audio_eos_token"]],
            "image_token_id": ids[ROLES["image_token"]],
            "video_token_id": ids[ROLES["video_token"]],
            "vision_start_token_id": ids[ROLES["vision_bos_token"]],
            "vision_end_token_id": ids[ROLES["vision_eos_token"]],
            "user_token_id": ids["user"],
        },
        enable_audio_output=False,
        im_start_token_id=ids[IM_START],
        im_end_token_id=ids[IM_END],
        user_token_id=ids["user"],
        assistant_token_id=ids["assistant"],
        system_token_id=ids["system"],
    )


def build_model(config: Qwen3OmniMoeConfig, seed: int = 0) -> Model:
    """Return the model in float32 with the library's initial weights."""
    torch.manual_seed(seed)
    return Model(config)


def untrain(model: Model, tokenizer: Qwen2Tokenizer, seed: int = 0) -> None:
    """Set random weights with which `model` emits complete words that depend on every input, and ends its turn.

    The library's initial weights are unsuitable: their layers hardly change the output, which then depends on the last
    token, so that all clips would get the same text. Here every matrix keeps the scale of its input, and sharp
    attention prevents loops in greedy text. The first channel of the residual stream carries a constant that only
    `lm_head` reads, as a bias per token: control tokens and parts of words are never sampled, and the end-of-turn
    token wins about once in 30 tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    bias, rare, never, sharpness = 8.0, -0.05, -1000.0, 6.0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if "experts" not in name else parameter.shape[-1]
                parameter.normal_(0, fan_in**-0.5, generator=draw)
        thinker = model.thinker
        for embeddings in (thinker.model.embed_tokens.weight, thinker.audio_tower.proj2.weight):
            embeddings.mul_(192**0.5)
        thinker.model.embed_tokens.weight[:, 0] = bias
        thinker.audio_tower.proj2.weight[0] = 0
        thinker.audio_tower.proj2.bias[0] = bias
        for layer in thinker.model.layers:
            layer.input_layernorm.weight[0] = 0
            layer.post_attention_layernorm.weight[0] = 0
            layer.self_attn.o_proj.weight[0] = 0
            layer.self_attn.q_norm.weight.fill_(sharpness)
            layer.mlp.experts.down_proj[:, 0] = 0
        lm_head = thinker.lm_head.weight
        lm_head[:, 0] = 0
        lm_head[:, 1:] *= 2
        words = {" " + word for text in UNTRAINED_TEXTS for word in re.findall(r"\w{3,}", text)}
        spoken = [id_ for id_ in range(len(tokenizer)) if tokenizer.decode(id_) in words]
        silent = torch.ones(len(lm_head), dtype=torch.bool)
        silent[[*spoken, tokenizer.eos_token_id]] = False
        lm_head[silent] = 0
        lm_head[silent, 0] = never
        lm_head[tokenizer.eos_token_id, 0] = rare
        # The prompt ends with a line break, and captions have none: prevents an empty turn.
        line_break = thinker.model.embed_tokens.weight[tokenizer.encode("\n")[0], 1:]
        lm_head[tokenizer.eos_token_id, 1:] -= 4 * line_break / line_break.norm()


def save_checkpoint(model: Model, tokenizer: Qwen2Tokenizer, path: Path = CHECKPOINT) -> None:
    """Write weights and all files that transformers and vLLM read to the directory `path`.

    Weights are rounded to bfloat16 to halve the file. The configuration specifies float32, so that they are served
    without further rounding on the CPU.
    """
    save_processor(tokenizer, path)
    model.generation_config = GenerationConfig(
        do_sample=False,  # so that a caption is repeatable: the service's default temperature is 0 then
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path, state_dict={name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    (path / "model.safetensors").chmod(0o644)
    # The talker parts are left out, as in the captioner's configuration.
    config = json.loads((path / "config.json").read_text())
    for part in ("talker_config", "code2wav_config"):
        config.pop(part, None)
    config["dtype"] = config["thinker_config"]["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_processor(tokenizer: Qwen2Tokenizer, path: Path) -> None:
    """Write the tokenizer and the feature extractor: log-mel with 128 bins at 16 kHz, one frame per 10 ms."""
    Qwen3OmniMoeProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16),
        video_processor=Qwen2VLVideoProcessor(patch_size=16),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


def main() -> None:
    """Write the untrained checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=CHECKPOINT, help="directory to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = build_tokenizer(UNTRAINED_TEXTS)
    model = build_model(build_config(tokenizer))
    untrain(model, tokenizer, arguments.seed)
    save_checkpoint(model, tokenizer, arguments.path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.path}: {parameters:,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
