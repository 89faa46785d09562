"""Where the time of requests went, from the service's own metrics."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

STAGES = "captioner_stage_seconds"


def stage_sums(url: str) -> dict[str, float]:
    """Seconds so far in each stage, over all processes of the service at `url`; empty if it does not tell."""
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
    except (OSError, ValueError):  # another server, or one whose metrics are kept from us
        return {}
    return dict(sums)


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - the address that the user gave, or told by it
        return bytes(answer.read())
