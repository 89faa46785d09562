"""Requests that must be refused in both dialects, each with its error.

Plain data, so that the same cases run against a codec alone and against the complete service over HTTP.
"""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.api.dialects.bad_parameters import COMPATIBLE_ONLY, NATIVE_ONLY, PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MODEL = "qwen3-omni-30b-a3b-captioner"
URL = "https://media.example/a.wav"

BODY = "Required body invalid, please check the request body format."
BAD_URL = "The provided URL does not appear to be valid. Ensure it is correctly formatted."
AUDIO = "Required parameter(audio) missing or invalid, please check the request parameters."
MODAL = "The item of content should be a message of a certain modal."
NO_USER = "The input messages do not contain elements with the role of user."
SINGLE_TURN = "This model only supports a single turn"
ONE_AUDIO = "This model only supports one audio per request."
USER_AUDIO = "Audio is only supported in a message with the role of user."
TOO_LARGE = "Exceeded limit on max bytes per data-uri item : 10485760"

INVALID = ("InvalidParameter", "invalid_parameter_error")


@dataclass(frozen=True)
class Case:
    """One bad request of one dialect. `message` is a part of the error's message.

    `code`: the native `code`, or the compatible `error.code`. `beyond_codec`: the codec accepts it; the audio itself is
    at fault, so only the complete service refuses it.
    """

    name: str
    body: bytes = field(repr=False)
    message: str
    code: str | None
    status: int = 400
    headers: Mapping[str, str] = field(default_factory=dict)
    beyond_codec: bool = False


def native(messages: str, model: str = f'"{MODEL}"', parameters: str = "{}") -> bytes:
    """Return a DashScope request of these JSON texts."""
    return f'{{"model":{model},"input":{{"messages":{messages}}},"parameters":{parameters}}}'.encode()


def compatible(messages: str, model: str = f'"{MODEL}"', parameters: str = "{}") -> bytes:
    """Return an OpenAI request of these JSON texts."""
    more = parameters[1:] if parameters == "{}" else f",{parameters[1:]}"
    return f'{{"model":{model},"messages":{messages}{more}'.encode()


def user(*parts: Any) -> str:
    """Return a list of one user message with these parts, as JSON."""
    return json.dumps([{"role": "user", "content": list(parts)}])


def data_url(mime: str, data: bytes) -> str:
    """Return a data URL in base64."""
    return f"data:{mime};base64,{b64encode(data).decode()}"


NATIVE_PART: dict[str, Any] = {"audio": URL}
COMPATIBLE_PART: dict[str, Any] = {"type": "input_audio", "input_audio": {"data": URL}}
GOOD = user(NATIVE_PART)
WHOLE = native(GOOD)

BODIES: dict[str, bytes] = {
    "empty body": b"",
    "blank body": b" \r\n\t ",
    "plain text": b"please describe my audio",
    "form": b"model=qwen3-omni-30b-a3b-captioner&audio=https%3A%2F%2Fmedia.example",
    "XML": b"<request><model>x</model></request>",
    "multipart": b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nRIFF\r\n--x--\r\n',
    "audio as body": b"RIFF\x24\x00\x00\x00WAVEfmt ",
    "gzip": gzip.compress(WHOLE),
    "truncated": WHOLE[:-1],
    "truncated string": WHOLE[:40],
    "trailing comma": WHOLE[:-1] + b",}",
    "two documents": WHOLE + WHOLE,
    "trailing text": WHOLE + b"x",
    "trailing NUL": WHOLE + b"\0",
    "leading NUL": b"\0" + WHOLE,
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf" + WHOLE,
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "single quotes": WHOLE.replace(b'"', b"'"),
    "comment": b"/* hello */" + WHOLE,
    "bare key": b"{model: 1}",
    "missing colon": b'{"model" "x"}',
    "array": b"[" + WHOLE + b"]",
    "string": b'"hello"',
    "number": b"5",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"model":NaN}',
    "Infinity": b'{"model":-Infinity}',
    "leading zero": b'{"model":01}',
    "lonely minus": b'{"model":-}',
    "invalid UTF-8": b'{"model":"\xff"}',
    "overlong UTF-8": b'{"model":"\xc0\xaf"}',
    "UTF-8 surrogate": b'{"model":"\xed\xa0\x80"}',
    "lone high surrogate": b'{"model":"\\ud800"}',
    "lone low surrogate": b'{"model":"\\udc00"}',
    "bad escape": b'{"model":"\\x41"}',
    "raw newline in a string": b'{"model":"a\nb"}',
    "deep arrays": b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep and open": b"[" * 1_000_000,
    "number without end": b'{"model":' + b"9" * 100_000 + b"}",
    "a million values": b'{"model":[' + b"{}," * 1_000_000 + b"{}]}",
}

MODELS: dict[str, str] = {
    "unknown": '"gpt-4o"',
    "wrong case": f'"{MODEL.upper()}"',
    "trailing space": f'"{MODEL} "',
    "another hub's name": '"openai/Qwen3-Omni-30B-A3B-Captioner"',
    "a path": '"../../etc/passwd"',
    "not ASCII": '"\\u2028\\ud83d\\ude00"',
    "a NUL": '"\\u0000"',
    "long": f'"{"m" * 100_000}"',
}

MESSAGES: dict[str, tuple[Any, str]] = {
    "a string": ("hello", "'messages' must be List"),
    "an object": ({"role": "user"}, "'messages' must be List"),
    "a number": (5, "'messages' must be List"),
    "of null": ([None], BODY),
    "of strings": (["hello"], BODY),
    "of numbers": ([1], BODY),
    "of lists": ([[{"role": "user"}]], BODY),
    "without role": ([{"content": [NATIVE_PART]}], "None is not one of"),
    "role null": ([{"role": None, "content": [NATIVE_PART]}], "None is not one of"),
    "role number": ([{"role": 1, "content": [NATIVE_PART]}], "1 is not one of"),
    "role list": ([{"role": ["user"], "content": [NATIVE_PART]}], "is not one of"),
    "role object": ([{"role": {}, "content": [NATIVE_PART]}], "is not one of"),
    "role unknown": ([{"role": "narrator", "content": [NATIVE_PART]}], "'narrator' is not one of"),
    "role in capitals": ([{"role": "USER", "content": [NATIVE_PART]}], "'USER' is not one of"),
    "role empty": ([{"role": "", "content": [NATIVE_PART]}], "'' is not one of"),
    "role long": ([{"role": "u" * 100_000, "content": [NATIVE_PART]}], "is not one of"),
    "empty object": ([{}], "None is not one of"),
    "only system": ([{"role": "system", "content": "You are terse."}], NO_USER),
    "only developer": ([{"role": "developer", "content": [{"text": "Be terse."}]}], NO_USER),
    "assistant answer": (
        [{"role": "user", "content": [NATIVE_PART]}, {"role": "assistant", "content": "A dog."}],
        SINGLE_TURN,
    ),
    "assistant first": (
        [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": [NATIVE_PART]}],
        SINGLE_TURN,
    ),
    "only assistant": ([{"role": "assistant", "content": [NATIVE_PART]}], SINGLE_TURN),
    "tool result": (
        [{"role": "user", "content": [NATIVE_PART]}, {"role": "tool", "content": "4", "tool_call_id": "1"}],
        SINGLE_TURN,
    ),
    "two turns with audio": ([{"role": "user", "content": [NATIVE_PART]}] * 2, SINGLE_TURN),
    "a second turn of text": (
        [{"role": "user", "content": [NATIVE_PART]}, {"role": "user", "content": "And now?"}],
        SINGLE_TURN,
    ),
    "audio in system": ([{"role": "system", "content": [NATIVE_PART]}], USER_AUDIO),
    "audio in system and user": (
        [{"role": "system", "content": [COMPATIBLE_PART]}, {"role": "user", "content": [NATIVE_PART]}],
        USER_AUDIO,
    ),
    "content a string": ([{"role": "user", "content": URL}], AUDIO),
    "no content": ([{"role": "user"}], AUDIO),
    "content null": ([{"role": "user", "content": None}], AUDIO),
    "content empty string": ([{"role": "user", "content": ""}], AUDIO),
    "content empty list": ([{"role": "user", "content": []}], AUDIO),
    "content number": ([{"role": "user", "content": 5}], AUDIO),
    "content true": ([{"role": "user", "content": True}], AUDIO),
    "content one part": ([{"role": "user", "content": NATIVE_PART}], AUDIO),
}

PARTS: dict[str, tuple[list[Any], str]] = {
    "a string": ([URL], MODAL),
    "null": ([None], MODAL),
    "a number": ([5], MODAL),
    "a list": ([[NATIVE_PART]], MODAL),
    "empty": ([{}], MODAL),
    "of an unknown key": ([{"sound": URL}], MODAL),
    "of an unknown type": ([{"type": "sound", "sound": URL}], MODAL),
    "type null": ([{"type": None, "audio": URL}], MODAL),
    "type number": ([{"type": 1, "audio": URL}], MODAL),
    "type list": ([{"type": ["audio"], "audio": URL}], MODAL),
    "type object": ([{"type": {}, "audio": URL}], MODAL),
    "type in capitals": ([{"type": "INPUT_AUDIO", "input_audio": {"data": URL}}], MODAL),
    "native image": ([{"image": URL}], MODAL),
    "native image beside audio": ([NATIVE_PART, {"image": URL}], MODAL),
    "image and audio in one part": ([{"audio": URL, "image": URL}], MODAL),
    "native video": ([{"video": URL}], MODAL),
    "image_url": ([{"type": "image_url", "image_url": {"url": URL}}], MODAL),
    "image_url beside audio": ([COMPATIBLE_PART, {"type": "image_url", "image_url": {"url": URL}}], MODAL),
    "video_url": ([{"type": "video_url", "video_url": {"url": URL}}], MODAL),
    "file_id": ([{"type": "file", "file": {"file_id": "f"}}], "'messages.0.content.0.file.file_id' is not supported"),
    "file empty": ([{"type": "file", "file": {}}], AUDIO),
    "file a string": ([{"type": "file", "file": URL}], AUDIO),
    "file_data number": ([{"type": "file", "file": {"file_data": 5}}], AUDIO),
    "a file and an audio": ([{"type": "file", "file": {"file_data": URL}}, NATIVE_PART], ONE_AUDIO),
    "refusal": ([{"type": "refusal", "refusal": "no"}], MODAL),
    "only native text": ([{"text": "What is this?"}], AUDIO),
    "only typed text": ([{"type": "text", "text": "What is this?"}], AUDIO),
    "typed text with audio inside": ([{"type": "text", "text": "x", "audio": URL}], AUDIO),
    "input_audio missing": ([{"type": "input_audio"}], AUDIO),
    "input_audio null": ([{"type": "input_audio", "input_audio": None}], AUDIO),
    "input_audio a string": ([{"type": "input_audio", "input_audio": URL}], AUDIO),
    "input_audio a list": ([{"type": "input_audio", "input_audio": [URL]}], AUDIO),
    "input_audio empty": ([{"type": "input_audio", "input_audio": {}}], AUDIO),
    "input_audio with url": ([{"type": "input_audio", "input_audio": {"url": URL}}], AUDIO),
    "data null": ([{"type": "input_audio", "input_audio": {"data": None}}], AUDIO),
    "data number": ([{"type": "input_audio", "input_audio": {"data": 5}}], AUDIO),
    "data list": ([{"type": "input_audio", "input_audio": {"data": [URL]}}], AUDIO),
    "data empty": ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], AUDIO),
    "audio_url missing": ([{"type": "audio_url"}], AUDIO),
    "audio_url a string": ([{"type": "audio_url", "audio_url": URL}], AUDIO),
    "audio_url empty": ([{"type": "audio_url", "audio_url": {}}], AUDIO),
    "url null": ([{"type": "audio_url", "audio_url": {"url": None}}], AUDIO),
    "url number": ([{"type": "audio_url", "audio_url": {"url": 5}}], AUDIO),
    "url empty": ([{"type": "audio_url", "audio_url": {"url": ""}}], AUDIO),
    "audio null": ([{"audio": None}], AUDIO),
    "audio number": ([{"audio": 5}], AUDIO),
    "audio true": ([{"audio": True}], AUDIO),
    "audio empty": ([{"audio": ""}], AUDIO),
    "audio object": ([{"audio": {"url": URL}}], AUDIO),
    "audio empty list": ([{"audio": []}], AUDIO),
    "audio list of number": ([{"audio": [5]}], AUDIO),
    "audio nested list": ([{"audio": [[URL]]}], AUDIO),
    "audio list of two": ([{"audio": [URL, URL]}], ONE_AUDIO),
    "typed audio missing": ([{"type": "audio"}], AUDIO),
    "two native audios": ([NATIVE_PART, NATIVE_PART], ONE_AUDIO),
    "two input_audios": ([COMPATIBLE_PART, COMPATIBLE_PART], ONE_AUDIO),
    "one audio of each kind": ([NATIVE_PART, COMPATIBLE_PART], ONE_AUDIO),
    "two audios in one part": ([{"audio": URL, "audio_url": {"url": URL}}], ONE_AUDIO),
    "a thousand audios": ([NATIVE_PART] * 1000, ONE_AUDIO),
}

REFERENCES: dict[str, str] = {
    "file URL": "file:///etc/passwd",
    "file URL with host": "file://localhost/etc/passwd",
    "absolute path": "/etc/passwd",
    "relative path": "./clip.wav",
    "name": "clip.wav",
    "Windows path": "C:\\clips\\a.wav",
    "UNC path": "\\\\server\\share\\a.wav",
    "blank": " ",
    "ftp": "ftp://media.example/a.wav",
    "s3": "s3://bucket/a.wav",
    "rtsp": "rtsp://media.example/a",
    "gopher": "gopher://127.0.0.1:6379/_PING",
    "javascript": "javascript:alert(1)",
    "blob": "blob:https://media.example/1",
    "scheme only": "http:",
    "no host": "http://",
    "no host, TLS": "https://",
    "path without host": "http:///a.wav",
    "one slash": "http:/media.example/a.wav",
    "no scheme": "//media.example/a.wav",
    "host without scheme": "media.example/a.wav",
    "open bracket": "http://[::1/a.wav",
    "user without host": "http://user@",
    "line break in URL": "http://media.example/a\r\nhost: evil",
    "space in host": "http://media example/a.wav",
    "tab in URL": "http://media.exa\tmple/a.wav",
    "NUL in URL": "http://media.example/a\0.wav",
    "long URL": f"https://media.example/{'a' * 9000}",
    "data without comma": "data:audio/wav;base64",
    "data without base64": "data:audio/wav,abc",
    "data of text": "data:text/plain;charset=utf-8,hello",
    "data of other encoding": "data:audio/wav;base32,MFRGG===",
    "bare data": "data:",
    "data with a late comma": f"data:{'a' * 2000};base64,AAAA",
    "data with a comma in quotes alone": 'data:audio/ogg;x=";base64,AAAA"',
    "data with base64 in quotes alone": 'data:audio/ogg;x=";base64",AAAA',
    "data with an open quote": 'data:audio/ogg;codecs="opus;base64,AAAA',
    "data not ASCII": "data:audio/wav;base64,UklGRé",
    "upload without its header": "oss://dashscope-instant/0/2025-11-18/1/a.wav",
    "upload with one slash": "oss:/dashscope-instant/a.wav",
    "HTML": "<audio src='https://media.example/a.wav'>",
    "base64 of text": b64encode(b"hello, this is no audio at all").decode(),
    "base64 of an image": b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR").decode(),
    "base64 of zeros": b64encode(bytes(100)).decode(),
    "the manual's placeholder": "SUQzBAAAAAAAI1RTU0UAAAAPAAADTGF2ZjU4LjI5LjEwMAAAAAAAAAAAAAAA//PAxABg/BXKeYAAA…....",
}

NOT_AUDIO = "The audio format is illegal and cannot be opened"

CLIPS: dict[str, tuple[str, str]] = {
    "nothing": ("data:audio/wav;base64,", "The audio is empty"),
    "blanks": ("data:audio/wav;base64, \n ", "The audio is empty"),
    "not base64": ("data:audio/wav;base64,UklG*JAAAABXQVZF", BAD_URL),
    "a placeholder": ("data:audio/wav;base64,SUQzBAAAAAAAI1RTU0UAAAAP....", BAD_URL),
    "padding inside": ("data:audio/wav;base64,Uk==lGRiQAAABXQVZF", BAD_URL),
    "one digit": ("data:audio/wav;base64,U", BAD_URL),
    "text": (data_url("audio/wav", b"hello, this is no audio at all"), NOT_AUDIO),
    "HTML": (data_url("audio/mpeg", b"<html><body>404</body></html>"), NOT_AUDIO),
    "an image": (data_url("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), NOT_AUDIO),
    "a playlist": (data_url("audio/x-mpegurl", b"#EXTM3U\nfile:///etc/passwd"), NOT_AUDIO),
    "zeros": (data_url("audio/wav", bytes(1000)), NOT_AUDIO),
    "a lone magic": (data_url("audio/wav", b"RIFF"), NOT_AUDIO),
}

_OVERSIZE = "data:audio/wav;base64," + "A" * (10 * 1024 * 1024)


def _shared(dialect: int) -> Iterator[Case]:
    """Yield the cases that both dialects have; `dialect` 0 is native, 1 compatible."""
    request, code = (native, compatible)[dialect], INVALID[dialect]
    for name, body in BODIES.items():
        yield Case(f"body: {name}", body, BODY, code)
    for name, model in MODELS.items():
        if dialect == 0:
            yield Case(f"model: {name}", request(GOOD, model), "Model not exist.", code)
        else:
            yield Case(f"model: {name}", request(GOOD, model), "The model `", "model_not_found", 404)
    for name, model in {"a number": "5", "a list": f'["{MODEL}"]', "an object": "{}", "true": "true"}.items():
        yield Case(f"model: {name}", request(GOOD, model), "'model' must be String", code)
    for name, (messages, message) in MESSAGES.items():
        yield Case(f"messages: {name}", request(json.dumps(messages)), message, code)
    for name, (parts, message) in PARTS.items():
        yield Case(f"part: {name}", request(user(*parts)), message, code)
    for name, reference in REFERENCES.items():
        part = {"audio": reference} if dialect == 0 else {"type": "input_audio", "input_audio": {"data": reference}}
        yield Case(f"reference: {name}", request(user(part)), BAD_URL, code)
    for name, (clip, message) in CLIPS.items():
        part = {"audio": clip} if dialect == 0 else {"type": "audio_url", "audio_url": {"url": clip}}
        yield Case(f"clip: {name}", request(user(part)), message, code, beyond_codec="empty" not in message)
    for name, value, message in (*PARAMETERS, *(NATIVE_ONLY, COMPATIBLE_ONLY)[dialect]):
        body = request(GOOD, parameters=f'{{"{name}":{value}}}')
        yield Case(f"parameter: {name}={value[:48]}", body, message, code)
    headers = {"x-dashscope-ossresourceresolve": "enable"}
    yield Case("reference: upload without key", request(user({"audio": "oss://"})), BAD_URL, code, headers=headers)
    headers = {"x-dashscope-ossresourceresolve": "disable"}
    yield Case("reference: upload, not resolved", request(user({"audio": "oss://a"})), BAD_URL, code, headers=headers)


def _native_cases() -> Iterator[Case]:
    yield from _shared(0)
    for name, model in {"null": "null", "empty": '""'}.items():
        yield Case(f"model: {name}", native(GOOD, model), 'Required parameter "model" missing', "BadRequest.EmptyModel")
    body = b'{"input":{"messages":[]}}'
    yield Case("model: absent", body, 'Required parameter "model" missing', "BadRequest.EmptyModel")
    either = 'Either "prompt" or "messages" must exist and cannot both be none'
    for name, value, message, code in (
        ("absent", None, "Required input parameter missing from request.", "BadRequest.EmptyInput"),
        ("null", "null", "Required input parameter missing from request.", "BadRequest.EmptyInput"),
        ("a list", "[]", "'input' must be Object", INVALID[0]),
        ("a string", '"hello"', "'input' must be Object", INVALID[0]),
        ("a number", "5", "'input' must be Object", INVALID[0]),
        ("empty", "{}", either, INVALID[0]),
        ("messages null", '{"messages":null}', either, INVALID[0]),
        ("messages empty", '{"messages":[]}', either, INVALID[0]),
        ("only a prompt", '{"prompt":"Describe."}', AUDIO, INVALID[0]),
    ):
        rest = "" if value is None else f',"input":{value}'
        yield Case(f"input: {name}", f'{{"model":"{MODEL}"{rest}}}'.encode(), message, code)
    for value in ("[]", '"x"', "5", "true"):
        yield Case(f"parameters: {value}", native(GOOD, parameters=value), "'parameters' must be Object", INVALID[0])
    yield Case("clip: too large", native(user({"audio": _OVERSIZE})), TOO_LARGE, "BadRequest.TooLarge")
    refused = "Current user api does not support asynchronous calls."
    yield Case("header: async", WHOLE, refused, "AccessDenied", 403, {"x-dashscope-async": "enable"})
    headers = {"x-dashscope-encryptionkey": "a2V5"}
    yield Case("header: encryption", WHOLE, "not supported", "UnsupportedOperation", headers=headers)


def _compatible_cases() -> Iterator[Case]:
    yield from _shared(1)
    yield Case("model and messages: absent", b"{}", "[] is too short - 'messages'", INVALID[1])
    for name, rest in {"absent": "", "null": ',"messages":null', "empty": ',"messages":[]'}.items():
        body = f'{{"model":"{MODEL}"{rest}}}'.encode()
        yield Case(f"messages: {name}", body, "[] is too short - 'messages'", INVALID[1])
    yield Case("native request", native(GOOD), "[] is too short - 'messages'", INVALID[1])
    yield Case("clip: too large", compatible(user({"audio": _OVERSIZE})), TOO_LARGE, INVALID[1])


DASHSCOPE = tuple(_native_cases())
OPENAI = tuple(_compatible_cases())
