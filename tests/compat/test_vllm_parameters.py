"""The table of request parameters against vLLM's own lists: a field that an upgrade adds fails until it is placed."""

from __future__ import annotations

import importlib

import pytest

from serving.api.dialects.parameter_table import HARMLESS, HONOURED, REFUSED

TABLE = {*HONOURED, *HARMLESS, *REFUSED}

OURS = {"output_kind", "skip_clone", "output_text_buffer_length", "structured_outputs"}
"""Fields that the service or vLLM sets; `structured_outputs` is a request field, too, and in the table."""


def test_every_field_of_sampling_params_is_in_the_table() -> None:
    """Each public field of vLLM's `SamplingParams` is honoured, harmless or refused."""
    params = importlib.import_module("vllm.sampling_params").SamplingParams
    fields = {name for name in params.__struct_fields__ if not name.startswith("_")}
    assert {"min_p", "logit_bias", "repetition_detection"} <= fields
    assert fields - TABLE - OURS == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries, on import
def test_every_field_of_vllms_chat_completions_is_in_the_table() -> None:
    """Each field of vLLM's request for a chat completion is honoured, harmless or refused."""
    request = importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol").ChatCompletionRequest
    assert {"messages", "min_p", "echo"} <= request.model_fields.keys()
    assert request.model_fields.keys() - TABLE == set()
