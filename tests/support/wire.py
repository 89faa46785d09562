"""Requests and answers of both dialects, as a plain HTTP client writes and reads them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import soundfile

MODEL = "qwen3-omni-30b-a3b-captioner"
NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"
COMPATIBLE = "/compatible-mode/v1/chat/completions"


def wav(seconds: float, *, frequency_hz: float = 440.0) -> bytes:
    """Return a 16 kHz mono WAV of a tone."""
    time_s = np.arange(round(16_000 * seconds)) / 16_000
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * frequency_hz * time_s), 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def data_url(audio: bytes, mime: str = "") -> str:
    """Return the audio as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(audio).decode()}"


def native_body(audio: str, **parameters: object) -> dict[str, Any]:
    """Return a DashScope request for one clip."""
    return {
        "model": MODEL,
        "input": {"messages": [{"role": "user", "content": [{"audio": audio}]}]},
        "parameters": parameters,
    }


def compatible_body(audio: str, **parameters: object) -> dict[str, Any]:
    """Return an OpenAI request for one clip."""
    part = {"type": "input_audio", "input_audio": {"data": audio}}
    return {"model": MODEL, "messages": [{"role": "user", "content": [part]}], **parameters}


@dataclass(frozen=True)
class Answer:
    """A caption's response of either dialect, in one shape."""

    text: str
    finish_reason: str
    usage: dict[str, Any]
    headers: httpx.Headers


def ask_native(url: str, audio: str, *, headers: dict[str, str] | None = None, **parameters: object) -> Answer:
    """Request a caption in the DashScope dialect, not streamed."""
    response = httpx.post(url + NATIVE, json=native_body(audio, **parameters), headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["output"]["choices"][0]
    return Answer(choice["message"]["content"][0]["text"], choice["finish_reason"], body["usage"], response.headers)


def ask_compatible(url: str, audio: str, *, headers: dict[str, str] | None = None, **parameters: object) -> Answer:
    """Request a caption in the OpenAI dialect, not streamed."""
    response = httpx.post(url + COMPATIBLE, json=compatible_body(audio, **parameters), headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["choices"][0]
    return Answer(choice["message"]["content"], choice["finish_reason"], body["usage"], response.headers)


def upload(url: str, audio: bytes, *, name: str = "clip", headers: dict[str, str] | None = None) -> str:
    """Upload a file as DashScope's clients do, and return its `oss://` address."""
    query = {"action": "getPolicy", "model": MODEL}
    policy = httpx.get(f"{url}/api/v1/uploads", params=query, headers=headers).json()["data"]
    key = f"{policy['upload_dir']}/{name}"
    response = httpx.post(policy["upload_host"], data=upload_fields(policy, key), files={"file": (name, audio)})
    assert response.status_code == 200, response.text
    return f"oss://{key}"


def upload_fields(policy: dict[str, Any], key: str) -> dict[str, str]:
    """Return the form's fields before the file."""
    return {
        "OSSAccessKeyId": policy["oss_access_key_id"],
        "Signature": policy["signature"],
        "policy": policy["policy"],
        "key": key,
        "x-oss-object-acl": policy["x_oss_object_acl"],
        "x-oss-forbid-overwrite": policy["x_oss_forbid_overwrite"],
        "success_action_status": "200",
    }


def events(stream: str) -> list[Any]:
    """Return the JSON payloads of an event stream, without `[DONE]` and comments."""
    payloads = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    return [json.loads(payload) for payload in payloads if payload != "[DONE]"]
