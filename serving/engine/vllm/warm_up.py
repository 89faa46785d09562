"""Captions of silence before an engine counts as ready, so that no caller waits for one-time work.

vLLM captures CUDA graphs for the numbers of tokens of a step before this. What it leaves to the first requests: kernels
that are compiled when a shape or a kind of sampling first occurs, in the audio tower, the experts and the sampler. On a
CPU the first caption is all that there is.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serving.engine.base import PROMPT_TOKENS, audio_tokens
from serving.types import Features, Sampling

if TYPE_CHECKING:
    from serving.config import Settings
    from serving.engine.vllm.async_llm import LoadedModel

_MEL_BINS, _FRAMES_PER_S, _SAMPLES_PER_FRAME = 128, 100, 160
_SILENCE = -1.5
_CLIP_S, _LONG_S = 30, 300
_FIRST_FRAMES = 50

SAMPLING = (
    Sampling(max_tokens=4),
    Sampling(max_tokens=4, temperature=0.0),
    Sampling(max_tokens=4, seed=1, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1),
)
"""Kinds of sampling with separate kernels."""


@dataclass(frozen=True, slots=True)
class Round:
    """Captions at the same time: the frames of each clip."""

    frames: tuple[int, ...]
    sampling: tuple[Sampling, ...] = field(default=SAMPLING)


def rounds(settings: Settings, *, on_gpu: bool) -> list[Round]:
    """Return the captions in the order in which they are made.

    On a GPU: one of each kind of sampling; 1, 2, 4, … up to `max_num_seqs` captions at a time; clips of 30 s that fill
    a step; one audio that is sent in pieces. None is longer than `max_input_tokens` allows.
    """
    first = Round((_FIRST_FRAMES,), (Sampling(max_tokens=2),))
    if not on_gpu:
        return [first]
    sizes = [1 << power for power in range(settings.max_num_seqs.bit_length()) if 1 << power < settings.max_num_seqs]
    clip, long = (min(seconds * _FRAMES_PER_S, _longest_frames(settings)) for seconds in (_CLIP_S, _LONG_S))
    in_a_step = max(1, min(settings.max_num_seqs, settings.step_tokens // (audio_tokens(clip) + PROMPT_TOKENS)))
    return [
        first,
        *(Round((_FIRST_FRAMES,), (sampling,)) for sampling in SAMPLING),
        *(Round((_FRAMES_PER_S,) * count) for count in (*sizes, settings.max_num_seqs)),
        Round((clip,) * in_a_step),
        Round((long,)),
    ]


def _longest_frames(settings: Settings) -> int:
    """Return the frames of the longest audio that the settings admit, in full seconds; a second at least."""
    seconds = max(1, (settings.max_input_tokens - PROMPT_TOKENS) // audio_tokens(_FRAMES_PER_S))
    return seconds * _FRAMES_PER_S


async def warm_up(model: LoadedModel, settings: Settings) -> None:
    """Make the captions. Raises what the engine raises: one that cannot generate is not ready."""
    for number, each in enumerate(rounds(settings, on_gpu=model.gpus > 0)):
        async with asyncio.TaskGroup() as group:
            for index, frames in enumerate(each.frames):
                sampling = each.sampling[index % len(each.sampling)]
                group.create_task(_caption(model, f"start-{number}-{index}", frames, sampling))


async def _caption(model: LoadedModel, name: str, frames: int, sampling: Sampling) -> None:
    features = Features(np.full((_MEL_BINS, frames), _SILENCE, np.float32), samples=frames * _SAMPLES_PER_FRAME)
    async with aclosing(model.generate(name, features, sampling)) as deltas:
        async for _ in deltas:
            pass
