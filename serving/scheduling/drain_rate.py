"""The rate at which a queue drains, and the `Retry-After` that follows from it."""

from __future__ import annotations

import math

_WINDOW_S, _MIN_WINDOW_S = 30.0, 5.0
"""Time constant of the exponential mean, and the shortest time over which the rate is computed."""

_MAX_RETRY_AFTER_S = 60
"""Upper bound of `Retry-After`: clients honour no longer one (PROTOCOL 2.13)."""


class DrainRate:
    """Audio-seconds per second that leave a queue: an exponential mean over about half a minute."""

    def __init__(self) -> None:
        self._since_s = math.inf
        self._at_s = self._audio_s = 0.0

    def add(self, audio_s: float, now_s: float) -> None:
        """Record that `audio_s` seconds of audio have left the queue."""
        self._decay(now_s)
        self._audio_s += audio_s

    def retry_after_s(self, backlog_s: float, now_s: float) -> int:
        """Seconds until a backlog of `backlog_s` seconds of audio is drained, for a client: 1 to 60."""
        self._decay(now_s)
        # Only this much of the window has been observed. The clips that an empty engine starts at once say little.
        observed_s = max(_MIN_WINDOW_S, _WINDOW_S * -math.expm1((self._since_s - now_s) / _WINDOW_S))
        if backlog_s * observed_s >= _MAX_RETRY_AFTER_S * self._audio_s:
            return _MAX_RETRY_AFTER_S
        return max(1, math.ceil(backlog_s * observed_s / self._audio_s))

    def _decay(self, now_s: float) -> None:
        self._since_s = min(self._since_s, now_s)
        self._audio_s *= math.exp((self._at_s - now_s) / _WINDOW_S)
        self._at_s = now_s
