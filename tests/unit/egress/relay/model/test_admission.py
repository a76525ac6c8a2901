"""What is reserved for a request, and what it is made to say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.model.admission import Plan, Price, plan
from ray_guard.policy.budgets import UNLIMITED


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((10, 1, 5, None, UNLIMITED), Plan(15, None)),
        ((10, 3, 5, None, 100), Plan(25, None)),
        ((10, 1, 5, None, 1), Plan(15, None)),  # reserving that will fail, and say why
        ((5000, 1, 500, 2048, UNLIMITED), Plan(2048, None)),  # the bound is wide, the engine's is not
        ((10, 2, 5000, 2048, UNLIMITED), Plan(4096, None)),
        ((10, 1, None, None, UNLIMITED), Plan(0, None)),
        ((10, 1, None, 2048, UNLIMITED), Plan(2048, None)),
        ((10, 1, None, 2048, 5000), Plan(2048, None)),
        ((10, 1, None, 2048, 1000), Plan(1000, 990)),
        ((10, 2, None, 2048, 1000), Plan(1000, 495)),
        ((2000, 4, None, 2048, 8000), Plan(2192, 48)),  # prompt and answer must fit into the model
        ((10, 1, None, None, 1000), Plan(1000, 990)),
        ((10, 1, None, None, 10), Plan(11, 1)),
        ((10, 1, None, 2048, 0), Plan(11, 1)),
        ((10, 0, None, None, 100), Plan(10, 90)),
    ],
)
def test_plans(asked: Any, expected: Plan) -> None:
    """``asked``: prompt, copies, output, length, room."""
    assert plan(*asked) == expected


@given(
    st.tuples(st.integers(0, 10**6), st.integers(1, 50)),
    st.none() | st.integers(0, 10**6),
    st.none() | st.integers(1, 10**6),
    st.integers(0, 10**7),
    st.floats(0, 1),
)
def test_no_engine_takes_more_than_was_reserved(
    asked: tuple[int, int], output: int | None, length: int | None, room: int, share: float
) -> None:
    """However long the prompt really is, its bound at most, and though each answer is as long as it may be."""
    prompt, copies = asked
    planned = plan(prompt, copies, output, length, room)
    real = int(prompt * share)
    limits = [each for each in (output, planned.fill, None if length is None else length - real) if each is not None]
    if limits and min(limits) >= 0 and planned.reserve <= room:
        assert real + copies * min(limits) <= planned.reserve


PRICES = st.builds(Price, st.floats(1e6, 1e12), st.just(0.0) | st.floats(1, 1e9))


@given(PRICES, st.integers(0, 10**5), st.integers(0, 10**5), st.integers(1, 64))
def test_answers_cost_no_more_than_all_their_tokens_in_a_row(
    price: Price, prompt: int, output: int, copies: int
) -> None:
    whole = price.flops(prompt + output)
    assert price.answers(prompt, output, 1) == pytest.approx(whole)
    assert price.answers(prompt, output, copies) <= whole * (1 + 1e-9)
    many, once = price.answers(prompt, output, copies, copies), price.answers(prompt, output, copies)
    assert many == pytest.approx(once + (copies - 1) * price.flops(prompt)), "each choice may compute it again"


@given(PRICES, st.floats(0, 1e18))
def test_as_many_tokens_as_a_budget_pays_for(price: Price, flops: float) -> None:
    tokens = price.tokens(flops)
    assert price.flops(tokens) <= flops * (1 + 1e-9)
    assert price.flops(tokens + 2) > flops
