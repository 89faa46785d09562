"""Number of replicas: properties of the scaling rule, and a day of load in a simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.autoscaling import (
    LONGEST_WAIT_S,
    LoadReport,
    NeedHistory,
    ScalingRule,
    load_reports,
    target_replicas,
)
from serving.observability.cpu_time import Busy

RULE = ScalingRule(min_replicas=1, max_replicas=20, work_per_replica=900.0, scale_down_after_s=300.0)

rules = st.builds(
    lambda lowest, more, work, scale_down_after_s: ScalingRule(lowest, max(1, lowest + more), work, scale_down_after_s),
    st.integers(0, 5),
    st.integers(0, 30),
    st.floats(0.1, 1e4),
    st.floats(0, 1000),
)
reports = st.lists(st.builds(LoadReport, st.floats(0, 1e6), st.floats(0, 10)), max_size=12)


def count(rule: ScalingRule, work: float, *, current: int, wait_s: float = 0.0, unserved: float = 0) -> int:
    """Return the target for that work, evenly divided, without a history."""
    reported = [LoadReport(work / current, wait_s)] * current if current else []
    return target_replicas(rule, reported, current=current, unserved=unserved, now_s=0, history=NeedHistory())[0]


@given(rules, reports, st.integers(0, 40), st.floats(0, 100))
def test_the_count_stays_within_its_bounds(
    rule: ScalingRule, reported: list[LoadReport], current: int, unserved: float
) -> None:
    """The target is within the rule's bounds for any reports, also while more replicas run than the rule allows."""
    wanted, _ = target_replicas(rule, reported, current=current, unserved=unserved, now_s=0, history=NeedHistory())
    assert rule.min_replicas <= wanted <= rule.max_replicas


@given(rules, reports, reports, st.integers(0, 40))
def test_more_work_never_means_fewer_replicas(
    rule: ScalingRule, reported: list[LoadReport], more: list[LoadReport], current: int
) -> None:
    """Further reports never lower the target, also when their waits are short and lower the average wait."""
    calm = [replace(report, wait_s=0.0) for report in reported]
    before, _ = target_replicas(rule, calm, current=current, unserved=0, now_s=0, history=NeedHistory())
    after, _ = target_replicas(rule, calm + more, current=current, unserved=0, now_s=0, history=NeedHistory())
    assert after >= before


@given(st.floats(0, 1e5), st.integers(1, 20))
def test_up_at_once_and_as_far_as_needed(work: float, current: int) -> None:
    """One call raises the target to any number of replicas that the work needs."""
    needed = min(max(math.ceil(work / RULE.work_per_replica - 1e-9), RULE.min_replicas), RULE.max_replicas)
    assert count(RULE, work, current=current) >= needed
    if needed > current:
        assert count(RULE, work, current=current) == needed


def test_waiting_calls_for_one_more() -> None:
    """A long average wait calls for one more replica; a long wait at one of three replicas does not."""
    assert count(RULE, 100, current=3, wait_s=LONGEST_WAIT_S + 0.1) == 4
    one_of_three = [LoadReport(10, LONGEST_WAIT_S + 1), LoadReport(10), LoadReport(10)]
    assert target_replicas(RULE, one_of_three, current=3, unserved=0, now_s=0, history=NeedHistory())[0] < 4


def test_a_wait_does_not_request_more_and_more_while_replicas_start() -> None:
    """The wait goes on during a cold start; it requests one replica in all, not one in every call."""
    history, current = NeedHistory(), 2
    for now_s in range(0, 60, 2):
        waiting = [LoadReport(100, LONGEST_WAIT_S + 5)] * 2
        current, history = target_replicas(RULE, waiting, current=current, unserved=0, now_s=now_s, history=history)
    assert current == 3


def test_from_zero_one_unserved_request_is_enough() -> None:
    """An unserved request raises the target from zero to one; without requests it stays at zero."""
    rule = replace(RULE, min_replicas=0)
    assert count(rule, 0, current=0, unserved=1) == 1
    assert count(rule, 0, current=0, unserved=0) == 0


def test_down_only_after_the_whole_time() -> None:
    """A burst's replicas stay for `scale_down_after_s` after the last moment at which they were needed."""
    history, current = NeedHistory(), 1
    for now_s in range(0, 1000, 2):
        work = 9000.0 if 100 <= now_s < 110 else 10.0
        current, history = target_replicas(
            RULE, [LoadReport(work)], current=current, unserved=0, now_s=now_s, history=history
        )
        assert current == (10 if 100 <= now_s < 108 + RULE.scale_down_after_s else 1), now_s


def test_a_new_controller_removes_nothing_at_once() -> None:
    """A controller without a history keeps all replicas for `scale_down_after_s`: any of them may have been needed."""
    rule = replace(RULE, min_replicas=0)
    for current in (1, 7):
        history = NeedHistory()
        for now_s in range(0, 310, 10):
            wanted, history = target_replicas(rule, [], current=current, unserved=0, now_s=now_s, history=history)
            assert wanted == (current if now_s < RULE.scale_down_after_s else 0)


def test_a_woken_replica_stays_for_a_while() -> None:
    """A replica that Ray has started for a waiting request stays, although it has no work to report yet."""
    rule, history, current = replace(RULE, min_replicas=0), NeedHistory(), 0
    for now_s in range(0, 900, 10):
        if now_s == 500:
            current = 1
        current, history = target_replicas(rule, [], current=current, unserved=0, now_s=now_s, history=history)
        assert current == (1 if 500 <= now_s < 800 else 0)


@given(st.lists(st.tuples(st.floats(0.1, 60), st.floats(0, 2e4)), min_size=1, max_size=200))
def test_never_below_what_was_needed_lately(steps: list[tuple[float, float]]) -> None:
    """For any load the target is the highest need in the last `scale_down_after_s`, and the history stays short."""
    history, current, now_s, needs = NeedHistory(), 1, 0.0, []
    for step_s, work in steps:
        now_s += step_s
        current, history = target_replicas(
            RULE, [LoadReport(work)], current=current, unserved=0, now_s=now_s, history=history
        )
        needs.append(
            (now_s, min(max(math.ceil(work / RULE.work_per_replica - 1e-9), RULE.min_replicas), RULE.max_replicas))
        )
        lately = [need for at, need in needs if now_s - at < RULE.scale_down_after_s]
        assert current == max(lately)
        assert len(history.needed) <= RULE.max_replicas + 1


@given(st.integers(0, 2**32 - 1))
def test_noise_does_not_make_it_flap(seed: int) -> None:
    """The target settles on one count under a steady load on the edge between two counts."""
    random = np.random.default_rng(seed)
    history, current, changes = NeedHistory(), 4, 0
    for now_s in range(0, 3600, 2):
        reported = [LoadReport(max(0.0, random.normal(4 * 900, 150)) / current)] * current
        wanted, history = target_replicas(RULE, reported, current=current, unserved=0, now_s=now_s, history=history)
        changes += wanted != current
        current = wanted
    assert changes <= 2


def test_a_frontend_reports_how_busy_its_event_loop_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported load is the share of a core that the thread has used since the last report."""
    clock = SimpleNamespace(passed_s=100.0, used_s=7.0)
    clocks = SimpleNamespace(monotonic=lambda: clock.passed_s, thread_time=lambda: clock.used_s)
    monkeypatch.setattr("serving.observability.cpu_time.time", clocks)
    busy = Busy()
    shares = []
    for passed_s, used_s in ((10, 4), (2, 2), (5, 0), (0, 1)):
        clock.passed_s += passed_s
        clock.used_s += used_s
        shares.append(busy.share())
    assert shares == pytest.approx([0.4, 1, 0, 1])


def test_reports_are_read_from_rays_table() -> None:
    """Reports are read by replica; a missing wait is 0 s, and a missing table gives no reports."""
    table = {"work": {"a": 5.0, "b": 7.0}, "wait_s": {"b": 3.0}, "other": {"c": 1.0}}
    assert load_reports(table, "work", "wait_s") == [LoadReport(5.0), LoadReport(7.0, 3.0)]
    assert load_reports({}, "work", "wait_s") == []


# A day of load


@dataclass
class Day:
    """Result of a simulated day."""

    counts: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    replica_s: float = 0.0
    ups: int = 0
    downs: int = 0


def simulate(
    rule: ScalingRule, offered: list[float], *, cold_start_s: float, speed: float = 30.0, step_s: float = 2.0
) -> Day:
    """Drive the rule over `offered` (audio-seconds that arrive per second, one value a step).

    A replica handles at most `speed` audio-seconds per second, and serves `cold_start_s` after it was requested. Its
    reports are two seconds old, as with Ray.
    """
    day, history, backlog, started = Day(), NeedHistory(), 0.0, [-cold_start_s] * max(rule.min_replicas, 0)
    reported, unserved = [LoadReport(0.0)] * len(started), 0.0
    for step, arriving in enumerate(offered):
        now_s = step * step_s
        target, history = target_replicas(
            rule, reported, current=len(started), unserved=unserved, now_s=now_s, history=history
        )
        day.ups += target > len(started)
        day.downs += target < len(started)
        started = (started + [now_s] * (target - len(started)))[:target]
        serving = sum(now_s - at >= cold_start_s for at in started)
        # A clip takes about 10 s in an engine that is not full.
        backlog += arriving * step_s
        backlog -= min(serving * speed * step_s, max(1.0, backlog * step_s / 10), backlog)
        # Work that is not under way waits; at full speed a replica has ten seconds of its speed under way.
        wait_s = max(0.0, backlog / (serving * speed) - 10) if serving else 0.0
        reported = [LoadReport(backlog / max(1, serving), wait_s)] * serving
        unserved = 1.0 if backlog > 0 and not serving else 0.0
        day.counts.append(len(started))
        day.waits_s.append(wait_s)
        day.replica_s += len(started) * step_s
    return day


def day_of_load(seed: int = 0) -> list[float]:
    """Return audio-seconds per second every 2 s: night, working day with two humps, noise, three spikes."""
    random = np.random.default_rng(seed)
    hours = np.arange(0, 24, 2 / 3600)
    load = 5 + 150 * np.exp(-((hours - 10.5) ** 2) / 4) + 120 * np.exp(-((hours - 15) ** 2) / 5)
    load *= random.lognormal(0, 0.25, hours.size)
    for hour in (3.0, 12.5, 20.0):
        load[(hours >= hour) & (hours < hour + 0.05)] += 250
    return [float(each) for each in load]


def test_a_day_of_load_is_served_with_few_changes_and_few_replicas() -> None:
    """Waits stay short except in spikes, with a minute of cold start and a third of a fixed fleet's replica hours.

    The count changes no more often than every five minutes.
    """
    offered = day_of_load()
    rule = ScalingRule(min_replicas=1, max_replicas=12, work_per_replica=300.0, scale_down_after_s=300.0)
    day = simulate(rule, offered, cold_start_s=60)
    fixed = max(day.counts) * len(offered) * 2.0
    assert np.quantile(day.waits_s, [0.95, 0.99, 0.998]).tolist() < [0.1, 10, 100]
    assert day.replica_s < fixed / 3
    assert day.ups + day.downs < 300
    assert min(day.counts) == rule.min_replicas
    assert day.counts[0] == day.counts[-1] == rule.min_replicas


def test_a_quiet_night_costs_nothing_when_zero_is_allowed() -> None:
    """The count is zero while there are no requests, rises with the first request, and returns to zero."""
    hour = 1800
    offered = [0.0] * hour + [20.0] * hour + [0.0] * hour
    rule = ScalingRule(min_replicas=0, max_replicas=4, work_per_replica=300.0, scale_down_after_s=300.0)
    day = simulate(rule, offered, cold_start_s=60)
    assert set(day.counts[:hour]) == {0}
    assert day.counts[hour + 1] == 1
    assert day.counts[-1] == 0
    assert day.replica_s < 3600 + 2 * 600 + 1200
