"""Arguments of vLLM's engine that pass through, and the list of those that the service sets itself.

`engine_args` is a table of names of vLLM's `AsyncEngineArgs` and their values. Names and values are vLLM's own to
check (`serving.engine.vllm.engine_args`); what needs no vLLM is checked here, with the other settings.
"""

from __future__ import annotations

import re


class InvalidEngineArgs(ValueError):  # noqa: N818 - as `InvalidRequest`
    """vLLM refuses `engine_args`. The message names the argument and has no value of a secret argument."""


_REPLICAS = "min_engine_replicas and max_engine_replicas: an engine is one process group of tensor_parallel GPUs"
_ONE_NODE = "tensor_parallel: an engine is on one node"
_AUDIO = "nothing: requests are one audio each, with features that the audio workers compute"
_LOGS = "log_level and log_format"

RESERVED: dict[str, str] = {
    "model": "model",
    "revision": "revision",
    "tokenizer_revision": "revision",
    "served_model_name": "served_model_name",
    "dtype": "dtype",
    "quantization": "quantization, or a quantized checkpoint in model",
    "quantization_config": "quantization, or a quantized checkpoint in model",
    "hf_token": "the variable HF_TOKEN: a token is no setting",
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": _ONE_NODE,
    "prefill_context_parallel_size": _ONE_NODE,
    "distributed_executor_backend": _ONE_NODE,
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "master_addr": _ONE_NODE,
    "master_port": _ONE_NODE,
    "device_ids": "the variable CUDA_VISIBLE_DEVICES",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_active_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_scheduled_tokens": "max_num_batched_tokens",
    "max_num_queued_reqs": "max_engine_queue",
    "max_num_queued_tokens": "max_engine_queue",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "kv_cache_memory_bytes": "gpu_memory_utilization, or cpu_kv_cache_gib on a machine without GPU",
    "enforce_eager": "enforce_eager",
    "long_prefill_token_threshold": "long_tokens_per_step",
    "long_prefill_token_threshold_adaptive": "long_tokens_per_step",
    "enable_chunked_prefill": "long_tokens_per_step: long audios are always read in chunks",
    "disable_chunked_mm_input": "long_tokens_per_step: long audios are always read in chunks",
    "scheduler_cls": "long_tokens_per_step: the scheduler bounds long audios",
    "scheduling_policy": "weights and priorities of tenants' plans",
    "additional_config": "long_tokens_per_step and cpu_kernels",
    "enable_prefix_caching": "nothing: it is off, so that no tenant sees from timing what another sent",
    "mm_processor_cache_gb": "nothing: it is off, so that no tenant sees from timing what another sent",
    "limit_mm_per_prompt": _AUDIO,
    "language_model_only": _AUDIO,
    "mm_encoder_only": _AUDIO,
    "enable_prompt_embeds": _AUDIO,
    "enable_mm_embeds": _AUDIO,
    "allowed_local_media_path": _AUDIO,
    "allowed_media_domains": _AUDIO,
    "skip_tokenizer_init": _AUDIO,
    "tokens_only": _AUDIO,
    "runner": _AUDIO,
    "convert": _AUDIO,
    "model_impl": "nothing: the model's class is the service's own",
    "model_class_overrides": "nothing: the model's class is the service's own",
    "disable_log_stats": "vllm_metrics",
    "otlp_traces_endpoint": "otlp_endpoint",
    "use_tqdm_on_load": _LOGS,
    "enable_log_requests": f"{_LOGS}: requests are never logged",
    "logging_config": _LOGS,
    "log_level": _LOGS,
    "log_config_file": _LOGS,
    "enable_elastic_ep": _REPLICAS,
    "elastic_ep_max_dp_size": _REPLICAS,
    "enable_fault_tolerance": _REPLICAS,
    "fault_tolerance_config": _REPLICAS,
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_backend",
        ),
        _REPLICAS,
    ),
}
"""Arguments of vLLM that the service sets itself, and what to set in their place."""


def written_as(name: object) -> str:
    """Return an argument's name as `AsyncEngineArgs` writes it: `--kv-cache-dtype` is `kv_cache_dtype`."""
    return re.sub(r"^--", "", str(name)).replace("-", "_")


def reserved_problem(names: object) -> str:
    """Return the message for the first argument that the service sets itself, or an empty text."""
    for name in map(written_as, names if isinstance(names, dict) else ()):
        if name in RESERVED:
            return f"engine_args: {name} is set by the service; use {RESERVED[name]}"
    return ""
