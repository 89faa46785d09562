"""The offline engine as a process: `LLM.generate` on clips that are decoded beforehand.

    python -m benchmarks.compare.offline SETTINGS

SETTINGS is a JSON object: `model`, `max_tokens`, and `engine`, the arguments of `LLM`. `python -m benchmarks.compare`
starts this process and exchanges lines of JSON with it. The process writes {"ready": true} after it has loaded the
engine; {"decoded": n} for each list of paths; and for {"go": true} the list of completion token counts with the seconds
that the generation took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import soundfile
import soxr
from vllm import LLM, SamplingParams

from benchmarks.load.wire import SAMPLING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLE_RATE = 16_000
PROMPT = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"


def main(settings: dict[str, Any]) -> None:
    """Process rounds until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of vLLM and its processes must not mix with the answers

    def send(message: object) -> None:
        print(json.dumps(message), file=answers, flush=True)

    llm = LLM(settings["model"], **settings["engine"])
    sampling = SamplingParams(max_tokens=settings["max_tokens"], ignore_eos=True, **SAMPLING)
    send({"ready": True})
    for line in sys.stdin:
        prompts = [
            {"prompt": PROMPT, "multi_modal_data": {"audio": (decode(path), SAMPLE_RATE)}} for path in json.loads(line)
        ]
        send({"decoded": len(prompts)})
        sys.stdin.readline()
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        wall_s = time.perf_counter() - began
        send({"wall_s": wall_s, "tokens": [len(output.outputs[0].token_ids) for output in outputs]})


def decode(path: str) -> npt.NDArray[np.float32]:
    """Return the samples at 16 kHz, mono."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono: npt.NDArray[np.float32] = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
    return mono


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
