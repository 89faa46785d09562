"""The served model equals the reference implementation token for token."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from serving.audio.features import log_mel
from serving.config import EMBEDDED_CHECKPOINT, Settings
from serving.engine.vllm.engine import VllmEngine
from serving.types import Features
from tests.embedded.known_sounds import assorted
from tests.engine.conftest import sound, start, token_ids, waveform
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Samples = npt.NDArray[np.float32]
else:
    torch = Lazy("torch")
transformers = Lazy("transformers")

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

TOKENS = 100
"""Token limit, greater than the longest caption."""

CLIPS = 54

TIE = 1e-3
"""Difference of logits below which they are a tie."""


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same checkpoint in the implementation of transformers, in float32."""
    torch.set_num_threads(1)  # the model is small: on a busy machine threads would wait for each other
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    return model.thinker.eval()


def reference_tokens(reference: Any, processor: Any, samples: Samples) -> list[int]:
    """Return the tokens that transformers generates greedily for a waveform, end of turn included."""
    message = {"role": "user", "content": [{"type": "audio", "audio": "clip"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, audio=[samples], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        output = reference.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id
        )
    return list(output[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.fixture(scope="module")
def captions(reference: Any, processor: Any) -> dict[int, list[int]]:
    """Captions of the assorted clips in transformers, by the clip's number."""
    return {n: reference_tokens(reference, processor, clip.samples) for n, clip in enumerate(assorted(CLIPS))}


async def served_captions(engine: VllmEngine) -> dict[int, list[int]]:
    """Return the captions of vLLM: all clips at once, except those under a second.

    The audio tower pads all clips of a step to the longest second among them, and its convolutions see the padding: a
    clip under a second is encoded a little differently in a step with others. So it is in a batch of transformers.
    """
    features = [Features(log_mel(clip.samples), clip.samples.size) for clip in assorted(CLIPS)]
    short = {n: clip for n, clip in enumerate(features) if clip.duration_s < 1}
    together = {n: clip for n, clip in enumerate(features) if n not in short}
    tokens = await asyncio.gather(*(token_ids(engine, clip, max_tokens=TOKENS) for clip in together.values()))
    alone = {n: await token_ids(engine, clip, max_tokens=TOKENS) for n, clip in short.items()}
    return dict(zip(together, tokens, strict=True)) | alone


def lead(reference: Any, processor: Any, samples: Samples, tokens: list[int], other: int) -> float:
    """Return the reference's logit of the last of its `tokens` less that of `other` in its place."""
    message = {"role": "user", "content": [{"type": "audio", "audio": "clip"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, audio=[samples], sampling_rate=16_000, return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = reference(**inputs).logits[0, -1]
    return float(logits[tokens[-1]] - logits[other])


def assert_equal(served: dict[int, list[int]], captions: dict[int, list[int]], reference: Any, processor: Any) -> None:
    """Assert that captions are equal except for ties: the order of a sum may change a logit by a thousandth."""
    different = [n for n in captions if served[n] != captions[n]]
    assert CLIPS - len(different) >= 50
    for n in different:
        samples = list(assorted(CLIPS))[n].samples
        assert lead_at_the_first_difference(served[n], captions[n], samples, reference, processor) < TIE, n


def lead_at_the_first_difference(
    served: list[int], expected: list[int], samples: Samples, reference: Any, processor: Any
) -> float:
    """Return by how much the reference's logits differ for the two tokens at which captions part; 0 for equal ones."""
    if served == expected:
        return 0.0
    at = next(at for at, (ours, theirs) in enumerate(zip(served, expected, strict=False)) if ours != theirs)
    return abs(lead(reference, processor, samples, expected[: at + 1], served[at]))


async def test_captions_of_known_sounds_equal_the_reference(
    engine: VllmEngine, captions: dict[int, list[int]], reference: Any, processor: Any
) -> None:
    """Captions of sounds as the checkpoint knows them, many at once in vLLM and one by one in transformers."""
    assert len({tuple(tokens) for tokens in captions.values()}) > CLIPS / 2
    assert_equal(await served_captions(engine), captions, reference, processor)


async def test_captions_with_tensor_parallel_size_2_equal_the_reference(
    captions: dict[int, list[int]], reference: Any, processor: Any
) -> None:
    """Two processes that share each layer write the same captions."""
    shared = VllmEngine(Settings(tensor_parallel=2))
    try:
        await start(shared)
        assert_equal(await served_captions(shared), captions, reference, processor)
    finally:
        await shared.stop()


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.37, 8.0, 14.2, 29.99, 35.0])
async def test_greedy_tokens_equal_the_reference(
    engine: VllmEngine, reference: Any, processor: Any, seconds: float
) -> None:
    """Our features give in vLLM the tokens that transformers gives for the waveform, up to a tie of its logits."""
    for seed in range(2):
        samples = waveform(seconds, seed)
        expected = reference_tokens(reference, processor, samples)
        served = await token_ids(engine, sound(seconds, seed), max_tokens=TOKENS)
        assert lead_at_the_first_difference(served, expected, samples, reference, processor) < TIE


async def test_parity_would_notice_a_wrong_clip(engine: VllmEngine, captions: dict[int, list[int]]) -> None:
    """Tokens differ when a clip is played backwards or at another speed, so the equality above is significant."""
    right = 0
    for n, clip in enumerate(assorted(12)):
        features = log_mel(clip.samples)
        for wrong in (features[:, ::-1].copy(), features[:, ::2].copy()):
            tokens = await token_ids(engine, Features(wrong, clip.samples.size), max_tokens=TOKENS)
            right += tokens == captions[n]
    assert right <= 6
