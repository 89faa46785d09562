"""The table of request parameters of the OpenAI-compatible dialect: honoured, harmless and refused.

A parameter that OpenAI's or vLLM's chat completions know stands in exactly one of the three parts. Tests enumerate the
fields of vLLM's `SamplingParams` and of both request types: a field that an upgrade adds fails them until it has its
place here. A name that none of them knows is ignored, as the manual says (PROTOCOL 8). For the native dialect
PROTOCOL 8 alone holds. deploy/parameters.md is the table for readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

HONOURED = frozenset({
    "messages",
    "model",
    "stream",
    "stream_options",
    # PROTOCOL 8. Of `n`, `tools`, `functions`, `modalities`, `response_format` and the switches only the values that
    # request one plain text are accepted.
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
    "modalities",
    "tools",
    "functions",
    "response_format",
    "enable_thinking",
    "enable_search",
    "ignore_eos",
    # vLLM's, passed on within bounds (engine_parameters.py).
    "min_p",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop_token_ids",
    "include_stop_str_in_output",
    "logprobs",
    "top_logprobs",
})  # fmt: skip
"""Parameters that take effect."""

_ACCOUNT = "names or files the request at the provider"
_CACHE = "nothing is cached across requests"
_CHAT = "tunes a chat; the captioner takes no instructions and does not reason"
_WIRE = "concerns how vLLM packs the answer"
_OFF = "tunes a feature that is refused"

HARMLESS: dict[str, str] = {
    "user": _ACCOUNT,
    "metadata": _ACCOUNT,
    "store": _ACCOUNT,
    "service_tier": _ACCOUNT,
    "safety_identifier": _ACCOUNT,
    "moderation": _ACCOUNT,
    "request_id": _ACCOUNT,
    "session_id": _ACCOUNT,
    "priority": "the tenant's plan decides on priority",
    "prompt_cache_key": _CACHE,
    "prompt_cache_options": _CACHE,
    "prompt_cache_retention": _CACHE,
    "cache_salt": _CACHE,
    "skip_reading_prefix_cache": _CACHE,
    "prediction": "would only shorten the time",
    "asr_options": _CHAT,
    "result_format": _CHAT,
    "reasoning_effort": _CHAT,
    "verbosity": _CHAT,
    "include_reasoning": _CHAT,
    "thinking_token_budget": _CHAT,
    "chat_template_kwargs": _CHAT,
    "add_generation_prompt": _CHAT,
    "stream_interval": _WIRE,
    "flat_logprobs": _WIRE,
    "return_token_offsets": _WIRE,
    "return_mm_kwargs": _WIRE,
    "mm_payload": _WIRE,
    "routed_experts_prompt_start": _WIRE,
    "parallel_tool_calls": _OFF,
    "audio": _OFF,
    "length_penalty": _OFF,
    "truncation_side": _OFF,
    "spaces_between_special_tokens": _OFF,
    "guided_decoding_backend": _OFF,
    "guided_whitespace_pattern": _OFF,
}
"""Parameters that are accepted with any value and change nothing, and why nothing is lost."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A parameter that would change the answer and is not done: its neutral values, null aside, and the reason."""

    reason: str
    neutral: tuple[object, ...] = ()


_GRAMMAR = (
    "captions are free text, and a caller's grammar would be compiled, at a cost that nothing bounds, in the process "
    "that generates the captions of all tenants"
)
_PROMPT = "the prompt is one audio and nothing else"
_TOKENS = "captions are returned as text; the probabilities of its tokens by logprobs and top_logprobs alone"
_SPECIAL = "control tokens are no part of a caption"
_BEAMS = "there is one caption, by sampling"
_TOOLS = "the model calls no tools"

REFUSED: dict[str, Refusal] = {
    "structured_outputs": Refusal(_GRAMMAR),
    "guided_json": Refusal(_GRAMMAR),
    "guided_regex": Refusal(_GRAMMAR),
    "guided_choice": Refusal(_GRAMMAR),
    "guided_grammar": Refusal(_GRAMMAR),
    "structural_tag": Refusal(_GRAMMAR),
    "prompt_logprobs": Refusal(_TOKENS, (False, 0)),
    "prompt_logprob_token_ids": Refusal(_TOKENS),
    "prompt_logprob_start": Refusal(_TOKENS),
    "logprob_token_ids": Refusal(_TOKENS, ([],)),
    "return_token_ids": Refusal(_TOKENS, (False,)),
    "return_tokens_as_token_ids": Refusal(_TOKENS, (False,)),
    "detokenize": Refusal(_TOKENS, (True,)),
    "return_prompt_text": Refusal(_PROMPT, (False,)),
    "echo": Refusal(_PROMPT, (False,)),
    "continue_final_message": Refusal(_PROMPT, (False,)),
    "add_special_tokens": Refusal(_PROMPT, (False,)),
    "chat_template": Refusal(_PROMPT),
    "documents": Refusal(_PROMPT, ([],)),
    "truncate_prompt_tokens": Refusal(_PROMPT, (-1,)),
    "mm_processor_kwargs": Refusal(_PROMPT, ({},)),
    "media_io_kwargs": Refusal(_PROMPT, ({},)),
    "web_search_options": Refusal("the model does not search"),
    "tool_choice": Refusal(_TOOLS, ("none", "auto")),
    "function_call": Refusal(_TOOLS, ("none", "auto")),
    "skip_special_tokens": Refusal(_SPECIAL, (True,)),
    "use_beam_search": Refusal(_BEAMS, (False,)),
    "best_of": Refusal(_BEAMS, (1,)),
    "watermarking": Refusal("no watermark is configured", (False,)),
    "trace_decode_token_ids": Refusal("the caption is the model's"),
    "repetition_detection": Refusal("captions that repeat without end are a matter of the server's settings"),
    "kv_transfer_params": Refusal("no cache is exchanged with other servers", ({},)),
    "ec_transfer_params": Refusal("no cache is exchanged with other servers", ({},)),
    "vllm_xargs": Refusal("the engine has no extensions", ({},)),
    "extra_args": Refusal("the engine has no extensions", ({},)),
    "logits_processors": Refusal("the engine has no extensions", ([],)),
}
"""Parameters that get 400 with `param`, unless their value is null or neutral."""


def refuse(values: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for the first parameter of `REFUSED` whose value is not neutral."""
    for name, value in values.items():
        refusal = REFUSED.get(name)
        if refusal is not None and value is not None and not _is_among(value, refusal.neutral):
            raise InvalidRequest(f"'{name}' is not supported: {refusal.reason}.", param=name)


def _is_among(value: object, neutral: tuple[object, ...]) -> bool:
    """Return whether the value is one of `neutral`, by type, too: `true` is not 1."""
    return any(type(value) is type(each) and value == each for each in neutral)
