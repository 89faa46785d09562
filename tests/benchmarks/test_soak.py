"""The soak's verdict: growth with the number of requests is found, noise and a first filling of caches are not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.cluster.soak import growth, slope

SAMPLES, EVERY_S, ANSWERS_PER_S = 400, 5, 10


def samples(seed: int, **per_answer: float) -> list[dict[str, Any]]:
    """Return samples of a process of 300 MiB, 60 descriptors and 20 threads, which grow so much with each answer."""
    noise = random.Random(seed)
    taken = []
    for number in range(SAMPLES):
        at = number * EVERY_S
        answers = at * ANSWERS_PER_S
        cached = min(at, 50) / 50 * 100 * 2**20
        values = {
            "rss_bytes": 300 * 2**20 + cached + noise.gauss(0, 4 * 2**20),
            "descriptors": 60 + noise.randint(-10, 10),
            "threads": 20 + noise.randint(-2, 2),
        }
        grown = {name: value + per_answer.get(name, 0) * answers for name, value in values.items()}
        taken.append({"at": at, "answers": answers} | grown)
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_growth(seed: int) -> None:
    """Caches that fill in the first minute, and values that move about a mean, are no growth."""
    assert growth(samples(seed))["grows"] == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("resource", "per_answer"), [("rss_bytes", 2000), ("descriptors", 0.001), ("threads", 0.0005)])
def test_growth_is_found(seed: int, resource: str, per_answer: float) -> None:
    """2 kB for each answer, a descriptor for each 1,000 and a thread for each 2,000 are found, with their slope."""
    found = growth(samples(seed, **{resource: per_answer}))
    assert found["grows"] == [resource]
    assert found[f"{resource}_per_1000"] == pytest.approx(1000 * per_answer, rel=0.3)


def test_the_slope_of_a_line_is_exact() -> None:
    """Points on a line have its slope and no error."""
    steepness, error = slope([*range(30)], [5 + 3 * x for x in range(30)])
    assert steepness == pytest.approx(3)
    assert error == pytest.approx(0, abs=1e-9)


def test_few_samples_decide_nothing() -> None:
    """A process that lived for a minute has no verdict."""
    assert growth(samples(0, rss_bytes=10**6)[:15])["grows"] == []
