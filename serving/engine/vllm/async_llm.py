"""vLLM 0.32 with the captioner loaded, fed with log-mel features.

Only this, `executor.py`, `scheduler.py`, `thinker.py` and `cpu_layers.py` import vLLM, the others in its processes too.

vLLM turns a waveform into features on one thread of this process, under this process's GIL. Our audio workers have made
them already, so a request is handed over as vLLM's own preprocessing would have left it (its "engine input": expanded
prompt, features, placeholder range), and none of that preprocessing runs. A test holds our input against vLLM's own for
the same clip, so that an upgrade which changes it is noticed. Figures: deploy/adr/0001-precomputed-features.md.

Nothing that a client made reaches vLLM but features and checked sampling parameters: no text, URL, media id, cache salt
or processor argument. Prefix and processor caches are off: each audio is new, so they would only spend memory, and no
tenant can learn from their timing what another one sent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError, VLLMServerError
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from serving.engine.base import PROMPT_TOKENS, EngineDelta, audio_tokens
from serving.engine.vllm.executor import SoloExecutor, TeamExecutor
from serving.engine.vllm.scheduler import LongAudioYields, LongAudioYieldsAsync
from serving.engine.vllm.stop_sequences import StopSequences
from serving.errors import AudioTooLong, EngineFailed, InvalidRequest
from serving.observability.context import TRACE
from serving.types import Features, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from vllm.config import VllmConfig

    from serving.config import Settings
    from serving.types import Sampling

PROMPT = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
"""The chat template's rendering of one user message that is one audio and nothing else."""

_AUDIO_PAD = "<|audio_pad|>"
"""Stands in the prompt once per audio token."""

_MEL_BINS = 128
_FRAMES_PER_S = 100
_WINDOW_FRAMES = 800
"""The audio tower attends within windows of 8 s: what ends with one is encoded the same alone as in the whole."""
LONG_FRAMES = 4 * _WINDOW_FRAMES
"""Longer audios are handed over in pieces, and yield to others in each step. The model is trained on 30 s."""

_MIN_TEMPERATURE = 0.01
"""vLLM raises anything lower but 0 to this, and logs a warning each time."""

_FINISH_REASONS = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class LoadedModel:
    """The captioner, loaded in vLLM's own process. Making one takes as long as loading takes.

    Raises whatever vLLM raises if it cannot load.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_input_tokens = settings.max_input_tokens
        self._piece_frames = _piece_frames(settings)
        self._ids = itertools.count()
        config = engine_config(settings)
        with _deaf_to_interrupts(), _keeping_memory():
            self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=not settings.vllm_metrics)
        self.gpus = 0 if current_platform.is_cpu() else settings.tensor_parallel
        self.steps = 0
        self._count_steps()
        tokenizer = self._llm.renderer.get_tokenizer()
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._dtype = self._llm.model_config.dtype
        self._vocabulary = self._llm.model_config.get_vocab_size()
        prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
        self._audio_pad = tokenizer.convert_tokens_to_ids(_AUDIO_PAD)
        self._audio_offset = prompt.index(self._audio_pad)
        self._head, self._tail = prompt[: self._audio_offset], prompt[self._audio_offset + 1 :]
        ends = self._llm.input_processor.generation_config_fields.get("eos_token_id", [])
        self.kv_capacity_tokens = self._kv_capacity_tokens(settings.max_num_seqs)
        self._end_of_turn = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}

    def _kv_capacity_tokens(self, captions: int) -> int:
        """Tokens of context that fit at once, divided among so many captions in any way.

        The cache is handed out in blocks, so each caption may waste most of one; vLLM keeps one block for itself. It
        refuses to start if the longest context does not fit.
        """
        cache = self._llm.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks - 1 - captions) * cache.block_size
        return int(max(tokens, self._llm.model_config.max_model_len))

    @property
    def dead(self) -> bool:
        """Whether the process that runs the model has died."""
        return bool(self._llm.errored)

    async def close(self) -> None:
        """End the processes, which takes seconds; what runs raises `EngineFailed`."""
        # First what waits for the engine, lest vLLM takes the end for a failure and logs it.
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
        self._llm.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        resources = self._llm.engine_core.resources
        self._llm.shutdown()
        # vLLM leaves these to the end of the program.
        for process in resources.engine_manager.processes:
            process.join()
        resources.ctx.term()

    def silence(self) -> Features:
        """Features of half a second of nothing."""
        return Features(np.full((_MEL_BINS, 50), -1.5, np.float32), samples=8000)

    async def generate(self, request_id: str, features: Features, sampling: Sampling) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        own_id = f"{request_id}-{next(self._ids)}"
        params = self._params(sampling)
        if features.log_mel.shape[1] > LONG_FRAMES:
            # Copies of up to 123 MB, for which the event loop, and so every caption, would wait.
            engine_input = await asyncio.to_thread(self._input, own_id, features)
        else:
            engine_input = self._input(own_id, features)
        input_tokens = len(engine_input["prompt_token_ids"])
        stops = StopSequences(sampling.stop_token_sequences, self._decode)
        finish_reason: FinishReason | None = None
        try:
            # Not `generate`: it would keep the features until the last token; and cancelled while it hands the request
            # over, it would leave it running.
            queue = await self._llm.add_request(own_id, engine_input, params, trace_headers=TRACE.get())
            del engine_input, features
            while finish_reason is None:
                output = (queue.get_nowait() or await queue.get()).outputs[0]
                if output.finish_reason not in _FINISH_REASONS:
                    raise EngineFailed
                finish_reason = _FINISH_REASONS[output.finish_reason]
                text, tokens = output.text, output.token_ids
                if sampling.stop_token_sequences:
                    text, finish_reason = stops.feed(text, tokens, finish_reason)
                # A turn that ends by itself ends with a token that is no part of the caption.
                ended = finish_reason is FinishReason.STOP and not sampling.ignore_eos
                uncounted = ended and bool(tokens) and tokens[-1] in self._end_of_turn
                yield EngineDelta(
                    text,
                    len(tokens) - uncounted,
                    finish_reason,
                    input_tokens=input_tokens,
                    uncounted_tokens=int(uncounted),
                )
                input_tokens = 0
        except VLLMClientError as error:
            raise InvalidRequest(str(error)) from error
        except VLLMServerError as error:
            raise EngineFailed from error
        finally:
            # Does nothing for a request that has finished by itself, or when the process has died.
            await self._llm.abort(own_id)

    def _count_steps(self) -> None:
        """Count what the engine tells: once a step (`scheduler.py` sees to it), even if no caption has got a token."""
        client: Any = self._llm.engine_core
        told = client.get_output_async

        async def counted() -> Any:
            outputs = await told()
            self.steps += 1
            return outputs

        client.get_output_async = counted

    def _params(self, sampling: Sampling) -> SamplingParams:
        ids = [*sampling.stop_token_ids, *itertools.chain.from_iterable(sampling.stop_token_sequences)]
        if any(not 0 <= token_id < self._vocabulary for token_id in ids):
            raise InvalidRequest(f"Token ids in stop must be in [0, {self._vocabulary - 1}].", param="stop")
        if not all(sampling.stop) or not all(sampling.stop_token_sequences):
            raise InvalidRequest("An element of stop must not be empty.", param="stop")
        try:
            return SamplingParams(
                temperature=sampling.temperature if sampling.temperature >= _MIN_TEMPERATURE else 0.0,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                stop=list(sampling.stop),
                stop_token_ids=list(sampling.stop_token_ids),
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
                ignore_eos=sampling.ignore_eos,
                output_kind=RequestOutputKind.DELTA,
                skip_clone=True,  # it is made for this request alone
            )
        except VLLMClientError as error:
            raise InvalidRequest(str(error)) from error

    def _input(self, own_id: str, features: Features) -> MultiModalInput:
        """What vLLM's own preprocessing would make of the clip. Raises `AudioTooLong`.

        Only features that are handed over in pieces are copied.
        """
        frames = features.log_mel.shape[1]
        tokens = audio_tokens(frames)
        if len(self._head) + tokens + len(self._tail) > self._max_input_tokens:
            raise AudioTooLong
        log_mel = torch.from_numpy(features.log_mel).to(self._dtype)
        piece = self._piece_frames if frames > LONG_FRAMES else frames
        # A last piece of less than a second would be encoded without the padding that it has beside whole seconds.
        ends = [*range(piece, frames - _FRAMES_PER_S + 1, piece), frames]
        items, ids, ranges, offset = [], [], [], self._audio_offset
        for start, end in itertools.pairwise((0, *ends)):
            length = audio_tokens(end - start)
            # In one piece of memory, which vLLM hands over as it is; anything else it would copy on the event loop.
            items.append(_item(log_mel[:, start:end].contiguous()))
            # The key of the encoder's cache: no two requests share it.
            ids.append(f"{own_id}@{start}")
            ranges.append(PlaceholderRange(offset=offset, length=length))
            offset += length
        return mm_input(
            [*self._head, *[self._audio_pad] * tokens, *self._tail],
            MultiModalKwargsItems({"audio": items}),
            {"audio": ids},
            {"audio": ranges},
        )


def _item(log_mel: torch.Tensor) -> MultiModalKwargsItem:
    """Features (mel bins, frames) of one piece, as vLLM wants them."""
    frames = log_mel.shape[1]
    return MultiModalKwargsItem(
        {
            "input_audio_features": MultiModalFieldElem(
                data=log_mel, field=MultiModalFlatField(slices=[(slice(None), slice(0, frames))], dim=1)
            ),
            "audio_feature_lengths": MultiModalFieldElem(
                data=torch.tensor(frames), field=MultiModalBatchedField(keep_on_cpu=True)
            ),
            # Nothing reads it, but it must be there.
            "feature_attention_mask": MultiModalFieldElem(
                data=torch.ones(frames, dtype=torch.bool), field=MultiModalBatchedField(keep_on_cpu=True)
            ),
        }
    )


def engine_config(settings: Settings) -> VllmConfig:
    """What vLLM is started with. On the CPU it also sets how many threads compute."""
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # Threads that wait for each other cost a small model more than they give it, and on a busy machine tenfold.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    config = AsyncEngineArgs(
        model=settings.model,
        dtype=_dtype(settings),
        quantization=settings.quantization,
        tensor_parallel_size=settings.tensor_parallel,
        distributed_executor_backend=SoloExecutor if settings.tensor_parallel == 1 else TeamExecutor,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.step_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory_bytes=settings.cpu_kv_cache_gib << 30 if on_cpu else None,
        enforce_eager=on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        # In one process nothing runs beside a step, so this would only hold each token back until the next is computed.
        async_scheduling=False if on_cpu and settings.tensor_parallel == 1 else None,
        additional_config={
            "long_audio_tokens": audio_tokens(LONG_FRAMES) + PROMPT_TOKENS,
            "long_tokens_per_step": _long_tokens_per_step(settings),
            "long_tokens_halve": 1_000 if on_cpu else 8_192,
        },
        # By audio vLLM means a piece of one. It counts them only in its own preprocessing.
        limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        disable_log_stats=not settings.vllm_metrics,
        otlp_traces_endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else None,
        use_tqdm_on_load=False,
    ).create_engine_config()
    scheduler = config.scheduler_config
    scheduler.scheduler_cls = LongAudioYieldsAsync if scheduler.async_scheduling else LongAudioYields
    return config


def _long_tokens_per_step(settings: Settings) -> int:
    """At most half of a step: captions that run need the rest."""
    wanted = settings.long_tokens_per_step or (416 if current_platform.is_cpu() else 2048)
    return min(wanted, settings.step_tokens // 2)


def _piece_frames(settings: Settings) -> int:
    """About as much as one step takes, in whole windows: what a step encodes beyond that, others wait for in vain.

    There is no need for larger ones: pieces that fall into one step are encoded together.
    """
    windows = _long_tokens_per_step(settings) // audio_tokens(_WINDOW_FRAMES)
    return min(max(1, windows) * _WINDOW_FRAMES, LONG_FRAMES)


def _dtype(settings: Settings) -> str:
    """The checkpoint's own number format where the settings ask for it: vLLM's `auto` would halve float32."""
    config = Path(settings.model, "config.json")
    if settings.dtype != "auto" or not config.is_file():
        return settings.dtype
    return str(json.loads(config.read_text()).get("dtype", "auto"))


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it goes to the whole terminal, and running captions shall finish."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _keeping_memory() -> Iterator[None]:
    """Start processes whose allocator (glibc's) keeps what it has on a machine without GPU.

    A step takes hundreds of MB for the clips that it encodes, by default in mappings that are given back after it and
    faulted in anew in the next one, page by page (deploy/adr/0004).
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)} if current_platform.is_cpu() else {}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
