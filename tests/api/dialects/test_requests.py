"""Good requests in both dialects: the audio and the sampling that the codecs read from them."""

from __future__ import annotations

import json
import time
from base64 import b64encode, urlsafe_b64encode
from typing import TYPE_CHECKING, Any

import pytest

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.config import EMBEDDED_CHECKPOINT, Settings
from serving.types import CaptionRequest, InlineAudio, Sampling, UploadedAudio, UrlAudio
from tests.api.dialects.bad_requests import GOOD, MODEL, URL, compatible, native, user

if TYPE_CHECKING:
    from serving.types import AudioSource

CODECS = ("native", "compatible")
RESOLVE = {"x-dashscope-ossresourceresolve": "enable"}
WAV = b64encode(b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00").decode()


def decode(
    dialect: str,
    messages: str = GOOD,
    parameters: str = "{}",
    headers: dict[str, str] | None = None,
    *,
    model: str = MODEL,
    settings_model: str = "Qwen/Qwen3-Omni-30B-A3B-Captioner",
    **settings: Any,
) -> CaptionRequest:
    """Return the request that a codec decodes from these JSON texts."""
    codec, body = (DashScopeCodec, native) if dialect == "native" else (OpenAICodec, compatible)
    text = body(messages, f'"{model}"', parameters)
    return codec(Settings(model=settings_model, **settings)).decode_request(text, headers or {}, "id")[0]


def part_of(kind: str, reference: str) -> dict[str, Any]:
    """Return a part of a kind that holds a reference."""
    field = {"audio": reference, "input_audio": {"data": reference}, "audio_url": {"url": reference}}[kind]
    return {"type": kind, kind: field}


both = pytest.mark.parametrize("dialect", CODECS)


@both
@pytest.mark.parametrize(
    "part",
    [
        {"audio": URL},
        {"audio": [URL]},
        {"audio": URL, "text": "What is it?"},
        {"type": "audio", "audio": URL},
        {"type": "input_audio", "input_audio": {"data": URL}},
        {"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": URL}},
        {"input_audio": {"data": URL}},
        {"audio": URL, "cache_control": {"type": "ephemeral"}},
    ],
    ids=json.dumps,
)
def test_every_shape_of_part(dialect: str, part: dict[str, Any]) -> None:
    """Both dialects accept both dialects' parts, and vLLM's."""
    assert decode(dialect, user(part)).audio == UrlAudio(URL)


@both
@pytest.mark.parametrize(
    "others",
    [
        [{"role": "system", "content": "You are terse."}],
        [{"role": "system", "content": [{"text": "You are terse."}]}],
        [{"role": "developer", "content": [{"type": "text", "text": "Be terse."}]}],
        [{"role": "system"}, {"role": "system", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ""}],
    ],
    ids=json.dumps,
)
def test_parts_that_cannot_change_the_caption_are_ignored(dialect: str, others: list[Any]) -> None:
    """System messages, texts next to the audio and empty turns are accepted and ignored."""
    audio = {"role": "user", "content": [{"text": "Describe."}, {"audio": URL}, {"type": "text", "text": "Please."}]}
    assert decode(dialect, json.dumps([*others, audio])).audio == UrlAudio(URL)


@both
@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("https://dashscope.example/%E6%B5%8B%E8%AF%95.wav?a=b%2Fc#x", None),
        ("HTTP://MEDIA.EXAMPLE:8080/a.wav", None),
        ("https://user:secret@media.example/a.wav", None),
        ("https://[2001:db8::1]/a.wav", None),
        ("https://媒体.example/声音.wav", None),
        (f"data:audio/wav;base64,{WAV}", InlineAudio(WAV)),
        (f"data:;base64,{WAV}", InlineAudio(WAV)),
        (f"DATA:audio/amr;codecs=x;BASE64,{WAV}", InlineAudio(WAV)),
        (f"data:audio/wav;base64,\n{WAV}\r\n", InlineAudio(WAV)),
    ],
)
def test_references(dialect: str, reference: str, source: AudioSource | None) -> None:
    """A URL is kept as the client wrote it; the text of a data URL is extracted."""
    assert decode(dialect, user({"audio": reference})).audio == (source or UrlAudio(reference))


ESCAPED = WAV.replace("+", "%2B").replace("/", "%2F").replace("=", "%3d")

WRITTEN: dict[str, str] = {
    "blank after a semicolon": f"data:audio/ogg; codecs=opus; base64,{WAV}",
    "blanks everywhere": f"data: audio/wav ; base64 , {WAV}",
    "quoted codecs with a comma": f'data:video/webm;codecs="vp8,opus";base64,{WAV}',
    "quoted codecs with a semicolon": f'data:audio/webm; codecs="opus;vorbis" ;base64,{WAV}',
    "quoted base64 before the comma": f'data:audio/ogg;x="a;base64,b";base64,{WAV}',
    "quoted quote": f'data:audio/ogg;x="a\\",b";base64,{WAV}',
    "charset before": f"data:audio/wav;charset=utf-8;base64,{WAV}",
    "charset after": f"data:audio/wav;base64;charset=utf-8,{WAV}",
    "upper case": f"DATA:AUDIO/WAV;BASE64,{WAV}",
    "line end before": f"\n data:audio/wav;base64,{WAV}",
    "byte order mark": f"\ufeffdata:audio/wav;base64,{WAV}",
    "byte order mark after the comma": f"data:audio/wav;base64,\ufeff{WAV}",
    "ideographic space": f"\u3000data:audio/wav;base64,{WAV}\u3000",
    "line end after": f"data:audio/wav;base64,{WAV}\r\n",
}


@both
@pytest.mark.parametrize("kind", ["audio", "input_audio", "audio_url"])
@pytest.mark.parametrize("name", WRITTEN)
def test_data_urls_as_people_write_them(dialect: str, kind: str, name: str) -> None:
    """Blanks, quoted parameters, their order and marks around a data URL do not change its data, in any part."""
    assert decode(dialect, user(part_of(kind, WRITTEN[name]))).audio == InlineAudio(WAV)


@both
@pytest.mark.parametrize("kind", ["audio", "input_audio", "audio_url"])
@pytest.mark.parametrize("around", [" {}", "{}\n", "\r\n\t{} ", "\ufeff{}", "\u3000{}\xa0"])
def test_blanks_around_a_url_mean_nothing(dialect: str, kind: str, around: str) -> None:
    """A URL that was copied with the white space around it is the URL."""
    assert decode(dialect, user(part_of(kind, around.format(URL)))).audio == UrlAudio(URL)


@both
def test_blanks_in_a_url_are_part_of_it(dialect: str) -> None:
    """A space within a URL stays for the download, which escapes it."""
    url = "https://media.example/my clip.wav?name=a b"
    assert decode(dialect, user({"audio": f"{url}\n"})).audio == UrlAudio(url)


@both
def test_blanks_around_an_upload_key(dialect: str) -> None:
    """Blanks before `oss://` and line ends after it mean nothing; a file's name may end in a blank."""
    found = decode(dialect, user({"audio": "\n oss://a/b.wav \r\n"}), headers=RESOLVE).audio
    assert found == UploadedAudio("a/b.wav ")


@both
@pytest.mark.parametrize("text", [f"\n{ESCAPED}", f"\ufeff{WAV}", f" {WAV}\n", f"%0A{ESCAPED}"])
def test_bare_base64_as_people_write_it(dialect: str, text: str) -> None:
    """Bare base64 is recognised behind marks and blanks, and with percent-escapes, which the audio worker decodes."""
    part = {"type": "input_audio", "input_audio": {"data": text}}
    assert decode(dialect, user(part)).audio == InlineAudio(text.strip("\ufeff \n"))


def test_an_escape_that_is_cut_where_the_format_is_recognised() -> None:
    """A percent-escape at the end of the characters that are looked at does not hide the format."""
    for shift in range(3):
        text = WAV + "A" * (2048 - len(WAV) - shift) + "%2B" * 400
        part = {"type": "input_audio", "input_audio": {"data": text}}
        assert decode("native", user(part)).audio == InlineAudio(text)


@both
@pytest.mark.parametrize("key", ["dashscope-instant/0/2025-11-18/1/t ö+n%e.wav", "a/#?%23.wav", "oss://x", "/"])
def test_upload_keys_are_opaque(dialect: str, key: str) -> None:
    """Everything after `oss://` is the key, unchanged, if the header allows it."""
    for value in ("enable", "Enable"):
        headers = {"x-dashscope-ossresourceresolve": value}
        assert decode(dialect, user({"audio": f"oss://{key}"}), headers=headers).audio == UploadedAudio(key)


@both
def test_the_upload_header_is_harmless(dialect: str) -> None:
    """With the header, other references mean the same as without it."""
    assert decode(dialect, headers=RESOLVE).audio == UrlAudio(URL)


@both
@pytest.mark.parametrize(
    "head",
    [
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"ID3\x04\x00\x00\x00\x00\x00\x0a",
        (b"\xff\xfb\x90\x64" + bytes(413)) * 9,
        (b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(9)) * 9,
        b"OggS\x00\x02",
        b"fLaC\x00\x00",
        b"#!AMR\n\x3c",
        b"#!AMR-WB\n",
        b"\x00\x00\x00\x18ftyp3gp4",
        b"\x00\x00\x00\x20ftypM4A ",
        b"\x1aE\xdf\xa3\x9f",
        b"FORM\x00\x00\x10\x00AIFF",
        b".snd\x00\x00\x00\x18",
    ],
)
def test_bare_base64_of_audio(dialect: str, head: bytes) -> None:
    """`input_audio.data` may be bare base64, in either alphabet and with line breaks, if it begins like audio."""
    for text in (b64encode(head * 9).decode(), urlsafe_b64encode(head * 9).decode(), f"\n{b64encode(head).decode()}"):
        part = {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
        assert decode(dialect, user(part)).audio == InlineAudio(text.strip())


@both
def test_largest_inline_audio(dialect: str) -> None:
    """One character below 10 MiB of base64 is accepted; the prefix of the data URL is not counted."""
    text = WAV + "A" * (10 * 1024 * 1024 - 1 - len(WAV))
    assert decode(dialect, user({"audio": f"data:audio/wav;base64,{text}"})).audio == InlineAudio(text)


@both
def test_decoding_a_large_body_is_fast(dialect: str) -> None:
    """A 10 MB body takes the event loop milliseconds: it is parsed once and copied once."""
    messages = user({"audio": f"data:audio/wav;base64,{WAV}{'A' * 10_000_000}"})
    best = 1.0
    for _ in range(5):
        began = time.process_time()
        decode(dialect, messages)
        best = min(best, time.process_time() - began)
    assert best < 0.05


@both
def test_defaults_are_the_model_cards(dialect: str) -> None:
    """Absent and null parameters have the model card's values; a null `top_k` switches it off."""
    card = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=32_768)
    assert decode(dialect).sampling == card
    nulls = dict.fromkeys(("temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "n", "tools"))
    assert decode(dialect, parameters=json.dumps(nulls)).sampling == card
    assert decode(dialect, parameters='{"top_k":null}').sampling.top_k == 0


@both
def test_the_stand_in_is_greedy_by_default(dialect: str) -> None:
    """A caption of the embedded stand-in is repeatable, as its checkpoint says; a request may still sample."""
    model = str(EMBEDDED_CHECKPOINT)
    defaults = json.loads((EMBEDDED_CHECKPOINT / "generation_config.json").read_text())
    assert (defaults["do_sample"], "temperature" in defaults) == (False, False)
    assert decode(dialect, settings_model=model).sampling == Sampling(temperature=0.0)
    assert decode(dialect, parameters='{"temperature": 0.6}', settings_model=model).sampling == Sampling()
    assert decode(dialect, engine="fake", settings_model=model).sampling == Sampling()


@both
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1.99}, {"temperature": 1.99}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_p": 0.01}, {"top_p": 0.01}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 100}, {"top_k": 100}),
        ({"top_k": 101}, {"top_k": 0}),
        ({"top_k": 10**30}, {"top_k": 0}),
        ({"max_tokens": 1}, {"max_tokens": 1}),
        ({"max_tokens": 32_768}, {"max_tokens": 32_768}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": 2**31 - 1}, {"seed": 2**31 - 1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"presence_penalty": 2.0}, {"presence_penalty": 2.0}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"repetition_penalty": 1e-300}, {"repetition_penalty": 1e-6}),
        ({"repetition_penalty": 10**400}, {"repetition_penalty": 1e6}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"stop": [[1, 2], [3]]}, {"stop_token_sequences": ((1, 2), (3,))}),
        ({"stop": []}, {}),
    ],
    ids=str,
)
def test_parameters_apply(dialect: str, parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each parameter reaches the sampling, up to and including the ends of its range."""
    assert decode(dialect, parameters=json.dumps(parameters)).sampling == Sampling(**expected)


@both
@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 1},
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"enable_search": False, "enable_thinking": False},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"response_format": {}},
        {"logprobs": False, "top_logprobs": 0},
        {"result_format": "text"},
        {"ignore_eos": False},
        {"user": "u", "metadata": {"a": [1]}, "store": True, "asr_options": {}, "made_up": "x"},
    ],
    ids=json.dumps,
)
def test_harmless_parameters_pass(dialect: str, parameters: dict[str, Any]) -> None:
    """Parameters that change nothing, and unknown ones, are accepted."""
    assert decode(dialect, parameters=json.dumps(parameters)).sampling == Sampling()


@pytest.mark.parametrize(
    "parameters",
    [
        {"logprobs": True, "top_logprobs": 5},
        {"logprobs": "what"},
        {"structured_outputs": {"regex": "("}, "guided_json": {"type": 5}},
        {"min_p": 7, "min_tokens": -1, "logit_bias": [1], "allowed_token_ids": "x", "bad_words": 1},
        {"stop_token_ids": [13], "include_stop_str_in_output": True, "echo": True, "prompt_logprobs": 5},
    ],
    ids=json.dumps,
)
def test_the_native_dialect_ignores_what_the_manual_does_not_list(parameters: dict[str, Any]) -> None:
    """In the native dialect the manual's list alone holds: vLLM's parameters have no effect there."""
    assert decode("native", parameters=json.dumps(parameters)).sampling == Sampling()


@both
def test_ignore_eos_only_where_it_is_allowed(dialect: str) -> None:
    """Benchmarks may request that the end of turn is ignored, on a server that allows it."""
    assert decode(dialect, parameters='{"ignore_eos":true}', allow_ignore_eos=True).sampling.ignore_eos


@both
def test_a_server_of_shorter_captions(dialect: str) -> None:
    """The server's own limit is the default and the maximum, without refusing the manual's range."""
    assert decode(dialect, max_output_tokens=256).sampling.max_tokens == 256
    assert decode(dialect, parameters='{"max_tokens":16384}', max_output_tokens=256).sampling.max_tokens == 256
    assert decode(dialect, parameters='{"max_tokens":16}', max_output_tokens=256).sampling.max_tokens == 16


def test_further_names_of_max_tokens() -> None:
    """Each dialect's other name counts, and of two values the smaller."""
    assert decode("compatible", parameters='{"max_completion_tokens":9}').sampling.max_tokens == 9
    assert decode("compatible", parameters='{"max_completion_tokens":9,"max_tokens":7}').sampling.max_tokens == 7
    assert decode("native", parameters='{"max_length":9}').sampling.max_tokens == 9
    assert decode("native", parameters='{"seed":9223372036854775807}').sampling.seed == 2**63 - 1


@both
def test_aliases_are_accepted_and_kept(dialect: str) -> None:
    """A request may name an alias, and keeps that name."""
    name = "Qwen/Qwen3-Omni-30B-A3B-Captioner"
    assert decode(dialect, model=name, model_aliases=(name,)).model == name


@both
def test_the_last_of_repeated_keys_counts(dialect: str) -> None:
    """JSON with a repeated key is read as most readers do."""
    assert decode(dialect, parameters='{"top_k":-1,"top_k":5}').sampling.top_k == 5


def test_native_headers_mean_nothing_to_the_compatible_dialect() -> None:
    """Asynchronous calls and encryption exist only in the native dialect."""
    headers = {"x-dashscope-async": "enable", "x-dashscope-encryptionkey": "x", "x-dashscope-sse": "enable"}
    assert decode("compatible", headers=headers).audio == UrlAudio(URL)
    assert not OpenAICodec(Settings()).decode_request(compatible(GOOD), headers, "id")[1].stream
