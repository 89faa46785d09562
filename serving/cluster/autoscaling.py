"""How many replicas there should be: pure functions of what replicas tell, so that tests can simulate days of load.

The unit of work is a second of audio: requests differ by a factor of a thousand. `cluster.py` hands these to Ray Serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Rule:
    """Bounds and pace of one kind of replica.

    One replica is meant to have `work_per_replica` under way: audio-seconds for an engine, clips per audio worker for a
    frontend. More replicas come at once; fewer only when for `down_after_s` fewer would have been enough.
    """

    least: int
    most: int
    work_per_replica: float
    down_after_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What one replica tells: work under way, waiting included, and how long the last ones waited before they began."""

    work: float
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class History:
    """How many replicas were needed, and when: `(time_s, count)`, oldest first, only what may still matter."""

    needed: tuple[tuple[float, int], ...] = ()


LONGEST_WAIT_S = 2.0
"""Waiting longer than this before work begins calls for one replica more, whatever the count of seconds says."""


def replicas(
    rule: Rule, reports: Iterable[Report], *, current: int, unserved: float, now_s: float, history: History
) -> tuple[int, History]:
    """How many replicas to have, and what to remember for the next call.

    `current` counts the replicas that were asked for last; `reports` come from those of them that run. `unserved`
    counts requests that found no replica at all.
    """
    reports = list(reports)
    needed = math.ceil(sum(report.work for report in reports) / rule.work_per_replica - 1e-9)
    if reports and sum(report.wait_s for report in reports) / len(reports) > LONGEST_WAIT_S:
        # One more than those that run, not than those that were asked for: the wait lasts until these have started.
        needed = max(needed, len(reports) + 1)
    if unserved > 0:
        needed = max(needed, 1)
    needed = min(max(needed, rule.least), rule.most)
    remembered = history.needed
    if not remembered or current > remembered[0][1]:
        # More than this function has asked for: it has just begun (maybe since the controller was lost), or Ray has
        # started a first replica for one who asks, which has told nothing yet. Either may be needed.
        remembered = ((now_s, min(current, rule.most)),)
    # Sliding maximum: a count only matters as long as no later one is as high.
    kept = [(at, count) for at, count in remembered if now_s - at < rule.down_after_s and count > needed]
    kept.append((now_s, needed))
    peak = kept[0][1]
    return (needed if needed >= current else min(current, peak)), History(tuple(kept))


def reports_of(metrics: Mapping[str, Mapping[K, float]], work: str, wait_s: str) -> list[Report]:
    """Reports from Ray Serve's table of metrics by name and replica."""
    waits = metrics.get(wait_s, {})
    return [Report(value, waits.get(replica, 0.0)) for replica, value in metrics.get(work, {}).items()]
