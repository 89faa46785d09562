"""What the directory of a cluster knows of the processes that tell their metrics, and what Prometheus makes of them."""

from prometheus_client.metrics import MetricWrapperBase

from serving.observability.metrics import CALLBACK_LABELS, Metrics
from serving.observability.service_discovery import FORGET_AFTER_S, Register, Target


class Clock:
    """A time that stands until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def target(port: int, role: str = "frontend") -> Target:
    """A process as it tells of itself."""
    return {"targets": [f"10.0.0.1:{port}"], "labels": {"role": role}}


def test_one_that_falls_silent_is_lost() -> None:
    """It is forgotten after some time, counted once, by its role; the others stay."""
    clock = Clock()
    register = Register(clock)
    register.note(target(1, "engine"), "a")
    assert register.note(target(2), "b") == ([target(1, "engine"), target(2)], {"frontend": 0, "engine": 0})
    clock.now_s = FORGET_AFTER_S
    assert register.note(target(2), "b")[1] == {"frontend": 0, "engine": 0}
    clock.now_s += 0.1
    for _ in range(2):
        assert register.note(target(2), "b") == ([target(2)], {"frontend": 0, "engine": 1})


def test_one_that_listens_where_another_did_follows_on_a_lost_one() -> None:
    """A killed process's port is free at once: its successor may take it long before it would be missed."""
    register = Register(Clock())
    register.note(target(1), "a")
    for _ in range(2):
        assert register.note(target(1), "b") == ([target(1)], {"frontend": 1, "engine": 0})


def test_one_that_says_farewell_is_not_lost() -> None:
    """Neither when time goes by, nor when another takes its port."""
    clock = Clock()
    register = Register(clock)
    register.note(target(1), "a")
    register.strike("10.0.0.1:1")
    register.strike("10.0.0.1:1")
    assert register.note(target(1), "b") == ([target(1)], {"frontend": 0, "engine": 0})
    register.strike("10.0.0.1:1")
    clock.now_s = 2 * FORGET_AFTER_S
    assert register.note(target(2), "c") == ([target(2)], {"frontend": 0, "engine": 0})


def test_no_metric_has_a_label_that_its_target_has_too() -> None:
    """Prometheus would rename the metric's own (`exported_role`), and rules would read the target's in its place."""
    collectors = set(Metrics().registry._collector_to_names)
    labelled = [collector for collector in collectors if isinstance(collector, MetricWrapperBase)]
    labels = {label for collector in labelled for label in collector._labelnames} | set(CALLBACK_LABELS.values())
    assert {"outcome", "replica"} <= labels
    assert not labels & {"job", "instance", *target(1)["labels"]}
