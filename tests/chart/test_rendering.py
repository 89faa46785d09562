"""Every profile and combination renders whole: on both Helms, for each Kubernetes, by strict schemas."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.chart.combinations import COMBINATIONS
from tests.chart.conftest import installed
from tests.chart.rendering import CHART, KUBERNETES, PROFILES, Refused, Values, all_errors, lint, only, pods, template
from tests.chart.strategies import values_of_the_schema

if TYPE_CHECKING:
    from pathlib import Path


def steady(manifests: list[dict[str, object]]) -> list[str]:
    """Manifests for comparison: without what is random."""
    return sorted(json.dumps(each, sort_keys=True) for each in manifests if each["kind"] != "Secret")


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_each_profile_is_clean_by_strict_lint(each_helm: Path, profile: str | None) -> None:
    """On both Helms; the defaults, too."""
    lint(each_helm, *([profile] if profile else []))


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_valid_for_each_kubernetes(helm: Path, profile: str, kubernetes: str) -> None:
    """No unknown field, nothing of a wrong type, nothing without an image."""
    assert all_errors(template(helm, {}, profile, kubernetes=kubernetes), kubernetes) == []


def test_there_are_enough_combinations() -> None:
    """At least thirty, all different."""
    assert len({json.dumps(each, sort_keys=True) for each in COMBINATIONS.values()}) >= 30


@pytest.mark.parametrize("name", COMBINATIONS)
def test_each_combination_is_valid_and_the_same_on_both_helms(name: str) -> None:
    """Each for another Kubernetes in turn."""
    kubernetes = KUBERNETES[list(COMBINATIONS).index(name) % len(KUBERNETES)]
    older, newer = (template(installed(each), COMBINATIONS[name], kubernetes=kubernetes) for each in ("3.17", "4.3"))
    assert all_errors(newer, kubernetes) == []
    assert steady(older) == steady(newer)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["an Ingress", "monitoring", "secrets that are there", "administration"])
def test_profiles_go_with_what_is_set_beside_them(helm: Path, profile: str, name: str) -> None:
    """A profile is a values file like any other."""
    assert all_errors(template(helm, COMBINATIONS[name], profile)) == []


@settings(
    max_examples=60,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would render hundreds of times
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=values_of_the_schema())
def test_whatever_the_schema_allows_is_refused_in_words_or_valid(helm: Path, values: Values) -> None:
    """Values drawn from the schema: Helm renders valid manifests, or the chart's own checks tell what to change."""
    try:
        manifests, refused = template(helm, values), ""
    except Refused as error:
        manifests, refused = [], str(error)
    assert all_errors(manifests) == []
    if refused:
        assert re.search(r"execution error at .*?: (\n- |[a-zA-Z.]+: |the release)", refused), refused
        assert "nil pointer" not in refused
        assert "schema" not in refused, refused


def test_a_new_render_changes_no_pod(helm: Path) -> None:
    """What is random is in the Secret alone: a second render must not make Ray build a second cluster."""
    one, other = template(helm), template(helm)
    assert steady(one) == steady(other)
    assert only(one, "Secret") != only(other, "Secret")


def test_a_pod_is_replaced_when_what_it_reads_at_start_changes(helm: Path) -> None:
    """By the sums in its annotations: Ray's environment and the Secret; settings go to Ray Serve without it."""

    def sums(values: Values) -> list[dict[str, str]]:
        cluster = only(template(helm, values), "RayService")["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [each["template"]["metadata"]["annotations"] for each in groups]

    plain = sums({})
    for changed in (
        {"ray": {"env": {"RAY_A": "1"}}},
        {"secrets": {"revision": "2"}},
        {"secrets": {"values": {"api-keys": "k"}}},
    ):
        assert all(one != other for one, other in zip(plain, sums(changed), strict=True))
    assert sums({"settings": {"max_num_seqs": 128}}) == plain


def test_the_packaged_chart_is_whole(helm: Path, tmp_path: Path) -> None:
    """What is shipped renders as what is checked out."""
    subprocess.run([helm, "package", CHART, "--destination", tmp_path], check=True, capture_output=True)
    (package,) = tmp_path.glob("*.tgz")
    done = subprocess.run([helm, "template", "x", package], check=True, capture_output=True, text=True)
    assert "kind: RayService" in done.stdout


def test_no_pod_has_more_than_it_needs(helm: Path) -> None:
    """Kubernetes' `restricted` standard in every pod, and no token but the autoscaler's."""
    for name in ("defaults", "administration", "without Ray", "model from an object store"):
        for who, spec in pods(template(helm, COMBINATIONS[name])):
            assert spec["automountServiceAccountToken"] is False, who
            assert spec["securityContext"]["runAsNonRoot"] is True, who
            assert spec["securityContext"]["runAsUser"] > 0, who
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, who
            assert not any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")), who
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] is True, who
                assert context["allowPrivilegeEscalation"] is False, who
                assert context["capabilities"] == {"drop": ["ALL"]}, who
                assert container["resources"]["limits"]["memory"], who
                assert container["resources"]["requests"]["cpu"], who
            tokens = [
                volume["name"]
                for volume in spec.get("volumes", [])
                if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
            ]
            assert tokens == (["kubernetes"] if who.endswith("head") else []), who
            mounted = [mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]]
            assert "kubernetes" not in mounted, who
