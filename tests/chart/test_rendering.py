"""Every profile and combination renders valid manifests with both Helms, for each Kubernetes, by strict schemas."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.chart.combinations import COMBINATIONS
from tests.chart.conftest import installed
from tests.chart.rendering import (
    CHART,
    KUBERNETES,
    PROFILES,
    REQUIRED,
    RefusedError,
    Values,
    all_errors,
    lint,
    only,
    pods,
    template,
)
from tests.chart.strategies import values_of_the_schema

if TYPE_CHECKING:
    from pathlib import Path


def without_random(manifests: list[dict[str, object]]) -> list[str]:
    """Return manifests for comparison, without the Secret, which is random."""
    return sorted(json.dumps(each, sort_keys=True) for each in manifests if each["kind"] != "Secret")


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_each_profile_is_clean_by_strict_lint(each_helm: Path, profile: str | None) -> None:
    """Both Helms accept each profile and the defaults."""
    lint(each_helm, *([profile] if profile else []))


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_valid_for_each_kubernetes(helm: Path, profile: str, kubernetes: str) -> None:
    """There is no unknown field, no value of a wrong type, and no container without an image."""
    assert all_errors(template(helm, {}, profile, kubernetes=kubernetes), kubernetes) == []


def test_there_are_enough_combinations() -> None:
    """There are at least thirty, all different."""
    assert len({json.dumps(each, sort_keys=True) for each in COMBINATIONS.values()}) >= 30


@pytest.mark.parametrize("name", COMBINATIONS)
def test_each_combination_is_valid_and_the_same_on_both_helms(name: str) -> None:
    """Both Helms render the same valid manifests; the Kubernetes version rotates."""
    kubernetes = KUBERNETES[list(COMBINATIONS).index(name) % len(KUBERNETES)]
    older, newer = (template(installed(each), COMBINATIONS[name], kubernetes=kubernetes) for each in ("3.17", "4.3"))
    assert all_errors(newer, kubernetes) == []
    assert without_random(older) == without_random(newer)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["an Ingress", "monitoring", "existing secrets", "administration"])
def test_profiles_combine_with_other_values(helm: Path, profile: str, name: str) -> None:
    """A profile and other values together render valid manifests."""
    assert all_errors(template(helm, COMBINATIONS[name], profile)) == []


@settings(
    max_examples=60,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would render hundreds of times
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=values_of_the_schema())
def test_values_of_the_schema_are_valid_or_rejected_with_a_message(helm: Path, values: Values) -> None:
    """For values drawn from the schema Helm renders valid manifests, or the chart's checks name the remedy."""
    try:
        manifests, refused = template(helm, values), ""
    except RefusedError as error:
        manifests, refused = [], str(error)
    assert all_errors(manifests) == []
    if refused:
        assert re.search(r"execution error at .*?: (\n- |[a-zA-Z.]+ is required)", refused), refused
        assert "nil pointer" not in refused
        assert "schema" not in refused, refused


def test_a_new_render_changes_no_pod(helm: Path) -> None:
    """Only the Secret is random, so that a second render does not start a second cluster."""
    one, other = template(helm), template(helm)
    assert without_random(one) == without_random(other)
    assert only(one, "Secret") != only(other, "Secret")


def test_a_pod_is_replaced_when_its_environment_changes(helm: Path) -> None:
    """Checksums of Ray's environment and of the Secret are in its annotations; settings change no annotation."""

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


def test_the_packaged_chart_renders(helm: Path, tmp_path: Path) -> None:
    """The packaged chart renders a RayService, as the directory does."""
    subprocess.run([helm, "package", CHART, "--destination", tmp_path], check=True, capture_output=True)
    (package,) = tmp_path.glob("*.tgz")
    done = subprocess.run(
        [helm, "template", "x", package, "--values", REQUIRED], check=True, capture_output=True, text=True
    )
    assert "kind: RayService" in done.stdout


def test_pods_have_minimal_privileges(helm: Path) -> None:
    """Every pod satisfies Kubernetes' `restricted` standard, and only the autoscaler has a token."""
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
