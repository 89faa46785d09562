"""Hypothesis strategies that draw values from the chart's schema."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

from tests.chart.rendering import CHART

QUANTITIES = st.sampled_from(["1", "500m", "2Gi", "1.5Gi", "100M"])
ASCII = [chr(code) for code in range(32, 127)]
WORDS = st.from_regex(re.compile(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", re.ASCII), fullmatch=True)

SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    # Values whose schema is left to Kubernetes.
    "nodeSelector": st.dictionaries(WORDS, WORDS, max_size=2),
    "tolerations": st.lists(st.fixed_dictionaries({"key": WORDS, "operator": st.just("Exists")}), max_size=2),
    "affinity": st.just({}),
    "topologySpreadConstraints": st.just([]),
    "env": st.lists(st.fixed_dictionaries({"name": WORDS, "value": st.text(ASCII, max_size=5)}), max_size=2),
    "envFrom": st.just([]),
    "volumes": st.just([]),
    "volumeMounts": st.just([]),
    "resources": st.fixed_dictionaries(
        {
            "requests": st.fixed_dictionaries({"cpu": QUANTITIES, "memory": QUANTITIES}),
            "limits": st.just({"memory": "9Gi"}),
        }
    ),
    "podSecurityContext": st.just({}),
    "securityContext": st.just({}),
    "extraWorkerGroups": st.just([]),
    "extraManifests": st.just([]),
    "extraEgress": st.just([]),
    "parentRefs": st.lists(st.fixed_dictionaries({"name": WORDS}), max_size=2),
    "hostnames": st.lists(WORDS.map(lambda word: f"{word}.example.com"), max_size=2, unique=True),
    "triggers": st.just([{"type": "cpu", "metricType": "Utilization", "metadata": {"value": "60"}}]),
    "ports": st.lists(st.integers(1, 65535), min_size=1, max_size=3, unique=True),
    "exceptIPv4": st.just(["10.0.0.0/8"]),
    "exceptIPv6": st.just(["fc00::/7"]),
    "paths": st.lists(WORDS.map(lambda word: f"/{word}"), min_size=1, max_size=12, unique=True),
    "accessModes": st.sampled_from([["ReadWriteMany"], ["ReadWriteOnce"]]),
    "rollingUpdate": st.just({"maxSurge": 1, "maxUnavailable": 0}),
    "global": st.dictionaries(WORDS, st.integers(), max_size=2),
    "list": st.lists(st.fixed_dictionaries({"name": WORDS}), max_size=3),
    "peers": st.lists(st.sampled_from([{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]), max_size=2),
    "value": st.integers(0, 1_000_000_000),
    "interval": st.sampled_from(["5s", "1m"]),
}
PEERS = {"callers", "operator", "prometheus", "kubernetesApi", "modelSource", "networks", "from", "to"}
# Upper bounds that keep the rendered manifests small.
SMALL = {"max": 1000, "min": 1000, "minAvailable": 5, "index": 15, "cpus": 64, "gpus": 16}


def values_of_the_schema() -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for up to five sections of the values, each as the schema allows."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    properties = schema["properties"]

    def some(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: _drawn(name, properties[name]) for name in names})

    return st.lists(st.sampled_from(sorted(properties)), max_size=5, unique=True).flatmap(some)


def _drawn(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:  # noqa: C901, PLR0912 - a case each
    if name in PEERS:
        return SENSIBLE["peers"]
    leaf = not schema.get("properties", {}).keys() - {"requests", "limits", "maxSurge", "maxUnavailable"}
    if name in SENSIBLE and leaf and not (name == "env" and schema["type"] == "object"):
        return SENSIBLE[name]
    if choices := schema.get("enum"):
        return st.sampled_from(choices)
    if either := schema.get("anyOf"):
        return st.one_of([_drawn(name, each) for each in either])
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            return st.integers(low, min(schema.get("maximum", 2**40), SMALL.get(name, max(low, 2**40))))
        case "number":
            low = schema.get("exclusiveMinimum", schema.get("minimum", 0))
            return st.floats(low, schema.get("maximum", 1e6), exclude_min="exclusiveMinimum" in schema)
        case "null":
            return st.none()
        case "string" if schema.get("pattern"):
            return st.from_regex(re.compile(schema["pattern"], re.ASCII)).filter(
                lambda text: len(text) < 64 and "\n" not in text
            )
        case "string":
            return WORDS
        case "array":
            return st.lists(_drawn("", schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
        case "object" if inner := schema.get("properties"):
            # `false` stands for a key that is refused.
            drawn = {key: _drawn(key, each) for key, each in inner.items() if each is not False}
            return st.fixed_dictionaries({}, optional=drawn)
        case "object":
            return st.dictionaries(WORDS, st.just("a" * 64), max_size=2)
    raise AssertionError(schema)
