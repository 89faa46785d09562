"""Sampling parameters in vLLM's form, and the repetitions at which it ends a caption."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

from serving.errors import InvalidRequest
from serving.types import LEAST_LOGPROB, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vllm.logprobs import Logprob

    from serving.types import Sampling

_MIN_TEMPERATURE = 0.01
"""Lowest temperature above 0: vLLM raises a lower one to this, and logs a warning each time."""

LOOP_PATTERN_TOKENS = 8
"""Longest pattern of tokens whose repetition is a loop. vLLM compares once for each length, at each token."""

LOOP_REPEATS = 20
"""Repetitions of a pattern that are a loop.

Measured on the embedded checkpoint: in 200 captions of 1 to 30 s, at temperatures 0 to 1, no token came more than twice
in a row and no pattern of 2 to 16 tokens twice; a caption of 10 minutes repeated three tokens 45 times, and is stopped
at token 68 of 447. Captions may quote a singer's "la la la", so the bound is far above two.
"""


_LOOPS = RepetitionDetectionParams(max_pattern_size=LOOP_PATTERN_TOKENS, min_count=LOOP_REPEATS)


def sampling_params(sampling: Sampling, vocabulary: int, encode: Callable[[str], list[int]]) -> SamplingParams:
    """Return vLLM's form. Raises `InvalidRequest` for token ids that the vocabulary has not, and what vLLM refuses."""
    ids = [*sampling.stop_token_ids, *itertools.chain.from_iterable(sampling.stop_token_sequences)]
    if any(not 0 <= token_id < vocabulary for token_id in ids):
        raise InvalidRequest(f"Token ids in stop must be in [0, {vocabulary - 1}].", param="stop")
    if not all(sampling.stop) or not all(sampling.stop_token_sequences):
        raise InvalidRequest("An element of stop must not be empty.", param="stop")
    try:
        return SamplingParams(
            temperature=sampling.temperature if sampling.temperature >= _MIN_TEMPERATURE else 0.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            ignore_eos=sampling.ignore_eos,
            include_stop_str_in_output=sampling.include_stop,
            min_p=sampling.min_p,
            # A budget may have reduced `max_tokens` since.
            min_tokens=min(sampling.min_tokens, sampling.max_tokens),
            logit_bias=dict(sampling.logit_bias) or None,
            allowed_token_ids=list(sampling.allowed_token_ids) or None,
            _bad_words_token_ids=_bad_words(sampling, encode),
            logprobs=sampling.logprobs,
            repetition_detection=_LOOPS if sampling.stop_loops else None,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,  # they are made for this request alone
        )
    except VLLMClientError as error:
        raise InvalidRequest(str(error)) from error


def token_logprobs(
    steps: Sequence[Mapping[int, Logprob]] | None, tokens: Sequence[int], top: int | None
) -> tuple[TokenLogprob, ...]:
    """Return the probabilities of the tokens of one output of vLLM, with the `top` likeliest ones of each."""
    if top is None or steps is None:
        return ()
    return tuple(
        TokenLogprob(*_text_and_logprob(step[token]), tuple(map(_text_and_logprob, _likeliest(step.values(), top))))
        for token, step in zip(tokens, steps, strict=False)
    )


def _likeliest(candidates: Iterable[Logprob], top: int) -> list[Logprob]:
    """Return the `top` likeliest. vLLM puts the chosen token first, and adds it where it is not among them."""
    return sorted(candidates, key=lambda each: -each.logprob)[:top]


def _text_and_logprob(candidate: Logprob) -> tuple[str, float]:
    return candidate.decoded_token or "", max(LEAST_LOGPROB, candidate.logprob)


def _bad_words(sampling: Sampling, encode: Callable[[str], list[int]]) -> list[list[int]] | None:
    """Return the tokens of each bad word, at the beginning of a text and after a blank.

    vLLM's own `bad_words` has the second only if it has as many tokens as the first, so most words pass it.
    """
    forms = (form for word in sampling.bad_words for form in (word.lstrip(), f" {word.lstrip()}"))
    return [encode(form) for form in forms] or None
