"""Facts of the product's own configuration of vLLM, resolved by the CUDA build."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.config import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def settings_of(profile: str, checkpoint: str, **changes: Any) -> Settings:
    """Return the settings of a profile, with the checkpoint directory in place of the captioner's name."""
    values = tomllib.loads(Path(profile).read_text())
    if "model" in values:
        values["model"] = checkpoint
    values |= changes
    return Settings(**values)


def facts(config: VllmConfig) -> dict[str, Any]:
    """Return what the configuration says, in plain values."""
    scheduler, compilation, parallel = config.scheduler_config, config.compilation_config, config.parallel_config
    return {
        "platform_worker": parallel.worker_cls,
        "executor": parallel.distributed_executor_backend.__name__,
        "scheduler": scheduler.scheduler_cls.__name__,
        "async_scheduling": scheduler.async_scheduling,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "step_tokens": scheduler.max_num_batched_tokens,
        "captions": scheduler.max_num_seqs,
        "context": config.model_config.max_model_len,
        "graph_mode": compilation.cudagraph_mode.name,
        "graph_sizes": len(compilation.cudagraph_capture_sizes),
        "largest_graph": compilation.max_cudagraph_capture_size,
        "compile_mode": compilation.mode.name,
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "unsupported_by_v2": list(config._get_v2_model_runner_unsupported_features()),
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "kv_dtype": config.cache_config.cache_dtype,
        "block_tokens": config.cache_config.block_size,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": config.model_config.quantization,
        **_encoder(config),
    }


def _encoder(config: VllmConfig) -> dict[str, Any]:
    from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: PLC0415
    from vllm.multimodal.encoder_budget import MultiModalBudget  # noqa: PLC0415

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    profiled = budget.get_dummy_encoder_profile_inputs()
    return {
        "encoder_tokens": budget.encoder_compute_budget,
        "encoder_cache_tokens": budget.encoder_cache_size,
        "profiled_items": len(profiled),
        "profiled_frames": sum(int(item["audio_feature_lengths"].data) for _, item in profiled),
    }
