"""The real engine behind the real clients: the same greedy caption for all, streamed and not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.sdk.clients import CLIENTS, Client, every_way
from tests.support.wire import ask_native, data_url, wav

if TYPE_CHECKING:
    from tests.sdk.tap import Tap
    from tests.support.service import RunningService

CLIP = data_url(wav(2))
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 48}

# One client of each kind and version: awaiting a call makes no difference to the engine.
KINDS = {(client.environment, client.driver, client.protocol): client for client in CLIENTS}.values()


@pytest.fixture(scope="module")
def expected(embedded_service: RunningService) -> tuple[str, str, int]:
    """The answer to a plain HTTP client: text, finish reason, total tokens."""
    answer = ask_native(embedded_service.url, CLIP, **GREEDY)
    return answer.text, answer.finish_reason, answer.usage["total_tokens"]


@pytest.mark.engine
@every_way
@pytest.mark.parametrize("client", KINDS, ids=lambda client: client.name)
def test_same_caption_for_all(
    client: Client, stream: str, tap: Tap, embedded_service: RunningService, expected: tuple[str, str, int]
) -> None:
    """Every client receives vLLM's caption of the embedded checkpoint, and its usage."""
    outcome = tap.perform(client, embedded_service, audio=CLIP, stream=stream, parameters=GREEDY)
    assert outcome.error is None, outcome.message
    assert (client.caption(outcome, stream), outcome.finish_reason, outcome.tokens[2]) == expected
    assert outcome.tokens[0] == 25 + 8
