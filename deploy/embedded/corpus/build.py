"""Corpus on disk: training clips as log-mel shards, held-out clips as WAV files with their facts.

`python -m deploy.embedded.corpus.build CACHE --worker 0 --workers 2` writes every second missing shard.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
from transformers import WhisperFeatureExtractor

from deploy.embedded.corpus import coded
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN
from deploy.embedded.corpus.scenes import Scene, SceneMaker

SHARD = 500
TRAINING_CLIPS = 100_000
HELD_OUT_CLIPS = 1_200
MEL = 128
CODED = 0.4
"""Share of the training clips that pass through a lossy coding."""


def log_mel(extractor: WhisperFeatureExtractor, samples: np.ndarray) -> np.ndarray:
    """Return the features of 16 kHz samples by the checkpoint's processor: [frames, 128], 100 frames per second."""
    batch = extractor(samples, sampling_rate=SAMPLE_RATE, padding=True, truncation=False, return_tensors="np")
    return batch["input_features"][0].T


def entry_of(scene: Scene) -> dict[str, object]:
    """Return the entry of a scene in the corpus."""
    return {**asdict(scene.facts), "spans_s": scene.spans_s, "real": scene.real, "origins": scene.origins}


def make_shard(maker: SceneMaker, extractor: WhisperFeatureExtractor, path: Path, first: int) -> None:
    """Write the features of `SHARD` clips to `path`.f16 and their facts to `path`.jsonl, the latter last."""
    lines, frames = [], 0
    with path.with_suffix(".part").open("wb") as out:
        for seed in range(first, first + SHARD):
            scene, rng = maker.make(seed), random.Random(seed)
            samples = scene.samples
            if rng.random() < CODED:
                samples = coded.through(rng.choice(sorted(coded.CODINGS)), samples)
            features = log_mel(extractor, samples).astype(np.float16)
            out.write(features.tobytes())
            lines.append(json.dumps({**entry_of(scene), "first_frame": frames, "frames": len(features)}))
            frames += len(features)
    path.with_suffix(".part").rename(path.with_suffix(".f16"))
    path.with_suffix(".part").write_text("\n".join(lines))
    path.with_suffix(".part").rename(path.with_suffix(".jsonl"))


def make_held_out(cache: Path) -> None:
    """Write the held-out clips as 16 kHz WAV files, and their facts in one file."""
    folder = cache / "held-out"
    folder.mkdir(exist_ok=True)
    maker, lines = SceneMaker(cache, HELD_OUT), []
    for seed in range(HELD_OUT_CLIPS):
        scene = maker.make(seed)
        soundfile.write(folder / f"{seed:04}.wav", scene.samples, SAMPLE_RATE, subtype="PCM_16")
        lines.append(json.dumps({**entry_of(scene), "file": f"{seed:04}.wav"}))
    (folder / "facts.jsonl").write_text("\n".join(lines))


def main() -> None:
    """Write missing shards and held-out clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clips", type=int, default=TRAINING_CLIPS, help="total training clips (default: %(default)s)")
    arguments = parser.parse_args()
    shards = arguments.cache / "train"
    shards.mkdir(parents=True, exist_ok=True)
    if arguments.worker == 0 and not (arguments.cache / "held-out" / "facts.jsonl").exists():
        make_held_out(arguments.cache)
    maker = SceneMaker(arguments.cache, TRAIN)
    extractor = WhisperFeatureExtractor(feature_size=MEL)
    for index in range(arguments.worker, arguments.clips // SHARD, arguments.workers):
        path = shards / f"{index:03}"
        if not path.with_suffix(".jsonl").exists():
            make_shard(maker, extractor, path, index * SHARD)
            print(f"shard {index + 1} of {arguments.clips // SHARD}", flush=True)


if __name__ == "__main__":
    main()
