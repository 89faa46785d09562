"""Estimates of how many tokens the next caption has, from the lengths of captions that have ended.

A request's `max_tokens` is of no use: it is an upper bound (32,768 by default), and captions of the real model have 300
to 600 tokens. So a caption reserves what captions usually have, and more when it turns out to be longer.
"""

from __future__ import annotations

import math
from collections import OrderedDict

_INITIAL_MEAN_TOKENS, _INITIAL_DEVIATION_TOKENS = 450.0, 75.0
"""Captions of the real model have 300 to 600 tokens."""

_SMOOTHING = 16
"""One caption moves the running means by one sixteenth of its distance from them."""

_MAX_TENANTS = 4096


class OutputEstimate:
    """The running mean of captions' lengths plus `deviations` times their running mean deviation, in tokens.

    With 2 deviations most captions are shorter than the estimate; with 0 about half of them are.
    """

    __slots__ = ("_deviation_tokens", "_deviations", "_mean_tokens")

    def __init__(self, *, deviations: float = 2.0) -> None:
        self._deviations = deviations
        self._mean_tokens, self._deviation_tokens = _INITIAL_MEAN_TOKENS, _INITIAL_DEVIATION_TOKENS

    @property
    def tokens(self) -> int:
        """Expected length of the next caption."""
        return math.ceil(self._mean_tokens + self._deviations * self._deviation_tokens)

    def update(self, tokens: int, *, cut: bool = False) -> None:
        """Include the length of a caption that has ended.

        A caption that was `cut` (by `max_tokens` or a deadline) counts only if it was at least as long as expected: how
        long it would have been is unknown.
        """
        if cut and tokens < self.tokens:
            return
        error = tokens - self._mean_tokens
        self._mean_tokens += error / _SMOOTHING
        self._deviation_tokens += (abs(error) - self._deviation_tokens) / _SMOOTHING


class TenantOutputEstimates:
    """Estimates (the mean alone) for the 4,096 tenants whose captions ended last."""

    def __init__(self) -> None:
        self._estimates: OrderedDict[str, OutputEstimate] = OrderedDict()
        self._unknown = OutputEstimate(deviations=0)

    def tokens(self, tenant_id: str) -> int:
        """Return the expected length of the tenant's next caption."""
        return self._estimates.get(tenant_id, self._unknown).tokens

    def update(self, tenant_id: str, tokens: int, *, cut: bool) -> None:
        """Include the length of a caption of this tenant; see `OutputEstimate.update`."""
        estimate = self._estimates.setdefault(tenant_id, OutputEstimate(deviations=0))
        estimate.update(tokens, cut=cut)
        self._estimates.move_to_end(tenant_id)
        if len(self._estimates) > _MAX_TENANTS:
            self._estimates.popitem(last=False)
