"""Lines of batches use what captions leave: their number follows the engine, and captions are served first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serving.batch import pace as paces
from serving.batch.line import background
from serving.batch.pace import Pace
from serving.scheduling.fair_queue import FairQueue
from serving.types import SchedulingClass

if TYPE_CHECKING:
    import pytest


class _Item:
    def __init__(self, scheduling_class: SchedulingClass) -> None:
        self.scheduling_class, self.cost, self.arrived_s = scheduling_class, 1.0, 0.0


def test_lines_are_served_after_the_captions_of_every_tenant() -> None:
    """A line of the tenant with the highest priority waits behind a caption of one with the lowest."""
    queue: FairQueue[_Item] = FairQueue(lambda item: item.arrived_s, patience_s=60, now_s=lambda: 0.0)
    lines = [
        _Item(background(SchedulingClass("gold", 3.0, 100))),
        _Item(background(SchedulingClass("iron", 1.0, -100))),
    ]
    captions = [_Item(SchedulingClass("iron", 1.0, -100)), _Item(SchedulingClass("gold", 3.0, 100))]
    for item in (*lines, *captions):
        queue.add(item)
    assert list(queue.in_order()) == [captions[1], captions[0], *lines]


async def test_the_limit_rises_until_a_line_waits_and_falls_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines double while none waits; one that waits takes a quarter away; then each round adds one line."""
    pace = Pace(64, lambda: False)
    assert pace.limit == 4
    for _ in range(12):
        pace.waited(0.0)
    assert pace.limit == 16
    monkeypatch.setattr(paces, "_DECREASE_EVERY_S", 0.0)
    pace.waited(0.2)
    assert pace.limit == 12
    for _ in range(13):
        pace.waited(0.0)
    assert pace.limit == 13
    for _ in range(100):
        pace.overloaded()
    assert pace.limit == 1


async def test_no_line_starts_while_captions_wait() -> None:
    """A line gets its turn once no caption waits for the engine, in order of arrival, or never if its batch stops."""
    waiting, stopped = True, False
    pace = Pace(4, lambda: waiting)
    first = asyncio.create_task(pace.turn(lambda: stopped))
    second = asyncio.create_task(pace.turn(lambda: False))
    await asyncio.sleep(0.2)
    assert (first.done(), second.done(), pace.running) == (False, False, 0)
    stopped = True
    assert not await first
    waiting = False
    assert await second
    assert pace.running == 1
    pace.end()
    assert pace.running == 0
