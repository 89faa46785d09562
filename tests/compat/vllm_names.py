"""The table of vLLM's names that serving/engine/vllm uses: where, for what, and what to do when a name moves.

`test_vllm.py` walks it; the vLLM section of deploy/upgrading.md is its rendering: `python -m tests.compat.vllm_names`.

Members are attributes, or callables with the parameters that we pass or override: positional ones first and in vLLM's
order, after `*` those that we pass by keyword. Every parameter that vLLM requires must be among them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """An object of vLLM, its members that we use, and their use."""

    path: str
    members: str
    use: str


@dataclass(frozen=True, slots=True)
class Area:
    """Names that one of our modules uses for one purpose, and the remedy when one of them moves."""

    title: str
    module: str
    remedy: str
    names: tuple[Name, ...]


AREAS = (
    Area(
        "Configuration",
        "async_llm.py",
        "Find the argument's new name in vLLM's engine arguments; change `engine_config`.",
        (
            Name(
                "vllm.engine.arg_utils.AsyncEngineArgs",
                "__init__(*, model, revision, tokenizer_revision, dtype, quantization, quantization_config,"
                " tensor_parallel_size,"
                " distributed_executor_backend,"
                " max_model_len, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization, kv_cache_memory_bytes,"
                " enforce_eager, async_scheduling, additional_config, limit_mm_per_prompt, enable_prefix_caching,"
                " mm_processor_cache_gb, disable_log_stats, otlp_traces_endpoint, use_tqdm_on_load),"
                " create_engine_config()",
                "every setting of the engine",
            ),
            Name("vllm.config.VllmConfig", "scheduler_config, cache_config", "scheduler class, size of the KV cache"),
            Name("vllm.config.SchedulerConfig", "scheduler_cls, async_scheduling", "choice of our scheduler"),
            Name(
                "vllm.config.SchedulerConfig", "max_num_encoder_input_tokens", "audio in a step: no more than profiled"
            ),
            Name("vllm.config.CacheConfig", "num_gpu_blocks, block_size", "KV capacity that admission control divides"),
            Name(
                "vllm.config.ModelConfig", "dtype, max_model_len, get_vocab_size()", "input dtype, limits of token ids"
            ),
            Name("vllm.platforms.current_platform", "is_cpu()", "defaults that differ between CPU and GPU"),
        ),
    ),
    Area(
        "Arguments that pass through",
        "engine_args.py",
        "Compare `checked` with vLLM's arguments; rename an argument in `serving/settings/engine_args.py`, too.",
        (
            Name(
                "vllm.engine.arg_utils.AsyncEngineArgs", "", "names and types of arguments: the fields of a dataclass"
            ),
            Name(
                "vllm.model_executor.model_loader._LOAD_FORMAT_TO_MODEL_LOADER",
                "auto, fastsafetensors, runai_streamer",
                "load formats",
            ),
        ),
    ),
    Area(
        "Requests",
        "async_llm.py",
        "Compare `LoadedModel.generate` with `AsyncLLM.generate`: it is the same without the copy of the input.",
        (
            Name(
                "vllm.v1.engine.async_llm.AsyncLLM",
                "from_vllm_config(vllm_config, *, stat_loggers, disable_log_stats),"
                " add_request(request_id, prompt, params, *, trace_headers), abort(request_id), errored, renderer,"
                " input_processor, model_config, vllm_config",
                "start of the engine process; a request without `generate`, which keeps the features",
            ),
            Name(
                "vllm.v1.engine.output_processor.RequestOutputCollector",
                "get_nowait(), get()",
                "deltas of a request, merged where the client is slow",
            ),
            Name("vllm.outputs.RequestOutput", "outputs", "the one completion of a request"),
            Name("vllm.outputs.CompletionOutput", "text, token_ids, finish_reason, logprobs", "content of a delta"),
            Name("vllm.sampling_params.SamplingParams", "", "type of a request's parameters"),
            Name("vllm.exceptions.VLLMClientError", "", "rejected parameters: `InvalidRequest`"),
            Name("vllm.exceptions.VLLMServerError", "", "failures: `EngineFailed`"),
            Name("vllm.renderers.base.BaseRenderer", "get_tokenizer()", "the checkpoint's tokenizer"),
            Name(
                "vllm.v1.engine.input_processor.InputProcessor",
                "generation_config_fields",
                "end-of-turn tokens of the checkpoint, which are not counted",
            ),
        ),
    ),
    Area(
        "Sampling",
        "sampling.py",
        "Find the parameter's new name in `SamplingParams`; change `sampling_params`.",
        (
            Name(
                "vllm.sampling_params.SamplingParams",
                "__init__(*, temperature, top_p, top_k, max_tokens, seed, stop, stop_token_ids, presence_penalty,"
                " frequency_penalty, repetition_penalty, ignore_eos, include_stop_str_in_output, min_p, min_tokens,"
                " logit_bias, allowed_token_ids, _bad_words_token_ids, logprobs, repetition_detection,"
                " output_kind, skip_clone)",
                "sampling; `skip_clone` saves a copy per request",
            ),
            Name(
                "vllm.sampling_params.RepetitionDetectionParams",
                "__init__(*, max_pattern_size, min_count)",
                "where a caption that repeats itself ends, with the finish reason `repetition`",
            ),
            Name("vllm.logprobs.Logprob", "logprob, decoded_token", "probability and text of a token"),
            Name("vllm.sampling_params.RequestOutputKind", "DELTA", "deltas in place of the text so far"),
            Name("vllm.exceptions.VLLMClientError", "", "rejected parameters: `InvalidRequest`"),
        ),
    ),
    Area(
        "Input",
        "async_llm.py",
        "`test_the_input_equals_vllms_own_preprocessing` shows the difference; change `_input` and `_item`.",
        (
            Name(
                "vllm.inputs.engine.mm_input",
                "(prompt_token_ids, mm_kwargs, mm_hashes, mm_placeholders)",
                "engine input without preprocessing",
            ),
            Name("vllm.inputs.engine.MultiModalInput", "prompt_token_ids", "number of input tokens"),
            Name("vllm.multimodal.inputs.MultiModalKwargsItems", "__init__(dict)", "items by modality"),
            Name("vllm.multimodal.inputs.MultiModalKwargsItem", "__init__(dict)", "features of a piece"),
            Name("vllm.multimodal.inputs.MultiModalFieldElem", "__init__(*, data, field)", "a tensor and its batching"),
            Name(
                "vllm.multimodal.inputs.MultiModalFlatField", "__init__(*, slices, dim)", "features: joined by frames"
            ),
            Name("vllm.multimodal.inputs.MultiModalBatchedField", "__init__(*, keep_on_cpu)", "lengths and mask"),
            Name("vllm.multimodal.inputs.PlaceholderRange", "__init__(*, offset, length)", "position of a piece"),
        ),
    ),
    Area(
        "Shutdown",
        "async_llm.py",
        "Read `AsyncLLM.shutdown`: our `close` fails running captions first, and waits for the processes.",
        (
            Name(
                "vllm.v1.engine.async_llm.AsyncLLM",
                "output_handler, output_processor, engine_core, shutdown()",
                "the task that would log the shutdown as a failure; the client of the engine process",
            ),
            Name(
                "vllm.v1.engine.output_processor.OutputProcessor",
                "propagate_error(e)",
                "running captions raise instead of waiting for ever",
            ),
            Name("vllm.v1.engine.exceptions.EngineDeadError", "__init__()", "the error that they raise"),
            Name("vllm.v1.engine.core_client.MPClient", "resources", "processes and sockets of the client"),
            Name(
                "vllm.v1.engine.core_client.BackgroundResources",
                "engine_manager, ctx, output_socket, input_socket",
                "ZeroMQ context, which vLLM leaves to the end of the interpreter; sockets that the event loop reads",
            ),
            Name("vllm.v1.engine.utils.CoreEngineProcManager", "processes", "the engine process, to wait for its end"),
        ),
    ),
    Area(
        "Steps",
        "step_counter.py",
        "Read `StatLoggerManager` and `AsyncLLM._run_output_handler`: which logger is called per step, and what keeps"
        " vLLM's Prometheus logger off.",
        (
            Name(
                "vllm.v1.metrics.loggers.StatLoggerBase",
                "record(scheduler_stats, iteration_stats), log_engine_initialized()",
                "base of `StepCounter`",
            ),
            Name(
                "vllm.v1.metrics.loggers.PrometheusStatLogger",
                "record(scheduler_stats, iteration_stats), record_admission_rejection(reason), record_sleep_state(),"
                " log_engine_initialized()",
                "base of `NoPrometheusLogger`: a subclass replaces vLLM's own",
            ),
            Name("vllm.v1.metrics.stats.SchedulerStats", "step_counter", "the scheduler's count of steps with work"),
        ),
    ),
    Area(
        "Scheduler",
        "scheduler.py",
        "Read the new `Scheduler.schedule`: the bound for long audios belongs where it settles a request's tokens."
        " `test_long_clips.py` states what must hold.",
        (
            Name(
                "vllm.v1.core.sched.scheduler.Scheduler",
                "schedule(throttle_prefills), update_from_output(scheduler_output, model_runner_output),"
                " _try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, encoder_compute_budget),"
                " vllm_config, running, waiting, max_num_running_reqs",
                "base of `LongAudioScheduler`: order and share of long audios",
            ),
            Name("vllm.v1.core.sched.async_scheduler.AsyncScheduler", "", "base of `AsyncLongAudioScheduler`"),
            Name(
                "vllm.v1.request.Request",
                "num_prompt_tokens, num_computed_tokens, arrival_time",
                "length, progress and age of a request",
            ),
            Name("vllm.v1.core.sched.output.SchedulerOutput", "total_num_scheduled_tokens", "steps without work"),
            Name("vllm.v1.engine.EngineCoreOutputs", "scheduler_stats", "message to the client, with the statistics"),
            Name(
                "vllm.v1.metrics.stats.SchedulerStats",
                "step_counter",
                "field that carries the count; vLLM's own use is data parallelism, which the service does not have",
            ),
            Name("vllm.config.VllmConfig", "additional_config", "our bounds on their way to the engine process"),
        ),
    ),
    Area(
        "Executors",
        "executor.py",
        "Read how the executor loads the model: our thread belongs before it, the patch of the layers after it.",
        (
            Name(
                "vllm.v1.executor.uniproc_executor.UniProcExecutor",
                "_init_executor(), determine_available_memory(), initialize_from_config(kv_cache_configs),"
                " compile_or_warm_up_model(), driver_worker, vllm_config",
                "base of `InProcessExecutor`",
            ),
            Name(
                "vllm.v1.executor.multiproc_executor.MultiprocExecutor",
                "_init_executor(), determine_available_memory(), initialize_from_config(kv_cache_configs),"
                " compile_or_warm_up_model()",
                "base of `MultiGpuExecutor`; the methods are the phases of a start (`start_progress.py`)",
            ),
            Name("vllm.v1.worker.worker_base.WorkerWrapperBase", "worker", "way to the model"),
            Name("vllm.v1.worker.cpu_worker.CPUWorker", "model_runner", "way to the model"),
            Name("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "input_batch", "way to the batch of requests"),
            Name("vllm.v1.worker.gpu_input_batch.InputBatch", "generators", "generators of seeded requests on a CPU"),
            Name("vllm.config.VllmConfig", "additional_config", "the setting `cpu_kernels`"),
            Name("vllm.platforms.current_platform", "is_cpu()", "no CPU kernels on a GPU"),
        ),
    ),
    Area(
        "Model",
        "model.py",
        "Read the new model class: `test_pieces_give_the_tokens_of_the_undivided_audio` states what must hold.",
        (
            Name("vllm.ModelRegistry", "register_model(model_arch, model_cls)", "our class in place of vLLM's"),
            Name(
                "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerForConditionalGeneration",
                "get_mrope_input_positions(input_tokens, mm_features)",
                "base of `Thinker`: several audios without text between them",
            ),
            Name("vllm.multimodal.inputs.MultiModalFeatureSpec", "modality", "audio alone"),
            Name(
                "vllm.multimodal.MULTIMODAL_REGISTRY",
                "register_processor(processor, *, info, dummy_inputs)",
                "our facts about the model, for the measurement of memory at start",
            ),
            Name(
                "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerProcessingInfo",
                "get_mm_max_tokens_per_item(seq_len, mm_counts)",
                "base of `ProcessingInfo`: tokens of 30 s of audio",
            ),
            Name(
                "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerMultiModalProcessor",
                "",
                "vLLM's own",
            ),
            Name(
                "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerDummyInputsBuilder",
                "",
                "vLLM's own: the audio that is encoded at start",
            ),
        ),
    ),
    Area(
        "CPU kernels: model runner",
        "cpu_kernels.py",
        "Set `cpu_kernels` to false until `patch_decoder_layers` is adapted: captions stay the same, steps get slower.",
        (
            Name(
                "vllm.v1.worker.cpu_model_runner.CPUModelRunner", "vllm_config, sampler, get_model()", "model, sampler"
            ),
            Name("vllm.config.VllmConfig", "compilation_config, model_config, parallel_config", "conditions"),
            Name("vllm.config.CompilationConfig", "mode", "no compiler"),
            Name("vllm.config.CompilationMode", "NONE", "no compiler"),
            Name("vllm.config.ParallelConfig", "world_size", "one process"),
            Name("vllm.config.ModelConfig", "get_multimodal_config()", "images and videos off"),
            Name("vllm.config.MultiModalConfig", "get_limit_per_prompt(modality)", "images and videos off"),
            Name("vllm.platforms.current_platform", "is_cpu()", "no CPU kernels on a GPU"),
            Name("vllm.v1.sample.sampler.Sampler", "topk_topp_sampler, logprobs_mode, use_fp64_gumbel", "sampler"),
            Name(
                "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler",
                "forward",
                "replaced by `topk_first_sampler`",
            ),
            Name(
                "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerForConditionalGeneration",
                "language_model, deepstack_input_embeds",
                "decoder layers; additions for images, off",
            ),
        ),
    ),
    Area(
        "CPU kernels: decoder layers",
        "cpu_kernels.py",
        "Compare `Layer` with the new `forward` of vLLM's decoder layer; `_is_plain` must recognise what it computes."
        " `test_direct_kernels_give_the_same_tokens` states what must hold.",
        (
            Name(
                "vllm.model_executor.models.qwen3_moe.Qwen3MoeDecoderLayer",
                "forward(positions, hidden_states, residual), self_attn, mlp, input_layernorm,"
                " post_attention_layernorm",
                "the layer that is replaced",
            ),
            Name(
                "vllm.model_executor.models.qwen3_moe.Qwen3MoeAttention",
                "qkv_proj, o_proj, q_norm, k_norm, rotary_emb, attn, num_heads, num_kv_heads, q_size, kv_size,"
                " head_dim",
                "attention of the layer",
            ),
            Name(
                "vllm.model_executor.models.qwen3_moe.Qwen3MoeSparseMoeBlock",
                "gate, experts, shared_expert",
                "experts of the layer",
            ),
            Name(
                "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts",
                "quant_method, renormalize, scoring_func, use_grouped_topk, custom_routing_function,"
                " e_score_correction_bias, apply_router_weight_on_input, top_k, activation",
                "routing that `Layer` computes",
            ),
            Name(
                "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
                "moe_kernel, w13_weight, w2_weight",
                "unquantized experts",
            ),
            Name("vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEKernel", "fused_experts", "their kernel"),
            Name(
                "vllm.model_executor.layers.fused_moe.experts.cpu_moe.CPUUnquantizedExperts",
                "isa, _use_zentorch",
                "instruction set of the packed weights",
            ),
            Name("vllm.model_executor.layers.linear.UnquantizedLinearMethod", "", "float weights"),
            Name("vllm.model_executor.layers.linear.LinearBase", "quant_method", "float weights"),
            Name(
                "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
                "cpu_linear",
                "matrix product of a linear layer on a CPU",
            ),
            Name(
                "vllm.model_executor.layers.layernorm.RMSNorm",
                "weight, variance_epsilon, variance_size_override",
                "normalisation",
            ),
            Name(
                "vllm.model_executor.layers.rotary_embedding.mrope.MRotaryEmbedding",
                "cos_sin_cache, is_neox_style",
                "rotation",
            ),
            Name(
                "vllm.model_executor.layers.attention.Attention", "impl, layer_name, kv_cache", "KV cache of the layer"
            ),
            Name(
                "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
                "do_kv_cache_update(layer, key, value, kv_cache, slot_mapping),"
                " forward(layer, query, key, value, kv_cache, attn_metadata, output)",
                "attention kernel",
            ),
            Name("vllm.forward_context.get_forward_context", "()", "metadata of the step"),
            Name("vllm.forward_context.ForwardContext", "attn_metadata, slot_mapping", "metadata of the step"),
            Name(
                "torch.ops._C",
                "rms_norm(out, input, weight, epsilon), fused_add_rms_norm(input, residual, weight, epsilon),"
                " rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox),"
                " cpu_fused_moe(output, input, w13, w2, w13_bias, w2_bias, topk_weights, topk_id, skip_weighted, act,"
                " isa)",
                "vLLM's compiled kernels",
            ),
        ),
    ),
    Area(
        "Environment",
        "engine.py",
        "Find the variable's new name in `vllm/envs.py`; change `_environment`.",
        (
            Name(
                "vllm.envs.environment_variables",
                "VLLM_RPC_BASE_PATH, VLLM_LOGGING_CONFIG_PATH, VLLM_NO_USAGE_STATS, VLLM_WORKER_MULTIPROC_METHOD",
                "sockets in our directory, logs in our format, no usage report, processes that inherit nothing",
            ),
        ),
    ),
    Area(
        "Threads",
        "async_llm.py",
        "Find the variable's new name in `vllm/envs.py`; change `engine_config`.",
        (Name("vllm.envs.environment_variables", "VLLM_CPU_OMP_THREADS_BIND", "threads of a CPU engine not pinned"),),
    ),
)


def rendered() -> str:
    """Return the table as the vLLM section of deploy/upgrading.md has it."""
    parts = []
    for area in AREAS:
        rows = "\n".join(
            f"| `{name.path}` | {f'`{name.members}`' if name.members else '(the class)'} | {name.use} |"
            for name in area.names
        )
        parts.append(
            f"### {area.title}: `{area.module}`\n\n**When a name moves.** {area.remedy}\n\n"
            f"| Name | Members | Use |\n|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(rendered())  # noqa: T201 - the program's output
