"""vLLM 0.32 with the captioner loaded; its input is log-mel features.

vLLM computes features from a waveform on one thread of this process, under this process's GIL. Our audio workers have
computed them already, so a request is sent as vLLM's own preprocessing would have left it (its "engine input": expanded
prompt, features, placeholder range), and none of that preprocessing runs. A test compares our input with vLLM's own for
the same clip, so that an upgrade which changes it is noticed. Figures: deploy/adr/0001-precomputed-features.md.

From a client vLLM receives only features and checked sampling parameters: no text, URL, media id, cache salt or
processor argument. Prefix and processor caches are off: each audio is new, so they would only spend memory, and no
tenant can infer from their timing what another tenant sent.

Only the modules of this package import vLLM; vLLM's processes import them too. tests/compat/test_vllm.py asserts that
every name of vLLM that they use exists; deploy/upgrading.md lists these names.
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
from typing import TYPE_CHECKING

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
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from serving.engine.base import PROMPT_TOKENS, EngineDelta, audio_tokens
from serving.engine.vllm.engine_args import checked, refusals_named
from serving.engine.vllm.executor import InProcessExecutor, MultiGpuExecutor
from serving.engine.vllm.model import profiled_audio_tokens
from serving.engine.vllm.sampling import sampling_params, token_logprobs
from serving.engine.vllm.scheduler import AsyncLongAudioScheduler, LongAudioScheduler
from serving.engine.vllm.step_counter import StepCounter, stat_loggers
from serving.engine.vllm.stop_sequences import StopSequences
from serving.errors import AudioTooLong, EngineFailed, InvalidRequest
from serving.observability.context import TRACE
from serving.types import Features, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from serving.config import Settings
    from serving.types import Sampling

PROMPT = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
"""The chat template's rendering of one user message that is one audio and nothing else."""

_AUDIO_PAD = "<|audio_pad|>"
"""Placeholder in the prompt, once per audio token."""

_FRAMES_PER_S = 100
_WINDOW_FRAMES = 800
"""Window of 8 s within which the audio tower attends: a piece that ends with one is encoded as in the whole audio."""
LONG_FRAMES = 4 * _WINDOW_FRAMES
"""Longest audio that is sent in one piece. Longer audios yield to others in each step. The model is trained on 30 s."""

UNQUANTIZED = ("*.mlp.gate", "*audio_tower*", "*lm_head")
"""Modules that keep their number format under `quantization`, as patterns of vLLM's module names.

The routers (`mlp.gate`) choose 8 of 128 experts by small differences, and are 0.04 % of the parameters. vLLM leaves the
tower and `lm_head` as they are today; here they are named so that an upgrade does not change it.
"""

_LOOPED = "repetition"
_FINISH_REASONS = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH, _LOOPED: FinishReason.STOP}


class LoadedModel:
    """The captioner, loaded in vLLM's own process. The constructor returns when the model is loaded.

    Raises what vLLM raises if it cannot load.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_input_tokens = settings.max_input_tokens
        self._piece_frames = _piece_frames(settings)
        self._ids = itertools.count()
        config = engine_config(settings)
        self._counter = StepCounter()
        with _interrupts_blocked(), _allocator_keeps_memory():
            self._llm = AsyncLLM.from_vllm_config(
                config,
                stat_loggers=stat_loggers(self._counter, vllm_metrics=settings.vllm_metrics),
                disable_log_stats=not settings.vllm_metrics,
            )
        self.gpus = 0 if current_platform.is_cpu() else settings.tensor_parallel
        tokenizer = self._llm.renderer.get_tokenizer()
        self._encode = partial(tokenizer.encode, add_special_tokens=False)
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._dtype = self._llm.model_config.dtype
        self._vocabulary = self._llm.model_config.get_vocab_size()
        prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
        self._audio_pad = tokenizer.convert_tokens_to_ids(_AUDIO_PAD)
        self._audio_offset = prompt.index(self._audio_pad)
        self._prompt_prefix, self._prompt_suffix = prompt[: self._audio_offset], prompt[self._audio_offset + 1 :]
        ends = self._llm.input_processor.generation_config_fields.get("eos_token_id", [])
        self.kv_capacity_tokens = self._kv_capacity_tokens(settings.max_num_seqs)
        self._end_of_turn = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}

    def _kv_capacity_tokens(self, captions: int) -> int:
        """Return the tokens of context that fit at once, divided among `captions` in any way.

        The cache is allocated in blocks, so each caption may waste most of a block; vLLM reserves one block for itself,
        and refuses to start if the longest context does not fit.
        """
        cache = self._llm.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks - 1 - captions) * cache.block_size
        return int(max(tokens, self._llm.model_config.max_model_len))

    @property
    def steps(self) -> int:
        """See `Engine`."""
        return self._counter.steps

    @property
    def dead(self) -> bool:
        """True once the process that runs the model has died."""
        return bool(self._llm.errored)

    async def close(self) -> None:
        """Stop the processes, which takes seconds; running captions raise `EngineFailed`."""
        # The tasks that wait for the engine stop first, or vLLM would take the shutdown for a failure and log it.
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
        self._llm.output_processor.propagate_error(EngineDeadError())
        # The context ends in another thread; until the sockets are closed here, the event loop would still read them.
        resources, loop = self._llm.engine_core.resources, asyncio.get_running_loop()
        for socket in (resources.output_socket, resources.input_socket):
            if socket is not None and not socket.closed:
                loop.remove_reader(socket.FD)
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        resources = self._llm.engine_core.resources
        self._llm.shutdown()
        # vLLM leaves these to the end of the interpreter.
        for process in resources.engine_manager.processes:
            process.join()
        resources.ctx.term()

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
        stops = StopSequences(
            sampling.stop_token_sequences,
            self._decode,
            include=sampling.include_stop,
            min_tokens=sampling.min_tokens,
        )
        finish_reason: FinishReason | None = None
        try:
            # Not `generate`: it would keep the features until the last token; and cancelled while it sends the request,
            # it would leave the request running.
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
                # The end-of-turn token is no part of the caption.
                ended = finish_reason is FinishReason.STOP and not sampling.ignore_eos
                uncounted = ended and bool(tokens) and tokens[-1] in self._end_of_turn
                yield EngineDelta(
                    text,
                    len(tokens) - uncounted,
                    finish_reason,
                    input_tokens=input_tokens,
                    uncounted_tokens=int(uncounted),
                    looped=output.finish_reason == _LOOPED,
                    logprobs=token_logprobs(output.logprobs, tokens[: len(tokens) - uncounted], sampling.logprobs),
                )
                input_tokens = 0
        except VLLMClientError as error:
            raise InvalidRequest(str(error)) from error
        except VLLMServerError as error:
            raise EngineFailed from error
        finally:
            # Does nothing for a finished request, or when the process has died.
            await self._llm.abort(own_id)

    def _params(self, sampling: Sampling) -> SamplingParams:
        return sampling_params(sampling, self._vocabulary, self._encode)

    def _input(self, own_id: str, features: Features) -> MultiModalInput:
        """Return the result of vLLM's own preprocessing for the clip. Raises `AudioTooLong`.

        Only features that are sent in pieces are copied.
        """
        frames = features.log_mel.shape[1]
        tokens = audio_tokens(frames)
        if len(self._prompt_prefix) + tokens + len(self._prompt_suffix) > self._max_input_tokens:
            raise AudioTooLong
        log_mel = torch.from_numpy(features.log_mel).to(self._dtype)
        piece = self._piece_frames if frames > LONG_FRAMES else frames
        # A last piece of less than a second would be encoded without the padding that it has next to full seconds.
        ends = [*range(piece, frames - _FRAMES_PER_S + 1, piece), frames]
        items, ids, ranges, offset = [], [], [], self._audio_offset
        for start, end in itertools.pairwise((0, *ends)):
            length = audio_tokens(end - start)
            # Contiguous memory is sent as it is; vLLM would copy anything else on the event loop.
            items.append(_item(log_mel[:, start:end].contiguous()))
            # The key of the encoder's cache: no two requests share a key.
            ids.append(f"{own_id}@{start}")
            ranges.append(PlaceholderRange(offset=offset, length=length))
            offset += length
        return mm_input(
            [*self._prompt_prefix, *[self._audio_pad] * tokens, *self._prompt_suffix],
            MultiModalKwargsItems({"audio": items}),
            {"audio": ids},
            {"audio": ranges},
        )


def _item(log_mel: torch.Tensor) -> MultiModalKwargsItem:
    """Return features (mel bins, frames) of one piece in vLLM's format."""
    frames = log_mel.shape[1]
    return MultiModalKwargsItem(
        {
            "input_audio_features": MultiModalFieldElem(
                data=log_mel, field=MultiModalFlatField(slices=[(slice(None), slice(0, frames))], dim=1)
            ),
            "audio_feature_lengths": MultiModalFieldElem(
                data=torch.tensor(frames), field=MultiModalBatchedField(keep_on_cpu=True)
            ),
            # vLLM requires the mask and never reads it.
            "feature_attention_mask": MultiModalFieldElem(
                data=torch.ones(frames, dtype=torch.bool), field=MultiModalBatchedField(keep_on_cpu=True)
            ),
        }
    )


def engine_config(settings: Settings) -> VllmConfig:
    """Return vLLM's configuration. On a CPU, also set the number of threads that compute.

    Raises `InvalidEngineArgs` if vLLM refuses the settings' `engine_args`.
    """
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # Threads that wait for each other cost a small model more than they save, and on a busy machine tenfold.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    arguments = checked(settings.engine_args)
    own = {
        "model": settings.model,
        "revision": settings.revision,
        "tokenizer_revision": settings.revision,
        "dtype": _dtype(settings),
        "quantization": settings.quantization,
        "quantization_config": {"ignore": list(UNQUANTIZED)} if settings.quantization else None,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": InProcessExecutor if settings.tensor_parallel == 1 else MultiGpuExecutor,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.step_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.cpu_kv_cache_gib << 30 if on_cpu else None,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        # In one process nothing runs during a step, so this would only delay each token until the next is computed.
        "async_scheduling": False if on_cpu and settings.tensor_parallel == 1 else None,
        "additional_config": {
            "long_audio_tokens": audio_tokens(LONG_FRAMES) + PROMPT_TOKENS,
            "long_tokens_per_step": _long_tokens_per_step(settings),
            "long_tokens_halve": 1_000 if on_cpu else 8_192,
            "cpu_kernels": _cpu_kernels(settings),
        },
        # An "audio" of vLLM is a piece of an audio. vLLM counts them only in its own preprocessing.
        "limit_mm_per_prompt": {"audio": 1, "image": 0, "video": 0},
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "disable_log_stats": not settings.vllm_metrics,
        "otlp_traces_endpoint": f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else None,
        "use_tqdm_on_load": False,
    }
    with refusals_named(settings.engine_args):
        config = AsyncEngineArgs(**own | arguments).create_engine_config()
    scheduler = config.scheduler_config
    scheduler.scheduler_cls = AsyncLongAudioScheduler if scheduler.async_scheduling else LongAudioScheduler
    scheduler.max_num_encoder_input_tokens = max(profiled_audio_tokens(settings.step_tokens), audio_tokens(LONG_FRAMES))
    return config


def _cpu_kernels(settings: Settings) -> bool:
    """Return the setting `cpu_kernels` or its default; False without a CPU build of vLLM."""
    chosen = settings.is_embedded if settings.cpu_kernels is None else settings.cpu_kernels
    return chosen and current_platform.is_cpu()


def _long_tokens_per_step(settings: Settings) -> int:
    """Return the tokens of long audios in a step: at most half of it, because running captions need the rest."""
    wanted = settings.long_tokens_per_step or (416 if current_platform.is_cpu() else 2048)
    return min(wanted, settings.step_tokens // 2)


def _piece_frames(settings: Settings) -> int:
    """Return the frames of a piece: about as many as one step takes, in full windows.

    A larger piece would delay other captions by encoding more than the step reads; and there is no need for one, since
    pieces that fall into one step are encoded together.
    """
    windows = _long_tokens_per_step(settings) // audio_tokens(_WINDOW_FRAMES)
    return min(max(1, windows) * _WINDOW_FRAMES, LONG_FRAMES)


def _dtype(settings: Settings) -> str:
    """Return the number format; for `auto` the checkpoint's own, because vLLM's `auto` would halve float32."""
    config = Path(settings.model, "config.json")
    if settings.dtype != "auto" or not config.is_file():
        return settings.dtype
    return str(json.loads(config.read_text()).get("dtype", "auto"))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it goes to the whole terminal, and running captions must finish."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _allocator_keeps_memory() -> Iterator[None]:
    """Start processes whose allocator (glibc's) keeps freed memory, on a machine without GPU.

    A step takes hundreds of MB for the clips that it encodes, by default in mappings that are released after the step
    and faulted in again in the next step, page by page (deploy/adr/0004).
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)} if current_platform.is_cpu() else {}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
