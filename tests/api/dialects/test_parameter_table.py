"""The table of parameters of the OpenAI-compatible dialect: every known name has one place and behaves by it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from openai.types.chat import completion_create_params

from serving.api.dialects.openai import OpenAICodec
from serving.api.dialects.parameter_table import HARMLESS, HONOURED, REFUSED
from serving.config import Settings
from serving.errors import InvalidRequest
from serving.types import Sampling
from tests.support.wire import compatible_body

if TYPE_CHECKING:
    from serving.types import CaptionRequest

PAGE = Path(__file__).parents[3] / "deploy/parameters.md"
AUDIO = "https://example.com/a.mp3"
TABLE = {*HONOURED, *HARMLESS, *REFUSED}


def decode(parameters: str | dict[str, Any]) -> CaptionRequest:
    """Return the request with these parameters, an object that is not empty."""
    text = parameters if isinstance(parameters, str) else json.dumps(parameters)
    body = f"{json.dumps(compatible_body(AUDIO))[:-1]},{text[1:]}"
    settings = Settings(model="Qwen/Qwen3-Omni-30B-A3B-Captioner")
    return OpenAICodec(settings).decode_request(body.encode(), {}, "id")[0]


def test_each_name_has_one_place() -> None:
    """The three parts of the table share no name."""
    assert len(HONOURED) + len(HARMLESS) + len(REFUSED) == len(TABLE)


def test_the_table_knows_the_parameters_of_openais_sdk() -> None:
    """Every parameter of chat completions in OpenAI's SDK is in the table; a new one fails this test."""
    theirs = completion_create_params.CompletionCreateParamsStreaming.__annotations__
    base = completion_create_params.CompletionCreateParamsBase.__annotations__
    assert {*theirs, *base} - TABLE == set()


def test_the_page_has_the_table() -> None:
    """deploy/parameters.md lists every name in the section of its part."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    for heading, names in (("Honoured", HONOURED), ("Harmless", HARMLESS), ("Refused", REFUSED)):
        [section] = [text for text in sections if text.startswith(heading)]
        assert {*names} - {*re.findall(r"`(\w+)`", section)} == set()


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("value", [True, "x", -1, {"a": [1]}, None], ids=json.dumps)
def test_harmless_parameters_change_nothing(name: str, value: object) -> None:
    """A harmless parameter is accepted with any value, without effect."""
    assert decode({name: value}).sampling == Sampling()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_parameters_name_themselves(name: str) -> None:
    """A refused parameter is 400 with `param` and a reason; null and its neutral values pass."""
    value: object
    for value in ({"a": 1}, "x", 7, [7]):
        with pytest.raises(InvalidRequest, match=f"^'{name}' is not supported: .+") as raised:
            decode({name: value})
        assert raised.value.param == name
    for value in (None, *REFUSED[name].neutral):
        assert decode({name: value}).sampling == Sampling()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {}),
        ("guided_regex", ""),
        ("guided_json", "{"),
        ("prompt_logprobs", 1),
        ("logprob_token_ids", [1]),
        ("echo", 1),
        ("detokenize", False),
        ("skip_special_tokens", False),
        ("skip_special_tokens", 1),
        ("use_beam_search", True),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("watermarking", True),
        ("truncate_prompt_tokens", 1),
    ],
)
def test_what_would_change_the_answer_is_refused(name: str, value: object) -> None:
    """A request that this service cannot fulfil is refused, also where its value is broken."""
    with pytest.raises(InvalidRequest) as raised:
        decode({name: value})
    assert raised.value.param == name


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"min_p": 1}, {"min_p": 1.0}),
        ({"min_tokens": 0}, {}),
        ({"min_tokens": 32_768}, {"min_tokens": 32_768}),
        ({"min_tokens": 5, "max_tokens": 5}, {"min_tokens": 5, "max_tokens": 5}),
        ({"logit_bias": {}}, {}),
        ({"logit_bias": {"5": -100, "2147483647": 100.0}}, {"logit_bias": ((5, -100.0), (2**31 - 1, 100.0))}),
        ({"logit_bias": {"5": 1, "05": 2}}, {"logit_bias": ((5, 2.0),)}),
        ({"allowed_token_ids": [7, 7, 8]}, {"allowed_token_ids": (7, 8)}),
        ({"bad_words": []}, {}),
        ({"bad_words": ["a dog", "a dog", " bark"]}, {"bad_words": ("a dog", " bark")}),
        ({"stop_token_ids": []}, {}),
        ({"stop_token_ids": [0, 2]}, {"stop_token_ids": (0, 2)}),
        ({"stop": [1, 2], "stop_token_ids": [2, 3]}, {"stop_token_ids": (1, 2, 3)}),
        ({"include_stop_str_in_output": True}, {"include_stop": True}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20, "max_tokens": 1560}),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 1559}, {"logprobs": 20, "max_tokens": 1559}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"logprobs": 0}, {}),
        ({"logprobs": None, "top_logprobs": None}, {}),
        ({"min_p": None, "min_tokens": None, "logit_bias": None, "bad_words": None, "allowed_token_ids": None}, {}),
    ],
    ids=str,
)
def test_vllms_parameters_apply(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each parameter reaches the sampling, up to and including the ends of its range."""
    assert decode(parameters).sampling == Sampling(**expected)


HUGE = "9" * 1000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("min_p", "-0.1", "Range of min_p should be [0.0, 1.0]"),
        ("min_p", "1.1", "Range of min_p should be [0.0, 1.0]"),
        ("min_p", HUGE, "Range of min_p should be [0.0, 1.0]"),
        ("min_p", '"0"', "'min_p' must be Float"),
        ("min_p", "true", "'min_p' must be Float"),
        ("min_tokens", "-1", "Range of min_tokens should be [0, 32768], up to max_tokens"),
        ("min_tokens", "32769", "Range of min_tokens should be [0, 32768], up to max_tokens"),
        ("min_tokens", '6,"max_tokens":5', "Range of min_tokens should be [0, 5], up to max_tokens"),
        ("min_tokens", HUGE, "Range of min_tokens should be [0, 32768], up to max_tokens"),
        ("min_tokens", "1.0", "'min_tokens' must be Integer"),
        ("logit_bias", "[1]", "'logit_bias' must be Object"),
        ("logit_bias", '{"a":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"-1":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"1.5":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"\\u0663":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"2147483648":1}', "The keys of logit_bias should be token ids"),
        ("logit_bias", f'{{"{HUGE}":1}}', "The keys of logit_bias should be token ids"),
        ("logit_bias", '{"5":100.5}', "The values of logit_bias should be numbers in [-100, 100]"),
        ("logit_bias", '{"5":-101}', "The values of logit_bias should be numbers in [-100, 100]"),
        ("logit_bias", f'{{"5":{HUGE}}}', "The values of logit_bias should be numbers in [-100, 100]"),
        ("logit_bias", '{"5":true}', "The values of logit_bias should be numbers in [-100, 100]"),
        ("logit_bias", '{"5":null}', "The values of logit_bias should be numbers in [-100, 100]"),
        (
            "logit_bias",
            json.dumps(dict.fromkeys(map(str, range(301)), 1)),
            "At most 300 entries of logit_bias are supported.",
        ),
        ("allowed_token_ids", "[]", "'allowed_token_ids' must not be empty"),
        ("allowed_token_ids", "5", "'allowed_token_ids' must be List"),
        ("allowed_token_ids", '["5"]', "The elements of allowed_token_ids should be token ids"),
        ("allowed_token_ids", "[true]", "The elements of allowed_token_ids should be token ids"),
        ("allowed_token_ids", "[-1]", "The elements of allowed_token_ids should be token ids"),
        ("allowed_token_ids", "[2147483648]", "The elements of allowed_token_ids should be token ids"),
        (
            "allowed_token_ids",
            json.dumps([*range(1025)]),
            "At most 1024 elements of allowed_token_ids are supported.",
        ),
        ("bad_words", '"dog"', "'bad_words' must be List"),
        ("bad_words", "[1]", "The elements of bad_words should be words of 1 to 64 characters"),
        ("bad_words", '[""]', "The elements of bad_words should be words of 1 to 64 characters"),
        ("bad_words", '["  "]', "The elements of bad_words should be words of 1 to 64 characters"),
        ("bad_words", json.dumps(["x" * 65]), "The elements of bad_words should be words of 1 to 64 characters"),
        ("bad_words", json.dumps(["x"] * 33), "At most 32 elements of bad_words are supported."),
        ("stop_token_ids", "5", "'stop_token_ids' must be List"),
        ("stop_token_ids", '["a"]', "The elements of stop_token_ids should be token ids"),
        ("stop_token_ids", f"[{HUGE}]", "The elements of stop_token_ids should be token ids"),
        ("stop_token_ids", json.dumps([*range(17)]), "At most 16 elements of stop_token_ids are supported."),
        ("include_stop_str_in_output", '"yes"', "'include_stop_str_in_output' must be Boolean"),
        ("logprobs", "1", "'logprobs' must be Boolean"),
        ("logprobs", '"true"', "'logprobs' must be Boolean"),
        ("top_logprobs", '21,"logprobs":true', "Range of top_logprobs should be [0, 20]"),
        ("top_logprobs", "-1", "Range of top_logprobs should be [0, 20]"),
        ("top_logprobs", HUGE, "Range of top_logprobs should be [0, 20]"),
        ("top_logprobs", "1", "'top_logprobs' needs 'logprobs' to be true"),
        ("top_logprobs", '1,"logprobs":false', "'top_logprobs' needs 'logprobs' to be true"),
    ],
)
def test_broken_values_are_refused(name: str, value: str, message: str) -> None:
    """A value of a wrong type, range or size is 400 with `param`, and is not sent back."""
    with pytest.raises(InvalidRequest) as raised:
        decode(f'{{"{name}":{value}}}')
    assert (raised.value.param, str(raised.value)) == (name, message)
