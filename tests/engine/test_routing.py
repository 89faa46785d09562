"""Choice of an engine replica: two random candidates, and the spread of work over a large cluster in virtual time.

The simulation runs the frontends' own code (`KnownLoad`, `choose`); clock, network and engines are simulated.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import pytest

from serving.engine.base import Load
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.routing import KnownLoad, choose
from serving.engine.remote.wire import STATE_INTERVAL_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLIP_S, CLIP_TOKENS = 30.0, 1000
KV_CAPACITY_TOKENS = 867_000
"""KV cache of deploy/profiles/2xa100-80g.toml."""


@dataclass
class View:
    """A replica as one frontend sees it."""

    name: str = ""
    known: KnownLoad = field(default_factory=KnownLoad)
    engine: int = 0
    clips_sent: int = 0
    ready: bool = True

    __hash__ = object.__hash__


def view(name: str, audio_s: float, *, kv_tokens: int = 0, capacity: int = KV_CAPACITY_TOKENS) -> View:
    """A replica that has reported this load."""
    known = KnownLoad()
    known.report(Load(1, 0, audio_s, kv_tokens, capacity), seen=-1)
    return View(name, known)


def picks(views: Sequence[View], count: int, tokens: int = CLIP_TOKENS) -> str:
    """Return the names of the replicas chosen for `count` clips, with a fixed seed, without counting the clips."""
    randomness = random.Random(1)
    return "".join(chosen.name for _ in range(count) if (chosen := choose(views, tokens, randomness)))


def test_the_less_loaded_of_two_random_replicas_is_chosen() -> None:
    """With a fixed seed the choices are these: the busiest of four is never chosen, and the others all are."""
    views = [view(name, audio_s) for name, audio_s in zip("abcd", (10, 20, 30, 40), strict=True)]
    assert picks(views, 40) == "baabaaacabbaaaababcbbbacaaccbcccabbbacab"


def test_a_frontend_chooses_by_two_random_replicas() -> None:
    """`RemoteEngine` makes the same choices with the same seed, and leaves out replicas that refused the clip."""
    engine = RemoteEngine(random.Random(1))
    views = [view(name, audio_s) for name, audio_s in zip("abcd", (10, 20, 30, 40), strict=True)]
    engine._replicas = {each.name: each for each in views}  # type: ignore[misc]
    chosen = [engine._choose(set(), CLIP_TOKENS) for _ in range(20)]
    assert "".join(each.name for each in chosen) == "baabaaacabbaaaababcb"  # type: ignore[union-attr]
    assert engine._choose(set(views[:3]), CLIP_TOKENS) is views[3]  # type: ignore[arg-type,comparison-overlap]


def test_the_less_loaded_of_two_replicas_always_gets_the_clip() -> None:
    """Two replicas are both candidates each time; equal ones share at random; one alone, and none, are no error."""
    assert picks([view("a", 31), view("b", 30)], 20) == "b" * 20
    assert sorted(set(picks([view("a", 30), view("b", 30)], 20))) == ["a", "b"]
    assert picks([view("a", 31)], 3) == "aaa"
    assert picks([], 3) == ""


def test_replicas_without_room_are_chosen_only_if_none_has_room() -> None:
    """Candidates are drawn from the replicas whose KV cache has room for the clip, however busy these are."""
    full = [view(name, 10, kv_tokens=KV_CAPACITY_TOKENS - 999) for name in "abc"]
    assert picks([*full, view("d", 5000)], 20) == "d" * 20
    assert sorted(set(picks(full, 20))) == ["a", "b", "c"]
    assert picks([*full, view("d", 5000)], 20, tokens=999) != "d" * 20


def test_what_was_sent_since_the_report_counts() -> None:
    """Clips that the report cannot include add to its seconds and tokens, until a report includes them or they end."""
    known = KnownLoad()
    known.report(Load(1, 0, 100.0, 2000, 5000), seen=3)
    known.sent(4, 30.0, 1000)
    known.sent(5, 60.0, 2000)
    assert known.burden == (190.0, 1.0)
    assert not known.has_room(1)
    known.report(Load(2, 0, 130.0, 3000, 5000), seen=4)
    assert known.burden == (190.0, 1.0)
    known.ended(5)
    assert known.burden == (130.0, 0.6)
    assert known.has_room(2000)
    assert not known.has_room(2001)


def least_loaded(views: Sequence[View], tokens: int, randomness: random.Random) -> View | None:
    """The former choice, of which the simulation shows the herding: the least loaded of all replicas."""
    return min(views, key=lambda each: (not each.known.has_room(tokens), *each.known.burden), default=None)


def simulate(
    frontends: int, engines: int, choice: Callable[[Sequence[View], int, random.Random], View | None]
) -> tuple[float, float, int]:
    """Return captions per engine: mean, those of the busiest engine (mean over the samples), and its peak.

    Clips of 30 s arrive at random, four per second and engine, each at a random frontend; a caption takes 8 s on
    average (exponential). Each engine reports to all frontends each `STATE_INTERVAL_S`, engines one after another.
    Samples are taken at the rate of the reports from 4 s to 8 s.
    """
    randomness = random.Random(7)
    running = [0] * engines
    views = [[View(engine=engine) for engine in range(engines)] for _ in range(frontends)]
    ends: list[tuple[float, int]] = []
    reports = [(STATE_INTERVAL_S * engine / engines, engine) for engine in range(engines)]
    heapq.heapify(reports)
    for row in views:
        for each in row:
            each.known.report(Load(0, 0, 0.0, 0, KV_CAPACITY_TOKENS), seen=-1)
    now, samples = 0.0, [4 + STATE_INTERVAL_S * index for index in range(16)]
    sampled: list[tuple[float, int]] = []
    while samples:
        now += randomness.expovariate(4 * engines)
        while reports[0][0] <= now:
            at, engine = heapq.heapreplace(reports, (reports[0][0] + STATE_INTERVAL_S, reports[0][1]))
            while ends and ends[0][0] <= at:
                running[heapq.heappop(ends)[1]] -= 1
            load = Load(running[engine], 0, CLIP_S * running[engine], CLIP_TOKENS * running[engine], KV_CAPACITY_TOKENS)
            for row in views:
                row[engine].known.report(load, row[engine].clips_sent)
            if samples and samples[0] <= at:
                sampled.append((fmean(running), max(running)))
                del samples[0]
        while ends and ends[0][0] <= now:
            running[heapq.heappop(ends)[1]] -= 1
        row = views[randomness.randrange(frontends)]
        chosen = choice(row, CLIP_TOKENS, randomness)
        assert chosen
        chosen.clips_sent += 1
        chosen.known.sent(chosen.clips_sent, CLIP_S, CLIP_TOKENS)
        running[chosen.engine] += 1
        heapq.heappush(ends, (now + randomness.expovariate(1 / 8), chosen.engine))
    return fmean(mean for mean, _ in sampled), fmean(busiest for _, busiest in sampled), max(top for _, top in sampled)


@pytest.mark.parametrize(
    ("frontends", "engines", "at_most", "peak"),
    [(2, 4, 1.15, 18), (8, 16, 1.25, 21), (40, 100, 1.25, 24), (100, 250, 1.30, 25)],
)
def test_the_busiest_engine_stays_near_the_mean(frontends: int, engines: int, at_most: float, peak: int) -> None:
    """The busiest of 250 engines, chosen among by 100 frontends, has at most 1.3 times the captions of the mean."""
    mean, busiest, top = simulate(frontends, engines, choose)
    assert 14 <= mean <= 19
    assert busiest / mean <= at_most
    assert top <= peak


def test_the_least_loaded_of_all_would_be_flooded() -> None:
    """The simulation shows the fault that two random choices avoid: each frontend takes the same few replicas."""
    mean, busiest, _ = simulate(40, 100, least_loaded)
    assert busiest / mean >= 3.4
