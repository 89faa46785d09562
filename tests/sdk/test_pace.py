"""Timing on the wire: pieces arrive as they are made, keep-alives are harmless, a disconnect releases the slot."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.sdk.clients import Client, every_client, every_stream
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, ask_native, compatible_body, data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sdk.relay import Relay
    from tests.sdk.tap import Tap

CLIP = data_url(wav(2))
TOKENS, TPOT_S = 6, 0.1
BEATING_TOKENS = 8
ATTEMPTS = 5
"""Attempts at each measurement: the machine may pause for a moment, but code that bunches pieces does so every time."""

TEXT = re.compile(rb'data: ?\{.*"(?:text|content)":"[^"]')


@pytest.fixture(scope="module")
def paced() -> Iterator[RunningService]:
    """Six tokens, one each 0.1 s, and no keep-alive in that time that could flush them."""
    flags = (f"--fake-tpot-s={TPOT_S}", f"--fake-tokens={TOKENS}")
    with RunningService("--engine=fake", "--audio-workers=1", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def beating() -> Iterator[RunningService]:
    """Eight tokens, one each 50 ms, the first after 150 ms, and a keep-alive each 10 ms."""
    flags = ("--fake-ttft-s=0.15", "--fake-tpot-s=0.05", f"--fake-tokens={BEATING_TOKENS}")
    beats = ("--first-byte-timeout-s=0.01", "--heartbeat-s=0.01")
    with RunningService("--engine=fake", "--audio-workers=1", *flags, *beats) as service:
        yield service


@pytest.fixture(scope="module")
def endless() -> Iterator[RunningService]:
    """Captions that last longer than any client waits."""
    flags = ("--fake-ttft-s=0.1", "--fake-tpot-s=0.02", "--fake-tokens=30000")
    with RunningService("--engine=fake", "--audio-workers=1", *flags) as service:
        yield service


def text_times(relay: Relay) -> list[float]:
    """Return the times at which events with text arrived from the service, in seconds."""
    times, unread = [], b""
    for at_s, piece in relay.arrivals():
        *events, unread = (unread + piece).split(b"\n\n")
        times += [at_s for event in events if TEXT.search(event)]
    return times


@every_client
def test_pieces_arrive_as_they_are_made(client: Client, tap: Tap, paced: RunningService) -> None:
    """Pieces leave the service at the engine's pace, and the client yields each within 100 ms."""
    for _ in range(ATTEMPTS):
        before = len(text_times(tap.relay(paced)))
        outcome = tap.perform(client, paced, audio=CLIP, stream="default")
        sent = text_times(tap.relay(paced))[before:][:TOKENS]
        seen = [piece.at_s for piece in outcome.pieces if piece.text][:TOKENS]
        assert len(sent) == len(seen) == TOKENS
        gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
        delays = [there - here for here, there in zip(sent, seen, strict=True)]
        if min(gaps) > TPOT_S / 2 and max(delays) < 0.1:
            return
    pytest.fail(f"in {ATTEMPTS} attempts, last with gaps of {gaps} and delays of {delays}")


@every_stream
def test_keep_alives_are_harmless(client: Client, stream: str, tap: Tap, beating: RunningService) -> None:
    """With keep-alives before and between the events, every client yields the same as without."""
    caption = ask_native(beating.url, CLIP).text
    for _ in range(ATTEMPTS):
        outcome = tap.perform(client, beating, audio=CLIP, stream=stream)
        assert outcome.error is None, outcome.message
        assert client.caption(outcome, stream) == caption
        assert (outcome.finish_reason, outcome.tokens) == ("stop", (25 + 8, BEATING_TOKENS, 33 + BEATING_TOKENS))
        before, *between, _ = re.split(rb"data: ?\{.*\n\n", tap.exchanges()[-1].body)
        beats = [gap.count(b": keep-alive\n\n") for gap in (before, *between)]
        if sum(count > 0 for count in beats) > BEATING_TOKENS - 2:
            return
    pytest.fail(f"in {ATTEMPTS} attempts, last with {beats} keep-alives before and between the events")


@every_client
def test_leaving_a_stream_releases_the_slot(client: Client, tap: Tap, endless: RunningService) -> None:
    """A user who breaks off a stream leaves no request running."""
    disconnected = endless.metric("captioner_requests_total", outcome="disconnected")
    outcome = tap.perform(client, endless, audio=CLIP, stream="default", leave_after=3)
    assert len(outcome.pieces) == 3, outcome.message
    endless.settle(timeout_s=5)
    assert endless.metric("captioner_requests_total", outcome="disconnected") == disconnected + 1


@every_client
def test_client_that_gives_up_releases_the_slot(client: Client, tap: Tap, endless: RunningService) -> None:
    """A client that times out on a response that is not streamed leaves no request running."""
    outcome = tap.perform(client, endless, audio=CLIP, timeout_s=0.6)
    assert outcome.error is not None
    assert re.search("timed? ?out|abort", f"{outcome.error} {outcome.message}", re.IGNORECASE)
    endless.settle(timeout_s=5)


def test_killed_client_releases_the_slot(endless: RunningService, tap: Tap) -> None:
    """A client that is killed in mid-stream leaves no request running."""
    body = json.dumps(compatible_body(CLIP, stream=True))
    command = ["curl", "--silent", "--no-buffer", "--json", "@-", tap.relay(endless).origin + COMPATIBLE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as curl:
        assert curl.stdin is not None
        assert curl.stdout is not None
        curl.stdin.write(body.encode())
        curl.stdin.close()
        assert curl.stdout.readline().startswith(b"data: ")
        curl.kill()
    endless.settle(timeout_s=5)
