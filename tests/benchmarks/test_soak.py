"""The soak's verdict: growth with the number of requests is found, noise and a first filling of caches are not."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from benchmarks.cluster import soak
from benchmarks.cluster.callers import Callers
from benchmarks.cluster.soak import Updates, data_growth, growth, slope

if TYPE_CHECKING:
    from pathlib import Path

    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

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


def test_files_that_come_and_go_are_no_growth() -> None:
    """Files of updates that are removed again leave the medians as they were; one for each answer does not."""
    assert data_growth([10, 11, 60, 10, 12, 60, 11, 10]) < soak.MORE_FILES
    assert data_growth([*range(10, 210)]) > soak.MORE_FILES


def test_answers_are_counted_once(tmp_path: Path) -> None:
    """The count reads what was added, without a line that is still being written."""
    callers = Callers("http://127.0.0.1:1", tmp_path, 1, max_pause_s=0, tokens=1)
    right = json.dumps({"outcome": "right", "request_id": "x" * 36}) + "\n"
    wrong, sent = json.dumps({"outcome": "failed", "cause": "connection"}) + "\n", json.dumps({"number": "0-1"}) + "\n"
    assert callers.answers() == 0
    with callers.journal.open("a", buffering=1) as journal:
        journal.write(sent + right + wrong + right[:5])
        journal.flush()
        assert (callers.answers(), callers.answers()) == (1, 1)
        journal.write(right[5:] + right)
        journal.flush()
        assert callers.answers() == 3 == len(callers.answered())


def test_an_update_neither_delays_samples_nor_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update runs while the caller goes on, one at a time, and a failed one is noted."""
    going, made = threading.Event(), list[int]()

    def update(_: object, config: dict[str, Any]) -> float:
        made.append(config["number"])
        going.wait(30)
        if config["number"] == 1:
            raise TimeoutError("not deployed")
        return 7.0

    monkeypatch.setattr(soak, "update", update)
    client = cast("ServeSubmissionClient", None)
    with Updates(client, lambda number: {"number": number}) as updates:
        updates.start()
        began = time.monotonic()
        updates.start()
        assert time.monotonic() - began < 5
        going.set()
        while updates._running is not None and not updates._running.done():
            time.sleep(0.01)
        updates.start()
    assert made == [0, 1]
    assert (updates.took_s, updates.failures) == ([7.0], ["TimeoutError: not deployed"])
