"""Time on the wire: pieces come when they are made, keep-alives disturb nobody, who leaves frees the place."""

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
"""How often time is measured: the machine may stall for a moment, but what bunches pieces up does so every time."""

TEXT = re.compile(rb'data: ?\{.*"(?:text|content)":"[^"]')


@pytest.fixture(scope="module")
def paced() -> Iterator[RunningService]:
    """Six tokens, one each 0.1 s, and no keep-alive in that time that could push them along."""
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
    """Captions that nobody waits for the end of."""
    flags = ("--fake-ttft-s=0.1", "--fake-tpot-s=0.02", "--fake-tokens=30000")
    with RunningService("--engine=fake", "--audio-workers=1", *flags) as service:
        yield service


def text_times(relay: Relay) -> list[float]:
    """When each frame with text had come from the service."""
    times, unread = [], b""
    for at_s, piece in relay.arrivals():
        *frames, unread = (unread + piece).split(b"\n\n")
        times += [at_s for frame in frames if TEXT.search(frame)]
    return times


@every_client
def test_pieces_come_as_they_are_made(client: Client, tap: Tap, paced: RunningService) -> None:
    """Pieces leave the service at the engine's pace, and the client's user sees each within 100 ms."""
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
def test_keep_alives_disturb_nobody(client: Client, stream: str, tap: Tap, beating: RunningService) -> None:
    """With keep-alives before and between the frames, every client hands out what it would without."""
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
    pytest.fail(f"in {ATTEMPTS} attempts, last with {beats} keep-alives before and between the frames")


@every_client
def test_leaving_a_stream_frees_the_place(client: Client, tap: Tap, endless: RunningService) -> None:
    """A user who breaks off a stream leaves nothing running."""
    cancelled = endless.metric("captioner_requests_total", outcome="cancelled")
    outcome = tap.perform(client, endless, audio=CLIP, stream="default", leave_after=3)
    assert len(outcome.pieces) == 3, outcome.message
    endless.settle(timeout_s=5)
    assert endless.metric("captioner_requests_total", outcome="cancelled") == cancelled + 1


@every_client
def test_client_that_gives_up_frees_the_place(client: Client, tap: Tap, endless: RunningService) -> None:
    """A client that waits no longer for a whole answer leaves nothing running."""
    outcome = tap.perform(client, endless, audio=CLIP, timeout_s=0.6)
    assert outcome.error is not None
    assert re.search("timed? ?out|abort", f"{outcome.error} {outcome.message}", re.IGNORECASE)
    endless.settle(timeout_s=5)


def test_killed_client_frees_the_place(endless: RunningService, tap: Tap) -> None:
    """A client that dies in the middle of a stream leaves nothing running."""
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
