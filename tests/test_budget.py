"""Budgets hold exactly, in every unit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinsight.budget import FlopsBudget, KeepBudget, LatencyModel, TimeBudget, fill, fit, fit_rate, schedule_of
from thinsight.cost import DecoderShape
from thinsight.errors import BadInput, ThinsightError
from thinsight.schedule import Schedule

L, N = 6, 40
SHAPE = DecoderShape(L, 32, 4, 4, 8, 64, 100, True)
LATENCY = LatencyModel("cpu", "float32", 1, 0.001, (0.0, 20.0, 60.0), (0.0001, 0.0004, 0.002))


def budgets(share: float) -> list[Any]:
    """A budget of each unit, of about that share of what lies between nothing and everything."""
    full, none = Schedule.full(L), Schedule([0.0] * L)
    made: list[Any] = [KeepBudget(L, N, share)]
    for build in (lambda limit: FlopsBudget(SHAPE, N, 10, limit), lambda limit: TimeBudget(LATENCY, L, N, 10, limit)):
        low, high = build(1.0).spent(none), build(1.0).spent(full)
        made.append(build(low + share * (high - low)))
    return made


def one_more(schedule: Schedule) -> Schedule:
    """A token more in every layer that has room."""
    return schedule_of([min(N, count + 1) for count in schedule.counts(N)], N)


@given(share=st.floats(0.02, 0.98))
@settings(max_examples=40, deadline=None)
def test_a_fitted_rate_holds_and_one_token_more_per_layer_does_not(share: float) -> None:
    for budget in budgets(share):
        rate = fit_rate(budget, lambda r: Schedule([r] * L))
        schedule = Schedule([rate] * L)
        assert budget.holds(schedule)
        assert not budget.holds(one_more(schedule))


@given(share=st.floats(0.02, 0.98), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_filled_schedule_has_no_room_for_one_token_anywhere(share: float, data: st.DataObject) -> None:
    shape = sorted(data.draw(st.lists(st.floats(0, 1), min_size=L, max_size=L)), reverse=True)
    for budget in budgets(share):
        start = fit(budget, lambda x: Schedule([rate * x for rate in shape]), 0.0, 1.0)
        filled = fill(budget, start)
        counts = filled.counts(N)
        assert budget.holds(filled)
        assert all(new >= old for new, old in zip(counts, start.counts(N), strict=True))
        for layer in range(L):
            above = counts[layer - 1] if layer else N
            more = [count + (i == layer) for i, count in enumerate(counts)]
            assert counts[layer] == above or not budget.holds(schedule_of(more, N))


def test_layers_before_the_first_are_left_alone() -> None:
    budget = KeepBudget(L, N, 0.5)
    filled = fill(budget, Schedule([1, 0.5, 0.1, 0, 0, 0]), first_layer=2)
    assert filled.counts(N)[:2] == (40, 20)
    assert budget.spent(filled) == 0.5


def test_what_cannot_be_reached_is_refused_with_what_it_costs() -> None:
    with pytest.raises(ThinsightError, match=r"FastV cannot go below a mean keep rate of 0\.3333"):
        fit_rate(KeepBudget(L, N, 0.25), lambda r: Schedule.step(L, 2, r), "FastV")
    with pytest.raises(ThinsightError, match="cannot go below decoder FLOPs of"):
        fit(FlopsBudget(SHAPE, N, 10, 1.0), lambda x: Schedule([x] * L), 0.0, 1.0)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan"), True, "0.5"])
def test_a_mean_keep_rate_is_checked(rate: Any) -> None:
    with pytest.raises(ThinsightError, match="budget is"):
        KeepBudget(L, N, rate)


def test_a_latency_model_is_linear_between_its_points_and_beyond_them() -> None:
    assert LATENCY.layer(20) == pytest.approx(0.0004)
    assert LATENCY.layer(40) == pytest.approx(0.0012)
    assert LATENCY.layer(80) == pytest.approx(0.0028)
    assert LATENCY.prefill([20, 40]) == pytest.approx(0.001 + 0.0016)
    assert LatencyModel.from_dict(LATENCY.to_dict()) == LATENCY


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [((20.0,), (0.1,)), ((), ()), ((20.0, 60.0), (0.1,)), ((20.0, 20.0), (0.1, 0.1)), ((60.0, 20.0), (0.1, 0.2))],
)
def test_a_latency_model_needs_two_rising_points(tokens: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="two or more of both, the counts rising"):
        LatencyModel("cpu", "float32", 1, 0.0, tokens, seconds)


def test_a_budget_says_what_it_is_in_json_values() -> None:
    keep, flops, time = budgets(0.5)
    assert keep.to_dict() == {"unit": "keep", "limit": 0.5, "n_vision": N}
    assert flops.to_dict()["unit"] == "flops"
    assert time.to_dict()["latency"]["batch"] == 1
