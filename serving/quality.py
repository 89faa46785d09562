"""The quality guard: recognise captions that loop, are blank or are cut, and decide on a second sample.

A loop costs as much as dozens of captions. vLLM's detector of repeated tokens recognises it in the engine, which stops
there; the other defects are recognised at the caption's end. A response that is not streamed is generated once more, by
another seed, where that can help; a stream has already delivered its text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from serving.types import Defect, FinishReason, Guard

if TYPE_CHECKING:
    from serving.types import Sampling

_SAMPLED_AGAIN = frozenset({Defect.LOOP, Defect.BLANK, Defect.SHORT})
"""Defects that another sample may cure. A caption that is cut at `max_tokens` is as long as its caller allows."""

_STRENGTH = (Guard.OFF, Guard.STOP, Guard.RETRY)


def effective(setting: Guard, requested: Guard) -> Guard:
    """Return the weaker of the operator's and the request's choice."""
    return min(setting, requested, key=_STRENGTH.index)


def guarded(sampling: Sampling, guard: Guard) -> Sampling:
    """Return the sampling parameters with the engine's detection of loops, unless the guard is off.

    A caption that ignores its end of turn is a benchmark's and is left alone.
    """
    return replace(sampling, stop_loops=guard is not Guard.OFF and not sampling.ignore_eos)


def defect_of(*, looped: bool, blank: bool, tokens: int, finish_reason: FinishReason) -> Defect | None:
    """Return the defect of a complete caption of `tokens` tokens, `None` if it has none.

    `blank`: its text is empty or white space.
    """
    if looped:
        return Defect.LOOP
    if finish_reason is FinishReason.LENGTH:
        return Defect.CUT
    if blank:
        return Defect.BLANK
    return Defect.SHORT if tokens <= 1 else None


def may_sample_again(sampling: Sampling, guard: Guard) -> bool:
    """Return whether a defective caption of these parameters may be generated once more.

    A greedy caption would be the same again; and where the client's own parameters decide on the length, a blank
    caption may be what it requested.
    """
    return guard is Guard.RETRY and sampling.temperature > 0 and not sampling.ignore_eos and not sampling.steers_length


def may_be_cured(defect: Defect | None) -> bool:
    """Return whether another sample may be without the defect."""
    return defect in _SAMPLED_AGAIN


def another_seed(sampling: Sampling) -> Sampling:
    """Return the parameters of the second sample: for a request with a seed, always the same other seed."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed ^ 1)
