"""vLLM's scheduler, except that long audios leave room for other requests in each engine step.

An engine step ends for all captions at the same time, so a step full of a 40-minute prompt stalls every running caption
and every clip that has just arrived. vLLM's own remedy, `long_prefill_token_threshold`, counts tokens alone (far into
the context a token costs five times as much as at its start), caps short clips too, applies to each long prompt
separately, and is lifted when a prompt is alone, as if nothing could arrive meanwhile. This scheduler bounds the work
of all long audios together in every step, and leaves them out of a step in which a short clip starts. Long audios are
read one after the other, the one whose wait would be most out of proportion first: the total work is the same, and most
of them finish sooner.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.request import Request

WAIT_PER_TOKEN_S = 0.1 / 13
"""Wait behind other long audios that an audio accepts, per token: a tenth of its duration (13 tokens are a second)."""

MAX_SKIPS = 4
"""Consecutive steps that long audios may be left out of, so that they proceed under any load of short clips."""


class LongAudioScheduler(Scheduler):  # type: ignore[misc]
    """A scheduler with a bound on the prefill work of long audios in each step.

    `additional_config` defines what is long (`long_audio_tokens`) and the share of a step for all long audios together:
    `long_tokens_per_step` at the beginning of an audio, half of that after `long_tokens_halve` tokens of an audio, a
    third after twice as many, and so on.

    Counts the steps with work, and sends the count with the statistics of each step (`step_counter.py`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config.additional_config
        self._long_audio_tokens: int = config["long_audio_tokens"]
        self._long_tokens_per_step: int = config["long_tokens_per_step"]
        self._long_tokens_halve: int = config["long_tokens_halve"]
        self._remaining = 0.0
        self._skips = 0
        self._steps = 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:  # noqa: FBT001, FBT002 - vLLM's signature
        """Schedule one step."""
        skip = self._skips < MAX_SKIPS and self._short_clip_starts()
        self._skips = self._skips + 1 if skip else 0
        self._remaining = 0.0 if skip else float(self._long_tokens_per_step)
        self.running.sort(key=self._prefill_deadline)
        return super().schedule(throttle_prefills)

    def update_from_output(self, step: SchedulerOutput, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """Return vLLM's messages after a step, with the count of steps with work in their statistics.

        vLLM sends statistics after every step, also if no caption got a token or nothing was computed.
        """
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(step, *args, **kwargs)
        self._steps += step.total_num_scheduled_tokens > 0
        for message in outputs.values():
            if message.scheduler_stats is not None:
                message.scheduler_stats.step_counter = self._steps
        return outputs

    def _short_clip_starts(self) -> bool:
        waiting = self.waiting if len(self.running) < self.max_num_running_reqs else ()
        return any(
            request.num_prompt_tokens <= self._long_audio_tokens
            and request.num_computed_tokens < request.num_prompt_tokens
            for request in chain(self.running, waiting)
        )

    def _in_long_prefill(self, request: Request) -> bool:
        tokens: int = request.num_prompt_tokens
        return request.num_computed_tokens < tokens and tokens > self._long_audio_tokens

    def _prefill_deadline(self, request: Request) -> float:
        """Return the sort key of running requests: long audios in prefill first, by the end of their accepted wait.

        They come first because vLLM, when the KV cache is full, discards the work of the requests at the end, and
        theirs is the most.
        """
        if not self._in_long_prefill(request):
            return math.inf
        deadline: float = request.arrival_time + request.num_prompt_tokens * WAIT_PER_TOKEN_S
        return deadline

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Bound the tokens of a long audio; vLLM calls this per request before it settles its tokens of this step."""
        if self._in_long_prefill(request):
            cost = 1 + num_computed_tokens / self._long_tokens_halve
            first = self._remaining == self._long_tokens_per_step
            num_new_tokens = min(num_new_tokens, int(self._remaining / cost))
            if first or num_computed_tokens == 0:
                # The first proceeds however far it is. And a waiting audio starts in any case: vLLM admits no request
                # that waits behind one that cannot start.
                num_new_tokens = max(1, num_new_tokens)
            self._remaining = max(0.0, self._remaining - num_new_tokens * cost)
        return super()._try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, *args, **kwargs)


class AsyncLongAudioScheduler(LongAudioScheduler, AsyncScheduler):  # type: ignore[misc]
    """`LongAudioScheduler` where vLLM prepares a step while the step before it runs."""
