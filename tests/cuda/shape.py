"""The published captioner without its weights: a checkpoint directory of its sizes, and the names of its weights.

Sizes: `config.json` of Qwen/Qwen3-Omni-30B-A3B-Captioner as it is quoted in public sources. Tokenizer and processor
files: the embedded checkpoint's, which has the captioner's architecture.

Names: the list of every name in the published index of Qwen3-Omni-30B-A3B, with numbers replaced by N, as quoted in a
public porting project that took it from `model.safetensors.index.json`. The index of the captioner could not be read
here; it is the thinker's part of these names, so both parts are given to the loader: the thinker's must all be used,
the rest must be ignored.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from serving.config import EMBEDDED_CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS, EXPERTS, HIDDEN, HEADS, KV_HEADS, HEAD_WIDTH, EXPERT_WIDTH, VOCABULARY = 48, 128, 2048, 32, 4, 128, 768, 152064
AUDIO_LAYERS, AUDIO_WIDTH, AUDIO_HEADS, AUDIO_FFN, AUDIO_CHANNELS = 32, 1280, 20, 5120, 480
AUDIO_COLUMNS = 16
"""Mel bins that are left after three convolutions of stride 2 over 128."""
VISION_LAYERS = 27

THINKER_PARAMETERS = 31_719_205_488
"""Parameters of the published checkpoint, vision tower included (model hub's count; MTEB's registry quotes it)."""
VISION_PARAMETERS = 538_631_408
"""Parameters of the vision tower, which vLLM does not build for `limit_mm_per_prompt` of 0 images and videos."""


QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": (
        "float-quantized",
        {
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        },
    ),
    "int4": (
        "pack-quantized",
        {
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
            "input_activations": None,
        },
    ),
}
"""Format and scheme of quantized checkpoints, as llm-compressor writes them: `FP8_DYNAMIC`, and `W4A16` by AWQ or GPTQ.
Of the experts vLLM takes only symmetric integers in this format."""

QUANTIZED_IGNORE = ["re:.*audio_tower.*", "re:.*visual.*", "re:.*lm_head", "re:.*mlp.gate$"]
"""Modules that a quantized checkpoint leaves in BF16, as llm-compressor's examples for mixtures of experts do."""


def quantization_config(kind: str) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint of a kind of `QUANTIZED`."""
    form, scheme = QUANTIZED[kind]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
        "ignore": QUANTIZED_IGNORE,
    }


def write_checkpoint(home: Path, quantization: str = "") -> Path:
    """Write the directory and return it. `quantization`: a kind of `QUANTIZED`, or none."""
    shutil.copytree(EMBEDDED_CHECKPOINT, home, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((home / "config.json").read_text())
    thinker = config["thinker_config"]
    config["dtype"] = thinker["dtype"] = "bfloat16"
    thinker["audio_config"] |= {
        "d_model": AUDIO_WIDTH,
        "encoder_layers": AUDIO_LAYERS,
        "encoder_attention_heads": AUDIO_HEADS,
        "encoder_ffn_dim": AUDIO_FFN,
        "downsample_hidden_size": AUDIO_CHANNELS,
        "output_dim": HIDDEN,
    }
    text = thinker["text_config"]
    text |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": EXPERT_WIDTH,
        "intermediate_size": EXPERT_WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 65_536,
    }
    text["rope_parameters"]["mrope_section"] = [24, 20, 20]
    thinker["vision_config"] |= {
        "depth": VISION_LAYERS,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [8, 16, 24],
        "num_position_embeddings": 2304,
    }
    if quantization:
        config["quantization_config"] = quantization_config(quantization)
    (home / "config.json").write_text(json.dumps(config))
    return home


def thinker_weights() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the language model and the audio tower."""
    yield from _audio_weights()
    yield "thinker.lm_head.weight", (VOCABULARY, HIDDEN)
    yield "thinker.model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "thinker.model.norm.weight", (HIDDEN,)
    for index in range(LAYERS):
        layer = f"thinker.model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{layer}.self_attn.q_norm.weight", (HEAD_WIDTH,)
        yield f"{layer}.self_attn.k_norm.weight", (HEAD_WIDTH,)
        yield f"{layer}.self_attn.q_proj.weight", (HEADS * HEAD_WIDTH, HIDDEN)
        yield f"{layer}.self_attn.k_proj.weight", (KV_HEADS * HEAD_WIDTH, HIDDEN)
        yield f"{layer}.self_attn.v_proj.weight", (KV_HEADS * HEAD_WIDTH, HIDDEN)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_WIDTH)
        yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield f"{layer}.mlp.experts.{expert}.gate_proj.weight", (EXPERT_WIDTH, HIDDEN)
            yield f"{layer}.mlp.experts.{expert}.up_proj.weight", (EXPERT_WIDTH, HIDDEN)
            yield f"{layer}.mlp.experts.{expert}.down_proj.weight", (HIDDEN, EXPERT_WIDTH)


def _audio_weights() -> Iterator[tuple[str, tuple[int, ...]]]:
    tower = "thinker.audio_tower"
    for index, channels in ((1, 1), (2, AUDIO_CHANNELS), (3, AUDIO_CHANNELS)):
        yield f"{tower}.conv2d{index}.weight", (AUDIO_CHANNELS, channels, 3, 3)
        yield f"{tower}.conv2d{index}.bias", (AUDIO_CHANNELS,)
    yield f"{tower}.conv_out.weight", (AUDIO_WIDTH, AUDIO_CHANNELS * AUDIO_COLUMNS)
    yield f"{tower}.ln_post.weight", (AUDIO_WIDTH,)
    yield f"{tower}.ln_post.bias", (AUDIO_WIDTH,)
    yield f"{tower}.proj1.weight", (AUDIO_WIDTH, AUDIO_WIDTH)
    yield f"{tower}.proj1.bias", (AUDIO_WIDTH,)
    yield f"{tower}.proj2.weight", (HIDDEN, AUDIO_WIDTH)
    yield f"{tower}.proj2.bias", (HIDDEN,)
    for index in range(AUDIO_LAYERS):
        layer = f"{tower}.layers.{index}"
        for name in ("q", "k", "v", "out"):
            yield f"{layer}.self_attn.{name}_proj.weight", (AUDIO_WIDTH, AUDIO_WIDTH)
            yield f"{layer}.self_attn.{name}_proj.bias", (AUDIO_WIDTH,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield f"{layer}.{name}.weight", (AUDIO_WIDTH,)
            yield f"{layer}.{name}.bias", (AUDIO_WIDTH,)
        yield f"{layer}.fc1.weight", (AUDIO_FFN, AUDIO_WIDTH)
        yield f"{layer}.fc1.bias", (AUDIO_FFN,)
        yield f"{layer}.fc2.weight", (AUDIO_WIDTH, AUDIO_FFN)
        yield f"{layer}.fc2.bias", (AUDIO_WIDTH,)


IGNORED_WEIGHTS = (
    "code2wav.code_embedding.weight",
    "code2wav.decoder.0.conv.bias",
    "code2wav.pre_transformer.layers.0.self_attn.q_proj.weight",
    "talker.code_predictor.lm_head.0.weight",
    "talker.code_predictor.model.layers.0.mlp.down_proj.weight",
    "talker.codec_head.weight",
    "talker.hidden_projection.linear_fc1.weight",
    "talker.model.codec_embedding.weight",
    "talker.model.layers.0.mlp.experts.0.down_proj.weight",
    "talker.model.layers.0.mlp.gate.weight",
    "talker.model.layers.0.mlp.shared_expert.down_proj.weight",
    "talker.model.layers.0.mlp.shared_expert_gate.weight",
    "talker.model.norm.weight",
    "talker.text_projection.linear_fc1.bias",
    "thinker.visual.blocks.0.attn.qkv.weight",
    "thinker.visual.blocks.0.mlp.linear_fc1.bias",
    "thinker.visual.blocks.0.norm1.weight",
    "thinker.visual.merger.ln_q.weight",
    "thinker.visual.merger.mlp.0.weight",
    "thinker.visual.merger_list.0.ln_q.bias",
    "thinker.visual.merger_list.0.mlp.0.weight",
    "thinker.visual.patch_embed.proj.weight",
    "thinker.visual.pos_embed.weight",
)
"""One name of each further part of the index, which the loader must ignore."""
