"""Agreement of greedy captions, as words: the same model with the same input writes the same, but for rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def agreement(one: str, other: str) -> dict[str, Any]:
    """Return whether two captions are equal, the words before the first difference, and the words of each."""
    words, others = one.split(), other.split()
    shared = 0
    for mine, theirs in zip(words, others, strict=False):
        if mine != theirs:
            break
        shared += 1
    return {"equal": one == other, "shared_words": shared, "words": [len(words), len(others)]}


def table(captions: Mapping[str, Mapping[str, str]], reference: str) -> dict[str, dict[str, Any]]:
    """Return the agreement of each system's captions with the reference's, by system and clip."""
    return {
        system: {
            clip: agreement(captions[reference][clip], text) for clip, text in of.items() if clip in captions[reference]
        }
        for system, of in captions.items()
        if system != reference and reference in captions
    }


def dollars_per_audio_hour(audio_s_per_s: float, gpus: int, dollars_per_gpu_hour: float | None) -> float | None:
    """Return the cost of captioning an hour of audio; None without a price or a GPU."""
    if not dollars_per_gpu_hour or not gpus or not audio_s_per_s:
        return None
    return round(dollars_per_gpu_hour * gpus / audio_s_per_s, 5)
