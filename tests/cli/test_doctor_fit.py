"""The doctor's arithmetic agrees with deploy/profiles and with the table that `tests/cuda` makes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from serving.cli.doctor.fit import (
    CHECKPOINT_GIB,
    KV_KIB,
    PROFILES,
    WEIGHTS_GIB,
    Profile,
    fitting_profile,
    fp8_cache_of,
    number_format_of,
)
from serving.cli.doctor.gpu import Gpu
from serving.config import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"


def gpus(count: int, gib: float, capability: float = 9.0) -> list[Gpu]:
    """Equal GPUs with all memory free."""
    return [Gpu(str(index), f"GPU-{index}", "any", "580.1", gib, gib, capability) for index in range(count)]


def test_every_profile_is_known() -> None:
    """Each profile of the captioner in deploy/profiles is tried."""
    files = {path.stem for path in (DEPLOY / "profiles").glob("*.toml")} - {"cpu-embedded"}
    assert {profile.name for profile in PROFILES} == files


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_a_profile_is_as_in_its_file(profile: Profile) -> None:
    """GPUs, share, number format and the KV cache that is left are those of the file and of its comment."""
    text = (DEPLOY / "profiles" / f"{profile.name}.toml").read_text()
    settings = tomllib.loads(text)
    assert settings["tensor_parallel"] == profile.tensor_parallel
    assert settings["gpu_memory_utilization"] == profile.utilization
    assert profile.gpus == profile.tensor_parallel * settings.get("min_engine_replicas", 1)
    assert ("quantization" in settings) == (profile.number_format == "FP8")
    assert number_format_of(Settings(**settings)) == profile.number_format
    assert fp8_cache_of(Settings(**settings)) == profile.fp8_cache
    assert f"of {profile.gpu_gib} on the GPU" in text
    found = profile.fit
    assert found.tokens >= settings.get("max_model_len", 65_536)
    assert ("Calculated, untried." in text) == ("checkpoint" in profile.number_format)
    tokens = re.search(r"= ([\d,]+) tokens", text)
    assert tokens
    assert found.tokens == pytest.approx(int(tokens[1].replace(",", "")), rel=0.005, abs=1000)


def test_the_sizes_are_those_of_the_cuda_build() -> None:
    """Weights and KV cache per GPU are in the table of deploy/cuda.md; the checkpoint is 31.7 B parameters in BF16."""
    page = (DEPLOY / "cuda.md").read_text()
    names = {"BF16": "1xh100-80g", "FP8": "1xh100-80g-fp8", "FP8 checkpoint": "1xl40s-fp8"}
    for number_format, name in (names | {"INT4 checkpoint": "1xl4-int4"}).items():
        for count, weights in WEIGHTS_GIB[number_format].items():
            cache = KV_KIB[count] // (2 if name == "1xl4-int4" else 1)
            assert re.search(rf"^\| {name} \| {count} \|.*\| {weights} \| {cache} \|$", page, re.MULTILINE)
    assert pytest.approx(31_719_205_488 * 2 / 2**30, abs=0.05) == CHECKPOINT_GIB


@pytest.mark.parametrize(
    ("count", "gib", "expected"),
    [(1, 79.6, "1xh100-80g"), (2, 79.6, "2xa100-80g"), (4, 44.5, "4xl40s"), (8, 79.6, "8xh100-80g"),
     (3, 79.6, "2xa100-80g"), (1, 24.0, "1xl4-int4"), (3, 44.5, "1xl40s-fp8"), (1, 16.0, None)],
)  # fmt: skip
def test_the_profile_that_fits_is_found(count: int, gib: float, expected: str | None) -> None:
    """The largest profile for which there are enough GPUs with enough memory; none for a GPU of 16 GiB."""
    found = fitting_profile(gpus(count, gib))
    assert (found.name if found else None) == expected
