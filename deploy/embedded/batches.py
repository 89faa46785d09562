"""Training batches: clips of similar length from the corpus, as input tensors of the model and the helper heads."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deploy.embedded.corpus.captions import (
    INSTRUMENTS,
    LANGUAGES,
    MANNERS,
    SOUNDS,
    SPEAKERS,
    Event,
    Facts,
    caption,
    stated_rate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import Qwen2Tokenizer

MEL = 128
KINDS = tuple(sorted({*SOUNDS, *INSTRUMENTS, *SPEAKERS, "person"}))
RATES = (1.0, 4 / 3, 1.5, 5 / 3, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
LEVELS = ("quiet", "moderate", "loud")
NOISES = ("none", "faint", "strong")
IGNORED = -100
TOKENS_PER_S = 13
FRAMES_PER_S = 100
LONGEST_FRAMES = 3_000
RANGE = 2.0
"""Range of the features below their maximum: 80 dB in their unit."""


@dataclass(frozen=True)
class Clip:
    """A training clip: position of its features in the shard, and its facts."""

    shard: int
    first_frame: int
    frames: int
    facts: Facts
    spans_s: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Batch:
    """Inputs of one training step.

    `features` [128, frames of all clips], `lengths` frames of each; `input_ids` and `labels` [clips, tokens]. For
    each audio token of all clips: `kinds` [tokens, kinds] multi-hot; `language`, `manner`, `rate` class numbers or
    -100; `beating` number of its event with a rate, or -100. For each event with a rate: `beats`, its rate per second.
    For each clip: `recording` [clips, 4], classes of loudness, noise, room, clipping.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    language: torch.Tensor
    manner: torch.Tensor
    rate: torch.Tensor
    beating: torch.Tensor
    beats: torch.Tensor
    recording: torch.Tensor


def read_facts(entry: dict[str, object]) -> Facts:
    """Return the facts of an entry of the corpus."""
    named = {name: entry[name] for name in ("duration_s", "overlap", "loudness", "noise", "reverberant", "clipped")}
    return Facts(events=tuple(Event(**event) for event in entry["events"]), **named)  # type: ignore[attr-defined,arg-type]


def audio_tokens(frames: int) -> int:
    """Return the audio tower's tokens for `frames`: 13 per full second, plus an eighth of the remaining frames."""
    rest = (frames % 100 - 1) // 2 + 1
    return ((rest - 1) // 2 + 1 - 1) // 2 + 1 + frames // 100 * TOKENS_PER_S


class Corpus:
    """All shards in `folder`."""

    def __init__(self, folder: Path, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._shards, self.clips = [], []
        for index, path in enumerate(sorted(folder.glob("*.jsonl"))):
            self._shards.append(np.memmap(path.with_suffix(".f16"), np.float16, "r").reshape(-1, MEL))
            for text in path.read_text().splitlines():
                line = json.loads(text)
                spans = tuple((start, end) for start, end in line["spans_s"])
                self.clips.append(Clip(index, line["first_frame"], line["frames"], read_facts(line), spans))
        ids = tokenizer.encode
        self._before = ids("<|im_start|>user\n<|audio_start|>")
        self._after = ids("<|audio_end|><|im_end|>\n<|im_start|>assistant\n")
        self._audio = ids("<|audio_pad|>")
        self._end = ids("<|im_end|>")

    def epochs(
        self, seed: int, frames_per_batch: int, most_clips: int, longest_frames: int | None = None
    ) -> Iterator[list[Clip]]:
        """Yield clips of similar length, at most `longest_frames`, in endless epochs in an order set by `seed`."""
        rng = np.random.default_rng(seed)
        clips = [clip for clip in self.clips if longest_frames is None or clip.frames <= longest_frames]
        while True:
            order = rng.permutation(len(clips))
            batches: list[list[Clip]] = []
            for start in range(0, len(order), 1024):
                some = sorted((clips[i] for i in order[start : start + 1024]), key=lambda clip: clip.frames)
                batch: list[Clip] = []
                for clip in some:
                    if batch and ((len(batch) + 1) * clip.frames > frames_per_batch or len(batch) == most_clips):
                        batches.append(batch)
                        batch = []
                    batch.append(clip)
                batches.append(batch)
            yield from (batches[i] for i in rng.permutation(len(batches)))

    def batch(self, clips: list[Clip], rng: np.random.Generator) -> Batch:
        """Return the tensors of `clips`, each with a random variation (`varied`)."""
        import torch  # noqa: PLC0415 - takes seconds, and `evaluate` needs only the rest of this module

        features, rows, labels, kinds, pieces, lengths = [], [], [], [], [], []
        beats: list[float] = []
        for original in clips:
            first = original.first_frame
            mel, clip = varied(
                np.array(self._shards[original.shard][first : first + original.frames], np.float32), original, rng
            )
            features.append(mel)
            lengths.append(clip.frames)
            tokens = audio_tokens(clip.frames)
            prompt = [*self._before, *self._audio * tokens, *self._after]
            answer = [*self.tokenizer.encode(caption(clip.facts)), *self._end]
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
            hot, classes = _per_token(clip, tokens, beats)
            kinds.append(hot)
            pieces.append(classes)
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        classes = np.concatenate(pieces)
        return Batch(
            torch.from_numpy(np.concatenate(features).T.copy()),
            torch.tensor(lengths),
            torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            torch.tensor([label + [IGNORED] * (width - len(label)) for label in labels]),
            torch.from_numpy(np.concatenate(kinds)),
            *(torch.from_numpy(classes[:, column].copy()) for column in range(4)),
            torch.tensor(beats),
            torch.tensor([_recording(clip.facts) for clip in clips]),
        )


def varied(mel: np.ndarray, clip: Clip, rng: np.random.Generator) -> tuple[np.ndarray, Clip]:
    """Return log-mel [frames, 128] with random tempo, formants, tone colour and band, and the clip with matching facts.

    Without this the model memorizes the clips: it predicted 86 % of the digits of rates in a sample of its training
    clips (given the words before them), but only 31 % of the rates of other clips within 20 %. The pace of speech
    changes only slightly, because captions describe it.
    """
    spoken = any(event.language for event in clip.facts.events)
    tempo, size = (0.05, 0.07) if spoken else (0.22, 0.22)
    frames = int(np.clip(round(clip.frames / np.exp(rng.uniform(-tempo, tempo))), 40, LONGEST_FRAMES))
    faster = clip.frames / frames
    loudest, softest = mel.max(), mel.min()
    mel = _read(mel, np.linspace(0, clip.frames - 1, frames))
    mel = _read(mel.T, _bins(_HZ * np.exp(rng.uniform(-size, size))), softest).T
    mel += np.interp(np.arange(MEL), np.linspace(0, MEL, 6), rng.uniform(-0.15, 0.15, 6)).astype(np.float32)
    if rng.random() < 0.5:
        mel += rng.standard_normal(mel.shape, np.float32) * np.float32(rng.uniform(0, 0.06))
    mel = np.maximum(mel, softest)
    spans = [(start / faster, end / faster) for start, end in clip.spans_s]
    for _ in range(rng.integers(0, 3)):
        start = rng.integers(0, MEL - 16)
        mel = _without(mel, slice(start, start + rng.integers(4, 16)), softest, spans)
    if rng.random() < 0.4:
        mel = _narrowed(mel, rng, spans)
    mel += loudest - mel.max()  # captions state the level
    mel = np.maximum(mel, min(softest, loudest - RANGE))
    events = tuple(replace(event, rate=event.rate * faster) for event in clip.facts.events)
    return mel, replace(
        clip,
        frames=frames,
        facts=replace(clip.facts, events=events, duration_s=clip.facts.duration_s / faster),
        spans_s=tuple(spans),
    )


def _without(
    mel: np.ndarray, bins: slice, level: np.floating | float, spans_s: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Return `mel` with `bins` at `level`, or `mel` unchanged if that would remove one of the sounds."""
    masked = mel.copy()
    masked[:, bins] = level
    for start, end in spans_s:
        frames = slice(int(start * FRAMES_PER_S), max(int(end * FRAMES_PER_S), int(start * FRAMES_PER_S) + 1))
        if mel[frames].size and masked[frames].max() < mel[frames].max() - RANGE / 4:
            return mel
    return masked


def _narrowed(mel: np.ndarray, rng: np.random.Generator, spans_s: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return `mel` without bins above an edge and sometimes without the lowest bins, like codings and microphones."""
    top = int(_bins(rng.choice((3_400, rng.uniform(3_400, 8_000)))))
    mel = _without(mel, slice(top, MEL), -np.inf, spans_s)
    if rng.random() < 0.3:
        mel = _without(mel, slice(0, int(rng.integers(3, 13))), -np.inf, spans_s)
    return mel


_MEL_1K = 15.0


def _mels(hz: np.ndarray | float) -> np.ndarray:
    """Convert Hz to Slaney's mel scale: linear to 1 kHz, then 27 steps per factor of 6.4."""
    return np.where(
        np.less(hz, 1_000),
        np.multiply(hz, _MEL_1K / 1_000),
        _MEL_1K + 27 * np.log(np.maximum(hz, 1_000) / 1_000) / np.log(6.4),
    )


def _bins(hz: np.ndarray | float) -> np.ndarray:
    """Return the log-mel bins, from 0, whose filters are centred at the frequencies `hz`."""
    return _mels(hz) / _mels(8_000) * (MEL + 1) - 1


_HZ = np.interp(np.arange(MEL), _bins(np.arange(0, 8_001.0)), np.arange(0, 8_001.0))
"""Centre frequency of each bin in Hz."""


def _read(rows: np.ndarray, at: np.ndarray, beyond: float | None = None) -> np.ndarray:
    """Return `rows` interpolated at fractional positions; `beyond` is the value after the last row."""
    below = np.clip(at.astype(int), 0, max(len(rows) - 2, 0))
    share = np.clip(at - below, 0, 1)[:, None].astype(np.float32)
    read = rows[below] * (1 - share) + rows[np.minimum(below + 1, len(rows) - 1)] * share
    if beyond is not None:
        read[at > len(rows) - 0.5] = beyond
    return read


def _per_token(clip: Clip, tokens: int, beats: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return kinds and classes of the clip's audio tokens; append the rates of its events to `beats`."""
    hot = np.zeros((tokens, len(KINDS)), np.float32)
    classes = np.full((tokens, 4), IGNORED, np.int64)
    for event, (start_s, end_s) in zip(clip.facts.events, clip.spans_s, strict=True):
        span = slice(int(start_s * TOKENS_PER_S), max(int(end_s * TOKENS_PER_S), int(start_s * TOKENS_PER_S) + 1))
        hot[span, KINDS.index(event.kind)] = 1
        if event.language:
            classes[span, 0] = LANGUAGES.index(event.language)
            classes[span, 1] = MANNERS.index(event.manner)
        if event.rate:
            rate = stated_rate(event)
            classes[span, 2] = min(range(len(RATES)), key=lambda i: abs(RATES[i] - rate))
            classes[span, 3] = len(beats)
            beats.append(event.rate)
    return hot, classes


def _recording(facts: Facts) -> list[int]:
    return [LEVELS.index(facts.loudness), NOISES.index(facts.noise), int(facts.reverberant), int(facts.clipped)]
