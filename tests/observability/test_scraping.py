"""Metrics and targets fit together in Prometheus."""

from dataclasses import asdict

from prometheus_client.metrics import MetricWrapperBase

from serving.cluster.membership import Heartbeat, Membership
from serving.observability.metrics import CALLBACK_LABELS, Metrics


async def test_no_metric_has_a_label_that_its_target_has_too() -> None:
    """Metrics and targets share no label: Prometheus would rename the metric's own to `exported_role`.

    Rules would then read the target's label in its place.
    """
    view = await Membership(list).heartbeat(asdict(Heartbeat("a", "frontend", "10.0.0.1:1")))
    (target,) = view["targets"]
    collectors = set(Metrics().registry._collector_to_names)
    labelled = [collector for collector in collectors if isinstance(collector, MetricWrapperBase)]
    labels = {label for collector in labelled for label in collector._labelnames} | set(CALLBACK_LABELS.values())
    assert {"outcome", "replica"} <= labels
    assert not labels & {"job", "instance", *target["labels"]}
