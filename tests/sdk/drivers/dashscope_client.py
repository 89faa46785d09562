"""`dashscope.Client` and `dashscope.AsyncClient` of 2.x, in both of their protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import dashscope

from tests.sdk.drivers.calls import Call, Outcome, perform_calls


def perform(call: Call, outcome: Outcome) -> None:
    """Make the call."""
    settings: dict[str, Any] = {
        "base_url": call.origin + ("/api/v1" if call.protocol == "native" else "/compatible-mode/v1"),
        "api_key": call.api_key,
        "protocol": call.protocol,
        "max_retries": call.retries,
        "timeout": call.timeout_s,
    }
    if call.asynchronous:
        asyncio.run(_perform_async(settings, call, outcome))
        return
    with dashscope.Client(**settings) as client:
        match call.action:
            case "caption" if call.stream:
                stream = client.multimodal.chat.create(**_arguments(call))
                for chunk in stream:
                    _take_chunk(chunk, outcome)
                    if outcome.left(call):
                        break
                outcome.request_id = stream.headers["x-request-id"]
                stream.close()
            case "caption":
                _take_completion(client.multimodal.chat.create(**_arguments(call)), outcome)
            case "models":
                outcome.models = [model.model for model in client.models.list().models]
            case "model":
                outcome.models = [client.models.get(call.model).model]
            case "nowhere":
                client.embeddings.create(model=call.model, input="x")


async def _perform_async(settings: dict[str, Any], call: Call, outcome: Outcome) -> None:
    async with dashscope.AsyncClient(**settings) as client:
        match call.action:
            case "caption" if call.stream:
                stream = await client.multimodal.chat.create(**_arguments(call))
                async for chunk in stream:
                    _take_chunk(chunk, outcome)
                    if outcome.left(call):
                        break
                outcome.request_id = stream.headers["x-request-id"]
                await stream.aclose()
            case "caption":
                _take_completion(await client.multimodal.chat.create(**_arguments(call)), outcome)
            case "models":
                outcome.models = [model.model for model in (await client.models.list()).models]
            case "model":
                outcome.models = [(await client.models.get(call.model)).model]
            case "nowhere":
                await client.embeddings.create(model=call.model, input="x")


def _arguments(call: Call) -> dict[str, Any]:
    stream: dict[str, Any] = {"stream": True} if call.stream else {}
    if call.stream in {"delta", "cumulative"}:
        stream["incremental_output"] = call.stream == "delta"
    return {
        "model": call.model,
        "messages": [{"role": "user", "content": [{"type": "audio", "url": call.reference}]}],
        **stream,
        **call.parameters,
    }


def _take_completion(completion: Any, outcome: Outcome) -> None:
    outcome.request_id = completion.request_id
    outcome.usage = completion.usage.model_dump()
    outcome.add(completion.output_text, completion.choices[0].finish_reason)


def _take_chunk(chunk: Any, outcome: Outcome) -> None:
    if chunk.delta is not None:
        outcome.add(chunk.delta.content, chunk.choices[0].finish_reason)
    if chunk.usage is not None:
        outcome.usage = chunk.usage.model_dump()


if __name__ == "__main__":
    perform_calls(perform)
