"""The product's engine input through Model Runner V2's bookkeeping, on CPU tensors.

Real: our input, vLLM's input processor, our scheduler, and V2's request state, positions, encoder cache, gather of
embeddings, preemption and resumption, whose Triton kernels run in Triton's interpreter. Made up: the audio tower (each
embedding holds the number of its piece's first frame and its own number in the piece) and the language model.
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch

from serving.config import EMBEDDED_CHECKPOINT, Settings
from serving.engine.base import audio_tokens
from serving.engine.vllm.engine import _environment
from serving.types import Features, Sampling

BLOCK = 16
SAMPLED = 7
_MOST_STEPS = 5000


def run(clips: dict[str, int], output_tokens: int, blocks: int, dtype: str) -> dict[str, Any]:
    """Generate for clips of the given seconds with `blocks` blocks of KV cache; return what was seen."""
    settings = Settings(
        model=str(EMBEDDED_CHECKPOINT),
        dtype=dtype,
        max_num_seqs=8,
        max_num_batched_tokens=8192,
        long_tokens_per_step=2048,
    )
    with tempfile.TemporaryDirectory() as scratch, _environment(settings, Path(scratch)):
        return _Drive(settings, blocks).generate(clips, output_tokens)


class _Tower(torch.nn.Module):
    """A model with our positions and an audio tower that numbers its output."""

    supports_mrope = True
    supports_multimodal = True

    def __init__(self, positions: Any, width: int) -> None:
        super().__init__()
        self._positions, self._width = positions, width

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
        return self._positions(self, input_tokens, mm_features)

    def embed_multimodal(self, **inputs: Any) -> list[torch.Tensor]:
        features, lengths = inputs["input_audio_features"], inputs["audio_feature_lengths"].flatten().tolist()
        starts = np.cumsum([0, *lengths])[:-1]
        found = []
        for start, length in zip(starts, lengths, strict=True):
            rows = torch.zeros(audio_tokens(length), self._width)
            rows[:, 0] = features[0, start]
            rows[:, 1] = torch.arange(len(rows))
            found.append(rows)
        return found


class _Drive:
    def __init__(self, settings: Settings, blocks: int) -> None:
        from tests.cuda.probe.gpu import pretend  # noqa: PLC0415 - vLLM reads the environment on import

        pretend("h100-80g")
        import vllm.platforms  # noqa: PLC0415
        from vllm.utils import platform_utils  # noqa: PLC0415
        from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

        from serving.engine.vllm import async_llm, model  # noqa: PLC0415

        self.config = async_llm.engine_config(settings)
        # Buffers that V2 would allocate on the GPU or in pinned memory.
        vllm.platforms._current_platform.device_type = "cpu"
        vllm.platforms._current_platform.is_pin_memory_available = lambda: False
        for cached in (platform_utils.is_pin_memory_available, platform_utils.is_uva_available):
            cached.cache_clear()
        self.processor = InputProcessor(self.config)
        self.loaded = self._input_maker(async_llm.LoadedModel, settings)
        self.scheduler = self._scheduler(blocks)
        self.runner = self._runner(_Tower(model.Thinker.get_mrope_input_positions, self._width))

    @property
    def _width(self) -> int:
        return int(self.config.model_config.get_inputs_embeds_size())

    def _input_maker(self, kind: Any, settings: Settings) -> Any:
        """Return a `LoadedModel` without processes: only what `_input` uses."""
        from serving.engine.vllm import async_llm  # noqa: PLC0415

        tokenizer = self.processor.renderer.get_tokenizer()
        prompt = tokenizer.encode(async_llm.PROMPT, add_special_tokens=False)
        made = kind.__new__(kind)
        made._max_input_tokens = settings.max_input_tokens
        made._piece_frames = async_llm._piece_frames(settings)
        made._dtype = self.config.model_config.dtype
        made._vocabulary = self.config.model_config.get_vocab_size()
        made._audio_pad = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
        made._audio_offset = prompt.index(made._audio_pad)
        made._prompt_prefix, made._prompt_suffix = prompt[: made._audio_offset], prompt[made._audio_offset + 1 :]
        return made

    def _scheduler(self, blocks: int) -> Any:
        from vllm.v1 import kv_cache_interface as kv  # noqa: PLC0415

        self.config.cache_config.num_gpu_blocks = blocks
        group = kv.KVCacheGroupSpec(
            ["layer"], kv.FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.bfloat16)
        )
        return self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=kv.KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
            structured_output_manager=Mock(),
            block_size=BLOCK,
            log_stats=True,
        )

    def _runner(self, model: Any) -> Any:
        from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache  # noqa: PLC0415
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: PLC0415
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState  # noqa: PLC0415
        from vllm.v1.worker.gpu.states import RequestState  # noqa: PLC0415

        cpu = torch.device("cpu")
        runner = GPUModelRunner.__new__(GPUModelRunner)
        runner.encoder_cache = EncoderCache()
        runner.model_state = DefaultModelState(self.config, model, runner.encoder_cache, cpu)
        runner.req_states = RequestState(
            max_num_reqs=self.config.scheduler_config.max_num_seqs,
            max_model_len=self.config.model_config.max_model_len,
            max_num_batched_tokens=self.config.scheduler_config.max_num_batched_tokens,
            num_speculative_steps=0,
            vocab_size=self.config.model_config.get_vocab_size(),
            device=cpu,
        )
        runner.sampler = Mock(penalties_state=SimpleNamespace(output_bin_counts=None))
        runner.lora_state = runner.block_tables = runner.prompt_logprobs_worker = Mock()
        runner.pooling_runner = runner.adaptive_verification = runner.pp_handler = runner.pcp_manager = None
        runner.kv_block_zeroer = None
        runner.is_last_pp_rank, runner.use_pp, runner.decode_query_len = True, False, 1
        return runner

    def generate(self, clips: dict[str, int], output_tokens: int) -> dict[str, Any]:
        from vllm.v1.outputs import ModelRunnerOutput  # noqa: PLC0415
        from vllm.v1.request import Request  # noqa: PLC0415

        from serving.engine.vllm.sampling import sampling_params  # noqa: PLC0415

        sampling = Sampling(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        params = sampling_params(sampling, self.loaded._vocabulary, self.processor.renderer.get_tokenizer().encode)
        for name, seconds in clips.items():
            frames = np.tile(np.arange(seconds * 100, dtype=np.float32), (128, 1))
            made = self.loaded._input(f"{name}-0", Features(frames, seconds * 16_000))
            core = self.processor.process_inputs(name, made, params, supported_tasks=("generate",))
            self.scheduler.add_request(Request.from_engine_core_request(core, None))
        self.requests = dict(self.scheduler.requests)
        seen: dict[str, Any] = {
            "steps": 0,
            "preempted": 0,
            "resumed_with_output": 0,
            "embeddings": 0,
            "wrong": [],
            "finished": [],
        }
        message_bytes, encoder_tokens = [0], [0]
        while self.scheduler.requests and seen["steps"] < _MOST_STEPS:
            step = self.scheduler.schedule()
            message_bytes.append(len(pickle.dumps(step)))
            encoder_tokens.append(
                sum(
                    self.requests[name].mm_features[i].mm_position.length
                    for name, items in step.scheduled_encoder_inputs.items()
                    for i in items
                )
            )
            seen["steps"] += 1
            seen["preempted"] += len(step.preempted_req_ids or ())
            seen["resumed_with_output"] += sum(
                len(each.prefill_token_ids) > len(each.prompt_token_ids) for each in step.scheduled_new_reqs
            )
            names = self._compute(step, seen)
            sampled = [[] if self.requests[name].is_prefill_chunk else [SAMPLED] for name in names]
            self.scheduler.update_from_output(
                step,
                ModelRunnerOutput(
                    req_ids=names,
                    req_id_to_index={name: i for i, name in enumerate(names)},
                    sampled_token_ids=sampled,
                ),
            )
        seen["finished"] = sorted(
            name for name, each in self.requests.items() if each.num_output_tokens == output_tokens
        )
        seen["largest_message_bytes"] = max(message_bytes)
        seen["later_message_bytes"] = max(sorted(message_bytes)[: -len(clips) - seen["preempted"]])
        seen["most_encoder_tokens"] = max(encoder_tokens)
        # A step without work frees what the last one finished.
        step = self.scheduler.schedule()
        self.runner.finish_requests(step)
        self.runner.free_states(step)
        seen["left_over"] = [
            len(self.runner.encoder_cache.mm_features),
            sum(map(len, self.runner.encoder_cache.encoder_outputs.values())),
            len(self.runner.req_states.req_id_to_index),
        ]
        return seen

    def _compute(self, step: Any, seen: dict[str, Any]) -> list[str]:
        """Do what V2 does before and after the model, and compare with what the requests say."""
        from vllm.v1.worker.gpu.input_batch import prepare_prefill_inputs  # noqa: PLC0415

        runner, state = self.runner, self.runner.req_states
        runner.finish_requests(step)
        runner.free_states(step)
        runner.add_requests(step)
        runner.update_requests(step)
        if not step.total_num_scheduled_tokens:
            return []
        batch, _ = runner.gather_batch_req_state(step, dummy_run=False)
        runner.model_state.execute_mm_encoder(step.scheduled_encoder_inputs)
        counts, index = batch.num_scheduled_tokens, batch.idx_mapping_np
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        computed = state.num_computed_tokens_np[index].copy()
        embeddings, is_audio = runner.model_state.encoder_runner.gather_mm_embeddings(
            batch.req_ids, batch.num_tokens, counts, starts, batch.prefill_len_np, computed
        )
        mapping, locations = torch.from_numpy(index.astype(np.int64)), torch.from_numpy(starts)
        runner.model_state.rope_state.prepare_positions(
            mapping, locations, state.prefill_len.gpu, state.num_computed_tokens.gpu
        )
        positions = runner.model_state.rope_state.get_positions(batch.num_tokens)
        ids = torch.zeros(batch.num_tokens, dtype=torch.int32)
        prepare_prefill_inputs(
            ids,
            state.next_prefill_tokens,
            mapping,
            locations,
            state.all_token_ids.gpu,
            state.prefill_len.gpu,
            state.num_computed_tokens.gpu,
        )
        rows = torch.cat(embeddings) if embeddings else torch.zeros(0, self._width)
        seen["embeddings"] += len(rows)
        expected_rows, expected_audio = [], []
        for i, name in enumerate(batch.req_ids):
            request, first, last = self.requests[name], int(computed[i]), int(computed[i] + counts[i])
            span = slice(starts[i], starts[i + 1])
            if not (positions[:, span] == torch.arange(first, last)).all():
                seen["wrong"].append(f"positions of {name} at {first}")
            tokens = list(request._all_token_ids[first:last])
            if batch.is_prefilling_np[i] and ids[span].tolist() != tokens:
                seen["wrong"].append(f"tokens of {name} at {first}")
            expected_audio += [token == self.loaded._audio_pad for token in tokens]
            expected_rows += _rows(request, first, last)
        if is_audio.tolist() != expected_audio:
            seen["wrong"].append("mask")
        if rows[:, :2].tolist() != expected_rows:
            seen["wrong"].append("embeddings")
        sampled = [0 if self.requests[name].is_prefill_chunk else 1 for name in batch.req_ids]
        runner.postprocess_sampled(
            mapping,
            torch.full((len(sampled), 1), SAMPLED, dtype=torch.int64),
            torch.tensor(sampled, dtype=torch.int32),
            torch.zeros(len(sampled), dtype=torch.int32),
            locations,
        )
        return list(batch.req_ids)


def _rows(request: Any, first: int, last: int) -> list[list[float]]:
    """Return the embeddings of the audio tokens in [first, last)."""
    found, frame = [], 0
    for feature in request.mm_features:
        place = feature.mm_position
        found += [
            [float(frame), float(token - place.offset)]
            for token in range(max(first, place.offset), min(last, place.offset + place.length))
        ]
        frame += int(feature.data["audio_feature_lengths"].data)
    return found
