"""vLLM's scheduler, except that long audios leave room for everyone else in each engine step.

An engine step ends for all captions at the same time, so a step full of a 40-minute prompt stalls every caption that
runs and every clip that has just arrived. vLLM's own answer, `long_prefill_token_threshold`, counts tokens alone (far
into the context one costs five times as much as at its start), caps short clips too, counts once per long prompt, and
is lifted when a prompt is alone, as if nothing could arrive meanwhile. Ours bounds the work of all long audios together
in every step, and leaves them out of a step in which a short one starts. Among themselves one is read after the other,
that whose wait would be out of proportion first: the sum is the same, and most are done sooner.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

WAIT_PER_TOKEN_S = 0.1 / 13
"""How long an audio may stand behind others, per token: a tenth of how long it lasts, 13 tokens being a second."""

MOST_SKIPS = 4
"""Steps in a row that long audios may be left out of, so that they proceed under any load of short ones."""


class LongAudioYields(Scheduler):  # type: ignore[misc]
    """`additional_config` says what is long (`long_audio_tokens`), and how much of a step all long audios get.

    That is `long_tokens_per_step` at the beginning of an audio; after `long_tokens_halve` tokens of one it is half of
    this, after twice as many a third, and so on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config.additional_config
        self._long_audio_tokens: int = config["long_audio_tokens"]
        self._long_tokens_per_step: int = config["long_tokens_per_step"]
        self._long_tokens_halve: int = config["long_tokens_halve"]
        self._left = 0.0
        self._skips = 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:  # noqa: FBT001, FBT002 - vLLM's signature
        """One step."""
        skip = self._skips < MOST_SKIPS and self._a_short_one_starts()
        self._skips = self._skips + 1 if skip else 0
        self._left = 0.0 if skip else float(self._long_tokens_per_step)
        self.running.sort(key=self._turn)
        return super().schedule(throttle_prefills)

    def update_from_output(self, step: SchedulerOutput, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """What is told after a step: something even if no caption has got a token, so that one sees it work."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(step, *args, **kwargs)
        if not outputs and step.total_num_scheduled_tokens:
            # vLLM's client drops what holds neither tokens nor statistics.
            outputs = {0: EngineCoreOutputs(scheduler_stats=SchedulerStats())}
        return outputs

    def _a_short_one_starts(self) -> bool:
        waiting = self.waiting if len(self.running) < self.max_num_running_reqs else ()
        return any(
            request.num_prompt_tokens <= self._long_audio_tokens
            and request.num_computed_tokens < request.num_prompt_tokens
            for request in chain(self.running, waiting)
        )

    def _reads_long(self, request: Request) -> bool:
        tokens: int = request.num_prompt_tokens
        return request.num_computed_tokens < tokens and tokens > self._long_audio_tokens

    def _turn(self, request: Request) -> float:
        """Long audios that are being read come first, by when each has waited long enough for what it is.

        First, since vLLM throws the work of those at the end away where the KV cache is full, and theirs is the most.
        """
        if not self._reads_long(request):
            return math.inf
        due: float = request.arrival_time + request.num_prompt_tokens * WAIT_PER_TOKEN_S
        return due

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """What vLLM asks per request before it settles how many of its tokens this step computes."""
        if self._reads_long(request):
            cost = 1 + num_computed_tokens / self._long_tokens_halve
            first = self._left == self._long_tokens_per_step
            num_new_tokens = min(num_new_tokens, int(self._left / cost))
            if first or num_computed_tokens == 0:
                # The first goes on however far it is. And one that waits starts even so: vLLM takes no one who waits
                # behind a request that cannot start.
                num_new_tokens = max(1, num_new_tokens)
            self._left = max(0.0, self._left - num_new_tokens * cost)
        return super()._try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, *args, **kwargs)


class LongAudioYieldsAsync(LongAudioYields, AsyncScheduler):  # type: ignore[misc]
    """The same where vLLM prepares a step while the one before it runs."""
