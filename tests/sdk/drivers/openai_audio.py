"""The official OpenAI client for Python: `audio.transcriptions` and `audio.translations`.

The action names the resource; `inline_file` is the file; formats other than `json` come in `parameters`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from tests.sdk.drivers.calls import Call, Outcome, perform_calls


def perform(call: Call, outcome: Outcome) -> None:
    """Make the call."""
    settings: dict[str, Any] = {
        "base_url": f"{call.origin}/v1",
        "api_key": call.api_key,
        "max_retries": call.retries,
        "timeout": call.timeout_s,
    }
    if call.asynchronous:
        asyncio.run(_perform_async(settings, call, outcome))
        return
    with OpenAI(**settings) as client:
        answer = getattr(client.audio, call.action).create(**_arguments(call))
        if not call.stream:
            _take(answer, outcome)
            return
        for event in answer:
            _take_event(event, outcome)


async def _perform_async(settings: dict[str, Any], call: Call, outcome: Outcome) -> None:
    async with AsyncOpenAI(**settings) as client:
        answer = await getattr(client.audio, call.action).create(**_arguments(call))
        if not call.stream:
            _take(answer, outcome)
            return
        async for event in answer:
            _take_event(event, outcome)


def _arguments(call: Call) -> dict[str, Any]:
    stream = {"stream": True} if call.stream else {}
    return (
        {"file": Path(call.inline_file), "model": call.model, "extra_headers": call.headers} | stream | call.parameters
    )


def _take(answer: Any, outcome: Outcome) -> None:
    if isinstance(answer, str):
        outcome.add(answer, None)
        return
    outcome.request_id = answer._request_id
    usage = getattr(answer, "usage", None)
    outcome.usage = usage if isinstance(usage, dict) or usage is None else usage.model_dump()
    outcome.add(answer.text, None)
    outcome.models = [type(answer).__name__]


def _take_event(event: Any, outcome: Outcome) -> None:
    if event.type == "transcript.text.delta":
        outcome.add(event.delta, None)
        return
    outcome.usage = event.usage.model_dump()
    outcome.models = [event.text]


if __name__ == "__main__":
    perform_calls(perform)
