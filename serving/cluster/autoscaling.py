"""Autoscaling: the number of replicas as a pure function of their reports, so that tests can simulate days of load.

The unit of work is a second of audio: requests differ by a factor of a thousand. `deployments.py` connects these
functions to Ray Serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """Bounds and pace of one kind of replica.

    A replica is meant to have `work_per_replica` under way: audio-seconds for an engine, clips per audio worker for a
    frontend. The count rises at once; it falls only when a lower count would have been enough for `scale_down_after_s`.
    """

    min_replicas: int
    max_replicas: int
    work_per_replica: float
    scale_down_after_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Load of one replica: work under way, waiting work included, and how long the latest work waited to begin."""

    work: float
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NeedHistory:
    """Numbers of replicas that were needed: `(time_s, count)`, oldest first, without those that no longer matter."""

    needed: tuple[tuple[float, int], ...] = ()


LONGEST_WAIT_S = 2.0
"""A longer average wait before work begins calls for one replica more, whatever the sum of the work says."""


def target_replicas(
    rule: ScalingRule,
    reports: Iterable[LoadReport],
    *,
    current: int,
    unserved: float,
    now_s: float,
    history: NeedHistory,
) -> tuple[int, NeedHistory]:
    """Return the number of replicas to have, and the history for the next call.

    `current`: the number that was last requested. `reports`: from those of them that run. `unserved`: number of
    requests that found no replica at all.
    """
    reports = list(reports)
    needed = math.ceil(sum(report.work for report in reports) / rule.work_per_replica - 1e-9)
    if reports and sum(report.wait_s for report in reports) / len(reports) > LONGEST_WAIT_S:
        # One more than those that run, not than those that were requested: the wait lasts until these have started.
        needed = max(needed, len(reports) + 1)
    if unserved > 0:
        needed = max(needed, 1)
    needed = min(max(needed, rule.min_replicas), rule.max_replicas)
    remembered = history.needed
    if not remembered or current > remembered[0][1]:
        # More than this function has requested: it has just started (perhaps since the controller was lost), or Ray has
        # started a first replica for a waiting request, and that replica has not reported yet. Either may be needed.
        remembered = ((now_s, min(current, rule.max_replicas)),)
    # Sliding maximum: a count matters only while no later count is as high.
    kept = [(at, count) for at, count in remembered if now_s - at < rule.scale_down_after_s and count > needed]
    kept.append((now_s, needed))
    peak = kept[0][1]
    return (needed if needed >= current else min(current, peak)), NeedHistory(tuple(kept))


def load_reports(metrics: Mapping[str, Mapping[K, float]], work: str, wait_s: str) -> list[LoadReport]:
    """Return the reports in Ray Serve's table of metrics by name and replica."""
    waits = metrics.get(wait_s, {})
    return [LoadReport(value, waits.get(replica, 0.0)) for replica, value in metrics.get(work, {}).items()]
