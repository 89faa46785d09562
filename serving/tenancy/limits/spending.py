"""Budgets and the free quota: how many output tokens a request may write, so that no budget is exceeded.

A request reserves, in each budget, its input and the output that it may write: `max_tokens`, reduced to what is left.
Nothing that a caller controls (its own `max_tokens`, stop strings, leaving) makes a reservation smaller than what can
be billed, so the sum of what was billed and what is reserved never exceeds a budget.

`redis.lua` has the same functions; both are held equal by tests/tenancy/test_limits_parity.py.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 8
"""While other requests of the scope run, one request may use at most this fraction of what is left of a budget."""

MIN_SHARE_TOKENS = 2048
"""A request's part of what is left of a budget is not smaller than this. Captions of the real model have 300 to 600
tokens."""

NO_BUDGET = 2**31
"""Output tokens that are left where no budget limits them."""

RESERVED_RETRY_S = 2
"""Time to retry when running requests have reserved what is left of a budget: they rarely use all of it."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """Expected and largest use of a request. Prices are in nano-units of the currency."""

    audio_ms: int = 0
    input_tokens: int = 0
    expected_output_tokens: int = 0
    """Usual length of a caption, at most `max_output_tokens`. It counts in the limit of tokens per minute."""
    max_output_tokens: int = 1
    input_nanos: int = 0
    """Price of the whole input."""
    output_token_nanos: int = 0
    """Price of one output token."""
    min_token_nanos: int = 0
    """The lower one of the prices of an input and of an output token: the least that a free token saves."""

    @property
    def expected_tokens(self) -> int:
        """Input and expected output together."""
        return self.input_tokens + self.expected_output_tokens

    @property
    def needed_output_tokens(self) -> int:
        """Output tokens without which the request is refused."""
        return min(1, self.max_output_tokens)


SMALLEST = Amounts()
"""A request of one token without a price."""


def output_left_by_money(
    amounts: Amounts, *, limit: int, billed: int, reserved_nanos: int, reserved_tokens: int, free_left: int
) -> int:
    """Return how many output tokens a budget in money leaves to a request; negative if not even its input fits.

    `reserved_nanos` is the list price of `reserved_tokens`, the most that running requests can use. `free_left` tokens
    of the quota will be free for them and this request together: none of them pays while all fit into it, and beyond
    it each free token saves at least `min_token_nanos`.
    """
    if billed > limit:
        return -1
    free_output = free_left - reserved_tokens - amounts.input_tokens
    if free_output >= amounts.max_output_tokens:
        return free_output
    nanos = limit - billed - reserved_nanos - amounts.input_nanos + amounts.min_token_nanos * free_left
    if nanos < 0:
        return max(-1, free_output)
    if not amounts.output_token_nanos:
        return NO_BUDGET
    return max(free_output, nanos // amounts.output_token_nanos)


def share_of(left: int, *, running: int) -> int:
    """Return one request's part of the output tokens that are left; all of them if no other request runs."""
    return left if running <= 1 else max(min(left, MIN_SHARE_TOKENS), left // SHARE)
