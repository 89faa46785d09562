"""Train the embedded captioner on the corpus, on the CPU; it can be ended and started again at any time.

`python -m deploy.embedded.train CACHE --steps N` goes on from CACHE/training.pt and ends with CACHE/checkpoint, which
transformers and vLLM load. Helper heads on the audio tokens (kinds, language, pace, rate, level, noise, room, clipping)
get the audio tower going; they fade out and are not saved.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2Tokenizer

from deploy.embedded.architecture import Model, build_config, build_model, build_tokenizer, save_checkpoint
from deploy.embedded.batches import IGNORED, KINDS, LEVELS, NOISES, RATES, Batch, Clip, Corpus, audio_tokens
from deploy.embedded.corpus.captions import LANGUAGES, MANNERS, caption

if TYPE_CHECKING:
    from collections.abc import Iterator

PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY, CLIP_NORM = 1.2e-3, 150, 0.05, 1.0
FRAMES_PER_BATCH, MOST_CLIPS = 6_000, 40
SHORT_FRAMES, SHORT_UNTIL = 400, 0.5
"""Up to this share of the steps only clips to 4 s: three times as many sounds for the same work."""
HELP_UNTIL = 0.7
"""Share of the steps at which the helper heads have faded out."""
SAVE_EVERY_S = 180
VOCABULARY = 1_024
STEPS = 5_000


class HelperHeads(nn.Module):
    """Linear readers of the audio tokens; only there to train the tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Linear(width, len(KINDS))
        nn.init.constant_(self.kinds.bias, -4)
        self.classes = nn.ModuleList(nn.Linear(width, n) for n in (len(LANGUAGES), len(MANNERS), len(RATES)))
        self.whole = nn.ModuleList(nn.Linear(width, n) for n in (len(LEVELS), len(NOISES), 2, 2))

    def forward(self, tokens: torch.Tensor, counts: list[int], batch: Batch) -> torch.Tensor:
        """The sum of the heads' losses; `tokens` [tokens of all clips, width]."""
        loss = 20 * functional.binary_cross_entropy_with_logits(self.kinds(tokens), batch.kinds)
        for head, target in zip(self.classes, (batch.language, batch.manner, batch.rate), strict=True):
            if (target != IGNORED).any():
                loss = loss + 0.5 * functional.cross_entropy(head(tokens), target, ignore_index=IGNORED)
        means = torch.stack([clip.mean(0) for clip in tokens.split(counts)])
        for index, head in enumerate(self.whole):
            loss = loss + 0.3 * functional.cross_entropy(head(means), batch.whole[:, index])
        return loss


def losses(model: Model, heads: HelperHeads, batch: Batch, audio_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the caption, and the helper heads' loss.

    Clips stand at the left, so that no token looks at padding, and positions are those of plain text, as in vLLM.
    """
    thinker = model.thinker
    heard = thinker.audio_tower(batch.features, feature_lens=batch.lengths).last_hidden_state
    embeddings = thinker.model.embed_tokens(batch.input_ids)
    at = (batch.input_ids == audio_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(at, heard.to(embeddings.dtype))
    hidden = thinker.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    told = batch.labels[:, 1:] != IGNORED
    caption_loss = functional.cross_entropy(thinker.lm_head(hidden[told]).float(), batch.labels[:, 1:][told])
    counts = [audio_tokens(int(frames)) for frames in batch.lengths]
    return caption_loss, heads(heard, counts, batch)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    done = min(1.0, (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS))
    return PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def tokenizer_for(cache: Path) -> Qwen2Tokenizer:
    """The tokenizer, trained once on captions of the corpus."""
    folder = cache / "tokenizer"
    if not folder.exists():
        corpus = Corpus(cache / "train", build_tokenizer(["caption"]))
        captions = [
            caption(clip.facts) for clip in random.Random(0).sample(corpus.clips, min(6_000, len(corpus.clips)))
        ]
        build_tokenizer(captions, VOCABULARY).save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def initialise(model: Model, seed: int = 0) -> None:
    """Initial weights that keep the scale of their input.

    The library suits widths of thousands with 0.02 everywhere: here its convolutions would leave a three-hundredth of
    the sound beside the positions, and the audio tokens stay all alike.
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
    """Model, helper heads and optimizer, and how far they have come."""

    def __init__(self, tokenizer: Qwen2Tokenizer, path: Path) -> None:
        config = build_config(tokenizer)
        self._path = path
        self._audio_token_id = config.thinker_config.audio_token_id
        self.model = build_model(config)
        initialise(self.model)
        self.model.set_experts_implementation("grouped_mm")
        self.model.train()
        self.heads = HelperHeads(config.thinker_config.text_config.hidden_size)
        self._trained = [p for name, p in self.model.named_parameters() if "visual" not in name]
        self._trained += self.heads.parameters()
        decayed = {"params": [p for p in self._trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY}
        others = {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.98), fused=True)
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])

    def learn(self, batch: Batch, steps: int) -> tuple[float, float]:
        """One step of `steps`; the losses of the captions and of the helper heads."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps)
        caption_loss, help_loss = losses(self.model, self.heads, batch, self._audio_token_id)
        help_share = max(0.0, 1 - self.step / (HELP_UNTIL * steps))
        self.optimizer.zero_grad(set_to_none=True)
        (caption_loss + help_share * help_loss).backward()
        nn.utils.clip_grad_norm_(self._trained, CLIP_NORM)
        self.optimizer.step()
        self.step += 1
        return caption_loss.item(), help_loss.item()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        parts = {"model": self.model, "heads": self.heads, "optimizer": self.optimizer}
        state = {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}
        torch.save(state, self._path.with_suffix(".part"))
        self._path.with_suffix(".part").rename(self._path)


def lessons(corpus: Corpus, step: int, steps: int) -> Iterator[list[Clip]]:
    """The clips of each step from `step` on: short ones at first, then all."""
    for longest, until in ((SHORT_FRAMES, int(SHORT_UNTIL * steps)), (None, steps)):
        yield from islice(corpus.epochs(step + until, FRAMES_PER_BATCH, MOST_CLIPS, longest), max(0, until - step))
        step = max(step, until)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps in all, those already done included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="training", help="name of the state and of the learning curve")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache, steps = arguments.cache, arguments.steps
    tokenizer = tokenizer_for(cache)
    corpus = Corpus(cache / "train", tokenizer)
    training = Training(tokenizer, cache / f"{arguments.name}.pt")
    hours = sum(clip.frames for clip in corpus.clips) / 360_000
    print(f"{len(corpus.clips)} clips, {hours:.1f} h; from step {training.step}", flush=True)
    began = saved = time.monotonic()
    seen = []
    for clips in lessons(corpus, training.step, steps):
        batch = corpus.batch(clips, np.random.default_rng(training.step))
        seen.append(training.learn(batch, steps))
        now = time.monotonic()
        if len(seen) == 20:
            row = (training.step, *(f"{loss:.4f}" for loss in np.mean(seen, axis=0)), f"{(now - began) / 20:.3f}")
            with (cache / f"{arguments.name}.csv").open("a", newline="") as out:
                csv.writer(out).writerow(row)
            print(f"step {row[0]} of {steps}: caption {row[1]}, helpers {row[2]}, {row[3]} s a step", flush=True)
            began, seen = now, []
        if now - saved > SAVE_EVERY_S:
            training.save()
            saved = now
    training.save()
    save_checkpoint(training.model, tokenizer, cache / "checkpoint")


if __name__ == "__main__":
    main()
