"""Output tokens that a budget in money and the free quota leave to one request, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from serving.tenancy.limits.spending import (
    MIN_SHARE_TOKENS,
    NO_BUDGET,
    RESERVED_RETRY_S,
    SHARE,
    SMALLEST,
    Amounts,
    output_left_by_money,
    share_of,
)

REQUEST = Amounts(
    audio_ms=1000,
    input_tokens=20,
    expected_output_tokens=30,
    max_output_tokens=100,
    input_nanos=200,
    output_token_nanos=7,
    min_token_nanos=5,
)
"""20 tokens of 10 nanos, and up to 100 tokens of 7 nanos; a free token saves at least 5."""


def left(limit: int, billed: int = 0, reserved: tuple[int, int] = (0, 0), free_left: int = 0, **changes: int) -> int:
    """Return the output tokens that the budget leaves to `REQUEST`, or to a changed one."""
    return output_left_by_money(
        dataclasses.replace(REQUEST, **changes),
        limit=limit,
        billed=billed,
        reserved_nanos=reserved[0],
        reserved_tokens=reserved[1],
        free_left=free_left,
    )


def test_the_constants_are_those_of_the_documents() -> None:
    """An eighth of what is left, but 2,048 tokens at least; two seconds to retry; no budget leaves 2**31 tokens."""
    assert (SHARE, MIN_SHARE_TOKENS, RESERVED_RETRY_S, NO_BUDGET) == (8, 2048, 2, 2_147_483_648)


def test_amounts_start_from_the_smallest_request() -> None:
    """Without values nothing is expected, and one token may be written."""
    assert dataclasses.astuple(SMALLEST) == (0, 0, 0, 1, 0, 0, 0)
    assert REQUEST.expected_tokens == 50
    assert [dataclasses.replace(REQUEST, max_output_tokens=most).needed_output_tokens for most in (0, 1, 5)] == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("limit", "billed", "reserved", "output"),
    [
        (1000, 0, (0, 0), 114),  # (1000 - 200) // 7
        (1000, 100, (0, 0), 100),  # (1000 - 100 - 200) // 7
        (1000, 100, (300, 40), 57),  # (1000 - 100 - 300 - 200) // 7
        (1000, 100, (699, 40), 0),
        (1000, 100, (700, 40), 0),  # the input alone fits to the nano
        (1000, 100, (701, 40), -1),
        (1000, 1000, (0, 0), -1),
        (200, 0, (0, 0), 0),
        (199, 0, (0, 0), -1),
        (1000, 1001, (0, 0), -1),
    ],
)
def test_a_budget_leaves_what_it_can_pay(limit: int, billed: int, reserved: tuple[int, int], output: int) -> None:
    """The limit less what was billed, is reserved and the input costs, over the price of an output token."""
    assert left(limit, billed, reserved) == output


@pytest.mark.parametrize(
    ("limit", "billed", "reserved_tokens", "free_left", "output"),
    [
        (0, 0, 0, 120, 100),  # all of it is free: 120 - 20 >= 100
        (0, 0, 0, 121, 101),
        (10**6, 0, 0, 120, 100),
        (0, 0, 1, 120, 99),  # 120 - 1 - 20 are free, more than (0 - 200 + 5 x 120) // 7 = 57
        (0, 0, 20, 120, 80),
        (100, 0, 0, 30, 10),  # (100 - 200 + 150) // 7 = 7, but 10 are free
        (140, 0, 0, 30, 12),  # (140 - 200 + 150) // 7 = 12
        (0, 0, 0, 10, -1),  # neither the money nor the quota covers the input
        (0, 0, 0, 19, -1),
        (49, 0, 0, 30, 10),  # the money is short by a nano, the quota is not
        (0, 0, 0, 20, 0),
        (5, 6, 0, 10**6, -1),  # a budget that is exceeded refuses free requests too
        (6, 6, 0, 10**6, 10**6 - 20),
    ],
)
def test_free_tokens_spare_the_budget(
    limit: int, billed: int, reserved_tokens: int, free_left: int, output: int
) -> None:
    """Nobody pays while all fits into the quota; beyond it each free token saves at least the lower price."""
    assert left(limit, billed, (0, reserved_tokens), free_left) == output


def test_output_without_a_price_is_not_limited() -> None:
    """If output costs nothing, a budget that pays the input leaves any number of tokens."""
    assert left(200, output_token_nanos=0) == 2_147_483_648
    assert left(199, output_token_nanos=0) == -1


@pytest.mark.parametrize(
    ("tokens", "running", "share"),
    [
        (100_000, 0, 100_000),
        (100_000, 1, 100_000),
        (100_000, 2, 12_500),
        (16_384, 2, 2048),
        (16_392, 2, 2049),
        (16_000, 2, 2048),
        (2048, 2, 2048),
        (2047, 2, 2047),
        (0, 2, 0),
        (-1, 2, -1),
    ],
)
def test_a_request_gets_an_eighth_while_others_run(tokens: int, running: int, share: int) -> None:
    """A request alone gets all; among others an eighth, or 2,048 tokens if there are as many."""
    assert share_of(tokens, running=running) == share
