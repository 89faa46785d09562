"""DashScope's 1.x API for Python: `MultiModalConversation` and `AioMultiModalConversation`, with their uploads."""

from __future__ import annotations

import asyncio
from typing import Any

import dashscope

from tests.sdk.drivers.calls import Call, Outcome, perform_calls


def perform(call: Call, outcome: Outcome) -> None:
    """Make the call. An error is returned as a response, not raised."""
    # Uploads read the address from here only.
    dashscope.base_http_api_url = f"{call.origin}/api/v1"
    match call.action:
        case "caption" if call.asynchronous:
            asyncio.run(_caption_async(call, outcome))
        case "caption" if call.stream:
            responses = dashscope.MultiModalConversation.call(**_arguments(call))
            for response in responses:
                _take(response, outcome)
                if outcome.left(call):
                    break
            responses.close()
        case "caption":
            _take(dashscope.MultiModalConversation.call(**_arguments(call)), outcome)
        case "models":
            response = dashscope.Models.list(api_key=call.api_key)
            _take_error(response, outcome)
            outcome.models = [model["model"] for model in response.output["models"]] if response.output else []
        case "model":
            response = dashscope.Models.get(call.model, api_key=call.api_key)
            _take_error(response, outcome)
            outcome.models = [response.output["model"]] if response.output else []
        case "nowhere":
            _take_error(dashscope.TextEmbedding.call(model=call.model, input="x", api_key=call.api_key), outcome)


async def _caption_async(call: Call, outcome: Outcome) -> None:
    answer = await dashscope.AioMultiModalConversation.call(**_arguments(call))
    if not call.stream:
        _take(answer, outcome)
        return
    async for response in answer:
        _take(response, outcome)
        if outcome.left(call):
            break
    await answer.aclose()


def _arguments(call: Call) -> dict[str, Any]:
    stream: dict[str, Any] = {"stream": True} if call.stream else {}
    if call.stream in {"delta", "cumulative"}:
        stream["incremental_output"] = call.stream == "delta"
    return {
        "api_key": call.api_key,
        "model": call.model,
        "messages": [{"role": "user", "content": [{"audio": call.reference}]}],
        "headers": dict(call.headers),
        "request_timeout": call.timeout_s,
        **stream,
        **call.parameters,
    }


def _take(response: Any, outcome: Outcome) -> None:
    _take_error(response, outcome)
    if response.output is None:
        return
    outcome.usage = dict(response.usage)
    choice = response.output.choices[0]
    content = choice.message.content
    outcome.add(content[0]["text"] if content else "", choice.finish_reason)


def _take_error(response: Any, outcome: Outcome) -> None:
    outcome.status, outcome.request_id = int(response.status_code), response.request_id
    outcome.code, outcome.message = response.code or None, response.message or None


if __name__ == "__main__":
    perform_calls(perform)
