"""Time per stage of a request, from the service's metrics."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

STAGES = "captioner_stage_seconds"


def stage_sums(url: str) -> dict[str, float]:
    """Return the seconds spent so far in each stage, over all processes of the service at `url`.

    Empty for another server, and where the metrics are not readable.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    try:
        for group in json.loads(_read(f"{url}/metrics/targets")):
            path = group.get("labels", {}).get("__metrics_path__", "/metrics")
            for target in group["targets"]:
                for family in text_string_to_metric_families(_read(f"http://{target}{path}").decode()):
                    if family.name == STAGES:
                        for sample in family.samples:
                            if sample.name == f"{STAGES}_sum":
                                sums[sample.labels["stage"]] += sample.value
    except (OSError, ValueError):
        return {}
    return dict(sums)


def _read(url: str) -> bytes:
    # The address is the user's, or comes from the service there.
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
        return bytes(answer.read())
