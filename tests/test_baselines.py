"""Each baseline has its paper's shape, and under a budget spends it to within one token per layer, never
more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinsight import baselines
from thinsight.baselines import FlopsBudget
from thinsight.errors import ThinsightError
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule

L = 12
CONFIG = {
    "num_hidden_layers": L,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 100,
}


def budget_of(schedule: Schedule, n_vision: int = 100, n_text: int = 20) -> FlopsBudget:
    return FlopsBudget.like(CONFIG, schedule, n_vision=n_vision, n_text=n_text)


def one_more_everywhere(schedule: Schedule, n: int) -> Schedule:
    """Every layer that is reduced at all keeps one token more."""
    return Schedule([min(1.0, (c + 1) / n) for c in schedule.counts(n)])


def assert_meets(budget: FlopsBudget, reduction: Reduction) -> None:
    schedule = reduction.schedule
    assert budget.spent(schedule) <= budget.flops * (1 + 1e-9)
    more = one_more_everywhere(schedule, budget.n_vision)
    assert more == schedule or budget.spent(more) > budget.flops


def test_fastv_is_one_step() -> None:
    reduction = baselines.fastv(L)
    assert reduction.schedule == Schedule.step(L, 2, 0.5)
    assert reduction.ranker["name"] == "text-attention"
    assert reduction.ranker["queries"] == "last"


def test_vtw_withdraws_everything_at_half_depth() -> None:
    assert baselines.vtw(L).schedule.keep_rates == (1.0,) * 6 + (0.0,) * 6
    assert baselines.vtw(L, layer=4).schedule.keep_rates == (1.0,) * 4 + (0.0,) * 8


def test_pyramiddrop_is_a_staircase_with_the_papers_mean() -> None:
    schedule = baselines.pyramiddrop(32).schedule
    assert schedule.keep_rates == (1.0,) * 8 + (0.5,) * 8 + (0.25,) * 8 + (0.125,) * 8
    assert schedule.mean_keep_rate == pytest.approx(0.469, abs=5e-4)  # the paper's table 1


def test_random_and_uniform_keep_the_schedule() -> None:
    schedule = Schedule.step(L, 3, 0.3)
    assert baselines.random(schedule, seed=4).schedule == schedule
    assert baselines.random(schedule, seed=4).ranker == {"name": "random", "seed": 4}
    assert baselines.uniform(schedule).schedule == schedule
    assert baselines.uniform(schedule).ranker["name"] == "uniform"


@settings(max_examples=40, deadline=None)
@given(
    rates=st.lists(st.floats(0, 1), min_size=L - 4, max_size=L - 4),
    n_vision=st.integers(1, 300),
    n_text=st.integers(0, 50),
)
def test_budgets_hold_exactly(rates: list[float], n_vision: int, n_text: int) -> None:
    budget = budget_of(Schedule([1.0] * 4 + sorted(rates, reverse=True)), n_vision, n_text)
    for reduction in (
        baselines.fastv(budget=budget),
        baselines.vtw(budget=budget),
        baselines.pyramiddrop(budget=budget),
    ):
        assert_meets(budget, reduction)


def test_a_step_gets_its_own_cost_back() -> None:
    step = Schedule.step(L, 2, 0.37)
    assert baselines.fastv(budget=budget_of(step)).schedule == step


def test_ratio_budget() -> None:
    budget = FlopsBudget.ratio(CONFIG, 2.0, n_vision=100, n_text=20)
    assert budget.spent(Schedule.full(L)) == pytest.approx(2 * budget.flops)
    assert_meets(budget, baselines.fastv(budget=budget))


def test_a_ranker_can_be_replaced() -> None:
    assert baselines.fastv(L, ranker="vision-attention").ranker["name"] == "vision-attention"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: baselines.fastv(), "num_layers"),
        (lambda: baselines.fastv(5, budget=budget_of(Schedule.full(L))), "contradicts"),
        (lambda: baselines.fastv(budget=budget_of(Schedule.step(L, 0, 0.01))), "earlier layer"),
        (lambda: baselines.pyramiddrop(budget=budget_of(Schedule.step(L, 1, 0.0))), "earlier layer"),
        (lambda: FlopsBudget.ratio(CONFIG, 0.5, n_vision=10, n_text=3), "at least 1"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ThinsightError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
