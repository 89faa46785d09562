"""The official OpenAI client for Python: `OpenAI` and `AsyncOpenAI`."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI, OpenAI

from tests.sdk.drivers.calls import Call, Outcome, perform_calls


def perform(call: Call, outcome: Outcome) -> None:
    """Make the call."""
    settings: dict[str, Any] = {
        "base_url": f"{call.origin}/compatible-mode/v1",
        "api_key": call.api_key,
        "max_retries": call.retries,
        "timeout": call.timeout_s,
    }
    if call.asynchronous:
        asyncio.run(_perform_async(settings, call, outcome))
        return
    with OpenAI(**settings) as client:
        match call.action:
            case "caption" if call.stream:
                with client.chat.completions.create(**_arguments(call)) as stream:
                    outcome.request_id = stream.response.headers["x-request-id"]
                    for chunk in stream:
                        _take_chunk(chunk, outcome)
                        if outcome.left(call):
                            break
            case "caption":
                _take_completion(client.chat.completions.create(**_arguments(call)), outcome)
            case "models":
                outcome.models = [model.id for model in client.models.list()]
            case "model":
                outcome.models = [client.models.retrieve(call.model).id]
            case "nowhere":
                client.embeddings.create(model=call.model, input="x")


async def _perform_async(settings: dict[str, Any], call: Call, outcome: Outcome) -> None:
    async with AsyncOpenAI(**settings) as client:
        match call.action:
            case "caption" if call.stream:
                async with await client.chat.completions.create(**_arguments(call)) as stream:
                    outcome.request_id = stream.response.headers["x-request-id"]
                    async for chunk in stream:
                        _take_chunk(chunk, outcome)
                        if outcome.left(call):
                            break
            case "caption":
                _take_completion(await client.chat.completions.create(**_arguments(call)), outcome)
            case "models":
                outcome.models = [model.id async for model in client.models.list()]
            case "model":
                outcome.models = [(await client.models.retrieve(call.model)).id]
            case "nowhere":
                await client.embeddings.create(model=call.model, input="x")


def _arguments(call: Call) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": call.reference}}
    stream = {"stream": True, "stream_options": {"include_usage": True}} if call.stream else {}
    return {
        "model": call.model,
        "messages": [{"role": "user", "content": [part]}],
        "extra_headers": call.headers,
        **stream,
        **call.parameters,
    }


def _take_completion(completion: Any, outcome: Outcome) -> None:
    outcome.request_id = completion._request_id
    outcome.usage = completion.usage.model_dump()
    outcome.add(completion.choices[0].message.content, completion.choices[0].finish_reason)


def _take_chunk(chunk: Any, outcome: Outcome) -> None:
    if chunk.choices:
        outcome.add(chunk.choices[0].delta.content, chunk.choices[0].finish_reason)
    if chunk.usage is not None:
        outcome.usage = chunk.usage.model_dump()


if __name__ == "__main__":
    perform_calls(perform)
