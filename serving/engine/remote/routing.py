"""Choice of an engine replica for a clip: the less loaded of two random replicas ("power of two choices").

Each frontend knows a replica's load by the last report (`STATE_INTERVAL_S` apart) and by what it has sent since; what
other frontends have sent since is unknown to it. If each frontend took the least loaded of all replicas, all of them
would take the same few until the next report ("herding"). Two random candidates keep the busiest replica near the mean:
Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001; for old reports, Mitzenmacher, "How Useful
Is Old Information?", 2000. tests/engine/test_routing.py simulates both; figures in deploy/adr/0005.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from serving.engine.base import Load

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

NO_LOAD = Load(running=0, waiting=0, audio_s=0.0, kv_tokens=0, kv_capacity_tokens=0)

_CHOICES = 2


class KnownLoad:
    """Load of a replica as one frontend knows it: the last report, and clips sent since then."""

    def __init__(self) -> None:
        self.reported = NO_LOAD
        self._unreported: dict[int, tuple[float, int]] = {}

    def sent(self, number: int, audio_s: float, tokens: int) -> None:
        """Count clip `number`, of `audio_s` seconds and `tokens` tokens of context, until a report includes it."""
        self._unreported[number] = audio_s, tokens

    def ended(self, number: int) -> None:
        """Forget clip `number`, which has ended."""
        self._unreported.pop(number, None)

    def report(self, load: Load, seen: int) -> None:
        """Replace the load by a report that includes all clips up to number `seen`."""
        self.reported = load
        for number in [number for number in self._unreported if number <= seen]:
            del self._unreported[number]

    def has_room(self, tokens: int) -> bool:
        """Return whether the KV cache has room for a clip of `tokens` tokens."""
        return self._kv_tokens + tokens <= self.reported.kv_capacity_tokens

    @property
    def burden(self) -> tuple[float, float]:
        """Sort key: seconds of audio under way, then the used share of the KV cache."""
        audio_s = self.reported.audio_s + sum(audio_s for audio_s, _ in self._unreported.values())
        return audio_s, self._kv_tokens / max(1, self.reported.kv_capacity_tokens)

    @property
    def _kv_tokens(self) -> int:
        return self.reported.kv_tokens + sum(tokens for _, tokens in self._unreported.values())


class Candidate(Protocol):
    """Anything with a known load."""

    @property
    def known(self) -> KnownLoad:
        """Load as this frontend knows it."""
        ...


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], tokens: int, randomness: random.Random) -> C | None:
    """Return a candidate for a clip of `tokens` tokens of context: the less loaded of two random ones.

    Both are drawn from the candidates whose KV cache has room for the clip, if there are any, else from all. None
    without candidates.
    """
    able = [candidate for candidate in candidates if candidate.known.has_room(tokens)] or candidates
    drawn = randomness.sample(able, min(_CHOICES, len(able)))
    return min(drawn, key=lambda candidate: candidate.known.burden, default=None)
