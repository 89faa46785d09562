"""Training of the embedded captioner on the corpus, on the CPU; resumable at any time.

`python -m deploy.embedded.train CACHE --steps N` resumes from CACHE/training.pt and writes CACHE/checkpoint, which
transformers and vLLM load. First the audio tower is trained alone, with helper heads on its audio tokens (kinds,
language, pace, rate, level, noise, room, clipping); trained together with the text model from the start, it recognised
almost nothing after the same number of steps. Then both are trained on the captions, while the weight of the heads
falls to 0; the heads are not saved.

Processes with one thread each share a step's clips and average their gradients, which is faster than one process with
two threads.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from transformers import Qwen2Tokenizer

from deploy.embedded.architecture import Model, build_config, build_model, build_tokenizer, save_checkpoint
from deploy.embedded.batches import (
    IGNORED,
    KINDS,
    LEVELS,
    NOISES,
    RATES,
    TOKENS_PER_S,
    Batch,
    Clip,
    Corpus,
    audio_tokens,
)
from deploy.embedded.corpus.captions import LANGUAGES, MANNERS, caption

if TYPE_CHECKING:
    from collections.abc import Iterator

WARM_UP_STEPS, WEIGHT_DECAY, CLIP_NORM = 150, 0.05, 1.0
FRAMES_PER_BATCH, MOST_CLIPS = 4_000, 40
"""Maximum of a batch of one process."""
SHORT_FRAMES = 400
SAVE_EVERY_S = 180
BEATS_WEIGHT = 0.3
VOCABULARY = 1_024
STEPS = 18_000


@dataclass(frozen=True)
class Plan:
    """Peak learning rate, and the shares of the steps at which phases end.

    `short_until`: only clips up to 4 s, which hold more sounds for the same work. `tower_until`: the tower is trained
    alone. `help_until`: the helper heads have weight.
    """

    peak: float
    short_until: float
    tower_until: float
    help_until: float


FROM_SEEDS, FROM_CHECKPOINT = Plan(1.2e-3, 0.1, 0.4, 0.85), Plan(6e-4, 0.0, 0.0, 0.0)


class HelperHeads(nn.Module):
    """Linear classifiers of the audio tokens, used only to train the tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Linear(width, len(KINDS) + 1)
        self.classes = nn.ModuleList(nn.Linear(width, n) for n in (len(LANGUAGES), len(MANNERS), len(RATES)))
        self.recording = nn.ModuleList(nn.Linear(width, n) for n in (len(LEVELS), len(NOISES), 2, 2))
        self.beats = nn.Linear(width, 1)

    def forward(self, tokens: torch.Tensor, counts: list[int], batch: Batch) -> torch.Tensor:
        """Return the sum of the heads' losses; `tokens` [tokens of all clips, width]."""
        silent = (batch.kinds.sum(1, keepdim=True) == 0).float()
        kinds = torch.cat([batch.kinds, silent], 1)
        loss = functional.cross_entropy(self.kinds(tokens), kinds / kinds.sum(1, keepdim=True))
        for head, target in zip(self.classes, (batch.language, batch.manner, batch.rate), strict=True):
            if (target != IGNORED).any():
                loss = loss + 1.5 * functional.cross_entropy(head(tokens), target, ignore_index=IGNORED)
        means = torch.stack([clip.mean(0) for clip in torch.split(tokens, counts)])
        for index, head in enumerate(self.recording):
            loss = loss + 0.3 * functional.cross_entropy(head(means), batch.recording[:, index])
        return loss

    def beats_loss(self, tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean squared difference of the logarithms of counted and true beats, over events with a rate.

        Each audio token gives a share of a beat, so that the tower learns where a beat begins.
        """
        if not len(batch.beats):
            return tokens.new_zeros(())
        at = batch.beating != IGNORED
        event = batch.beating[at]
        shares = torch.sigmoid(self.beats(tokens[at]).squeeze(1) / 4 - 1.5)
        counted = tokens.new_zeros(len(batch.beats)).index_add(0, event, shares)
        long = torch.bincount(event, minlength=len(batch.beats))
        # Half a beat more than its length contains, because the first beat is at its start.
        beats = batch.beats * long / TOKENS_PER_S + 0.5
        apart = torch.log(counted + 0.1) - torch.log(beats + 0.1)
        return torch.square(apart[long > 0]).mean()


def audio_embeddings(model: Model, batch: Batch) -> torch.Tensor:
    """Return the audio tokens of all clips, [tokens, width]."""
    tokens: torch.Tensor = model.thinker.audio_tower(batch.features, feature_lens=batch.lengths).last_hidden_state
    return tokens


def caption_loss(model: Model, tokens: torch.Tensor, batch: Batch, audio_token_id: int) -> torch.Tensor:
    """Return the cross-entropy of the captions.

    Padding is at the right, so that no token attends to it, and positions are those of plain text, as in vLLM.
    """
    thinker = model.thinker
    embeddings = thinker.model.embed_tokens(batch.input_ids)
    at = (batch.input_ids == audio_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(at, tokens.to(embeddings.dtype))
    hidden = thinker.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    in_caption = batch.labels[:, 1:] != IGNORED
    return functional.cross_entropy(thinker.lm_head(hidden[in_caption]).float(), batch.labels[:, 1:][in_caption])


def learning_rates(step: int, steps: int, plan: Plan) -> tuple[float, float]:
    """Return the rates of audio tower and text model: a linear warm-up, then a cosine down to a fiftieth at the end."""
    first = int(plan.tower_until * steps)
    warm = [min(1.0, (step - since + 1) / WARM_UP_STEPS) if step >= since else 0.0 for since in (0, first)]
    cosine = plan.peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    return cosine * warm[0], cosine * warm[1]


def tokenizer_for(cache: Path, start: Path | None = None) -> Qwen2Tokenizer:
    """Return the tokenizer of the checkpoint `start`, or one trained once on captions of the corpus."""
    folder = cache / "tokenizer"
    if not folder.exists() and start:
        Qwen2Tokenizer.from_pretrained(start).save_pretrained(folder)
    if not folder.exists():
        corpus = Corpus(cache / "train", build_tokenizer(["caption"]))
        captions = [
            caption(clip.facts) for clip in random.Random(0).sample(corpus.clips, min(6_000, len(corpus.clips)))
        ]
        build_tokenizer(captions, VOCABULARY).save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def initialise(model: Model, seed: int = 0) -> None:
    """Set initial weights that keep the scale of their input.

    The library's 0.02 everywhere suits widths of thousands. Here its convolutions would leave only a three-hundredth of
    the sound next to the position embeddings, and all audio tokens would stay alike.
    """
    draw = torch.Generator().manual_seed(seed)
    branches = ("o_proj", "out_proj", "down_proj", "fc2")
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            if weights.ndim < 2 or "visual" in name or "embed_tokens" in name or "lm_head" in name:
                continue
            fan_in = weights.shape[-1] if "experts" in name else weights[0].numel()
            gain = 2**0.5 if "conv2d" in name else 0.4 if any(branch in name for branch in branches) else 1.0
            weights.normal_(0, gain * fan_in**-0.5, generator=draw)
        model.thinker.model.embed_tokens.weight.normal_(0, 0.5, generator=draw)


class Training:
    """Model, helper heads and optimizer, and the number of completed steps."""

    def __init__(self, tokenizer: Qwen2Tokenizer, path: Path, start: Path | None = None) -> None:
        """Resume from the state at `path`, else start from the checkpoint `start`, else from seeds."""
        config = build_config(tokenizer)
        self._path = path
        self._audio_token_id = config.thinker_config.audio_token_id
        self.model = build_model(config)
        initialise(self.model)
        self.plan = FROM_CHECKPOINT if start else FROM_SEEDS
        if start:
            trained = Model.from_pretrained(start, dtype=torch.float32)
            self.model.load_state_dict(trained.state_dict())
        self.model.set_experts_implementation("grouped_mm")
        self.model.train()
        self.heads = HelperHeads(config.thinker_config.text_config.hidden_size)
        named = [(name, weights) for name, weights in self.model.named_parameters() if "visual" not in name]
        tower = [weights for name, weights in named if "audio_tower" in name] + list(self.heads.parameters())
        text_model = [weights for name, weights in named if "audio_tower" not in name]
        self._parts = [[w for w in tower if w.requires_grad], [w for w in text_model if w.requires_grad]]
        groups = [
            {"params": [w for w in part if (w.ndim > 1) == decays], "weight_decay": WEIGHT_DECAY * decays}
            for part in self._parts
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])

    def learn(self, batch: Batch, steps: int) -> tuple[float, float, float]:
        """Run one step of `steps`; return the losses of captions, helper heads and beats, each 0 while unused."""
        rates = learning_rates(self.step, steps, self.plan)
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = rates[index // 2]
        plan = self.plan
        alone = self.step < int(plan.tower_until * steps)
        tokens = audio_embeddings(self.model, batch)
        help_loss = self.heads(tokens, [audio_tokens(int(frames)) for frames in batch.lengths], batch)
        text_loss = torch.zeros(()) if alone else caption_loss(self.model, tokens, batch, self._audio_token_id)
        left = plan.help_until - self.step / steps
        share = max(0.0, min(1.0, left / (plan.help_until - plan.tower_until))) if left > 0 else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        beats_loss = self.heads.beats_loss(tokens, batch)
        (text_loss + share * help_loss + BEATS_WEIGHT * beats_loss).backward()
        learnt = [weights for part in self._parts[: 1 if alone else 2] for weights in part]
        _average(learnt)
        nn.utils.clip_grad_norm_(learnt, CLIP_NORM)
        self.optimizer.step()
        self.step += 1
        return text_loss.item(), help_loss.item() if share else 0.0, beats_loss.item()

    def save(self) -> None:
        """Write the state atomically."""
        parts = {"model": self.model, "heads": self.heads, "optimizer": self.optimizer}
        state = {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}
        torch.save(state, self._path.with_suffix(".part"))
        self._path.with_suffix(".part").rename(self._path)


def _average(learnt: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes; a head without a target has none in its process."""
    if not distributed.is_initialized():
        return
    gradients = [torch.zeros_like(weights) if weights.grad is None else weights.grad for weights in learnt]
    flat = torch.cat([gradient.view(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    for weights, mean in zip(learnt, pieces, strict=True):
        weights.grad = mean.view_as(weights)


def lessons(
    corpus: Corpus, step: int, steps: int, turn: tuple[int, int], short_until: float = FROM_SEEDS.short_until
) -> Iterator[list[Clip]]:
    """Yield the clips of each step from `step` on for one process: only short clips at first, then all.

    `turn` is the rank of the process and the number of processes.
    """
    rank, processes = turn
    for longest, until in ((SHORT_FRAMES, int(short_until * steps)), (None, steps)):
        batches = corpus.epochs(step + until, FRAMES_PER_BATCH, MOST_CLIPS, longest)
        yield from islice(batches, rank, processes * max(0, until - step), processes)
        step = max(step, until)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train, or resume, as one of `arguments.processes`; the first process writes state and learning curve."""
    cache, steps, processes, name = arguments.cache, arguments.steps, arguments.processes, arguments.name
    start = arguments.start
    torch.set_num_threads(1)
    meeting = cache / f"{name}.meeting"
    distributed.init_process_group("gloo", init_method=meeting.absolute().as_uri(), rank=rank, world_size=processes)
    tokenizer = tokenizer_for(cache, start)
    corpus = Corpus(cache / "train", tokenizer)
    training = Training(tokenizer, cache / f"{name}.pt", start)
    hours = sum(clip.frames for clip in corpus.clips) / 360_000
    if rank == 0:
        print(f"{len(corpus.clips)} clips, {hours:.1f} h; from step {training.step}", flush=True)
    started = saved = time.monotonic()
    seen = []
    for clips in lessons(corpus, training.step, steps, (rank, processes), training.plan.short_until):
        batch = corpus.batch(clips, np.random.default_rng([training.step, rank]))
        seen.append(training.learn(batch, steps))
        now = time.monotonic()
        if rank == 0 and len(seen) == 20:
            row = (training.step, *(f"{loss:.4f}" for loss in np.mean(seen, axis=0)), f"{(now - started) / 20:.3f}")
            with (cache / f"{name}.csv").open("a", newline="") as out:
                csv.writer(out).writerow(row)
            print(
                f"step {row[0]} of {steps}: caption {row[1]}, helpers {row[2]}, beats {row[3]}, {row[4]} s a step",
                flush=True,
            )
            started, seen = now, []
        if rank == 0 and now - saved > SAVE_EVERY_S:
            training.save()
            saved = now
    if rank == 0:
        training.save()
        save_checkpoint(training.model, tokenizer, cache / "checkpoint")
    distributed.destroy_process_group()


def main() -> None:
    """Train, or resume training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="total steps, including completed ones (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="training", help="name of the state and of the learning curve")
    parser.add_argument("--start", type=Path, help="checkpoint to start from in place of seeds")
    arguments = parser.parse_args()
    cache = arguments.cache
    tokenizer_for(cache, arguments.start)
    (cache / f"{arguments.name}.meeting").unlink(missing_ok=True)
    multiprocessing.spawn(train, (arguments,), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
