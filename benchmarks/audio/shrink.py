"""A checkpoint whose engine takes next to no CPU: the first layer of each stack of another checkpoint.

    python -m benchmarks.audio.shrink serving/embedded/checkpoint .cache/benchmark-checkpoint

Its captions make no sense. It stands for an engine on a GPU, which leaves the CPU to audio and answers: with it, and
with short captions, the requests/s of a server are those of everything around its engine.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

LATER_LAYER = re.compile(r"(audio_tower|model)\.layers\.[1-9]\d*\.")


def shrink(source: Path, target: Path) -> None:
    """Write the directory `target`."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = {name: of for name, of in load_file(source / "model.safetensors").items() if not LATER_LAYER.search(name)}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    thinker = config["thinker_config"]
    thinker["audio_config"]["encoder_layers"] = 1
    thinker["audio_config"].pop("num_hidden_layers", None)
    thinker["text_config"]["num_hidden_layers"] = 1
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    shrink(Path(sys.argv[1]), Path(sys.argv[2]))
