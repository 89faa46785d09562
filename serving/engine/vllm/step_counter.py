"""Count of the engine's steps, from the statistics that vLLM's scheduler sends after each step.

vLLM calls its stat loggers for every message of the engine process. `LongAudioScheduler` writes its count of steps with
work into each message, so a step in which no caption got a token counts, and a step without work does not.

A custom stat logger switches vLLM's statistics on, also where `vllm_metrics` is false. Their cost, measured on a CPU:
4 µs per token in the service's process, 4 µs per step in both processes together. vLLM also adds its Prometheus logger
unless a custom logger is a subclass of it; where `vllm_metrics` is false, `NoPrometheusLogger` is that subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.metrics.stats import SchedulerStats


class StepCounter(StatLoggerBase):  # type: ignore[misc]
    """A stat logger that keeps the number of steps with work."""

    def __init__(self) -> None:
        self.steps = 0

    def record(self, scheduler_stats: SchedulerStats | None, *_: Any, **__: Any) -> None:
        """Keep the count of the scheduler's last message."""
        if scheduler_stats is not None:
            self.steps = scheduler_stats.step_counter

    def log_engine_initialized(self) -> None:
        """Do nothing: there is nothing to log."""


class NoPrometheusLogger(PrometheusStatLogger):  # type: ignore[misc]
    """vLLM's Prometheus logger without metrics: registers none and records none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Register nothing: `super().__init__` would register every metric of vLLM."""

    def record(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def record_admission_rejection(self, reason: str) -> None:
        """Do nothing."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def log_engine_initialized(self) -> None:
        """Do nothing."""


def stat_loggers(counter: StepCounter, *, vllm_metrics: bool) -> list[Callable[..., Any]]:
    """Return factories of the stat loggers of `AsyncLLM`: `counter`, and vLLM's Prometheus logger if `vllm_metrics`."""

    def make_counter(_config: Any, _engine_index: int) -> StepCounter:
        return counter

    return [make_counter] if vllm_metrics else [make_counter, NoPrometheusLogger]
