"""Schedule: validation, the rounding rule, the named shapes, resampling."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinsight.errors import ThinsightError
from thinsight.schedule import Schedule

rates = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda values: sorted(values, reverse=True))


@given(rates)
def test_valid_rates_are_kept_as_they_are(values: list[float]) -> None:
    schedule = Schedule(values)
    assert schedule.keep_rates == tuple(values)
    assert schedule.num_layers == len(values)
    assert schedule == Schedule(tuple(values))
    assert hash(schedule) == hash(Schedule(np.array(values)))
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], "empty"),
        ([1.0, 0.5, 0.6], "keep_rates[2] is 0.6 but keep_rates[1] is 0.5"),
        ([1.0, float("nan")], "keep_rates[1] is nan"),
        ([1.1, 0.5], "keep_rates[0] is 1.1"),
        ([0.5, -0.1], "keep_rates[1] is -0.1"),
        ([1, True], "keep_rates[1] is True"),
        (["1"], "keep_rates[0] is '1'"),
        ([1.0, 10**400], "keep_rates[1] is 1000"),
        ([-(10**5000)], "keep_rates[0] is too large"),
        ([0.5j], "keep_rates[0] is 0.5j"),
        ("11", "keep_rates is '11'"),
        (0.5, "keep_rates is 0.5"),
        (None, "keep_rates is None"),
    ],
)
def test_bad_rates_are_named(values: object, named: str) -> None:
    with pytest.raises(ThinsightError) as caught:
        Schedule(values)  # type: ignore[arg-type]
    assert named in str(caught.value)


def test_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Schedule.full(2).keep_rates = (0.0, 0.0)  # type: ignore[misc]


@given(st.integers(0, 4000), st.integers(1, 4000))
def test_counts_invert_count_over_n(count: int, n: int) -> None:
    count = min(count, n)
    assert Schedule([count / n]).counts(n) == (count,)


@given(rates, st.integers(0, 3000))
def test_counts_round_up_and_never_rise(values: list[float], n: int) -> None:
    counts = Schedule(values).counts(n)
    for count, rate in zip(counts, values, strict=True):
        exact = Fraction(rate) * n
        assert exact - Fraction(1, 10**8) <= count < exact + 1
        assert 0 <= count <= n
    assert list(counts) == sorted(counts, reverse=True)


def test_counts_example() -> None:
    assert Schedule([1.0, 0.3, 0.0]).counts(10) == (10, 3, 0)
    assert Schedule([0.301]).counts(10) == (4,)
    with pytest.raises(ThinsightError, match=r"n .* is -1"):
        Schedule.full(2).counts(-1)


def test_reductions_and_runs() -> None:
    schedule = Schedule([0.5, 0.5, 0.2, 0.19, 0.0])
    assert schedule.reductions(10) == {0: 5, 2: 2, 4: 0}
    assert schedule.runs() == [(0, 1, 0.5), (2, 2, 0.2), (3, 3, 0.19), (4, 4, 0.0)]
    assert Schedule.full(3).reductions(10) == {}


def test_named_shapes() -> None:
    assert Schedule.full(3).keep_rates == (1.0, 1.0, 1.0)
    assert Schedule.full(3).is_full
    assert Schedule.step(4, 2, 0.25).keep_rates == (1.0, 1.0, 0.25, 0.25)
    assert Schedule.step(4, 0, 0.0).mean_keep_rate == 0.0
    assert Schedule.stages(5, {3: 0.1, 1: 0.5}).keep_rates == (1.0, 0.5, 0.5, 0.1, 0.1)
    assert not Schedule.step(4, 3, 0.99).is_full


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Schedule.full(0), "num_layers is 0"),
        (lambda: Schedule.full(2.0), "num_layers is 2.0"),
        (lambda: Schedule.step(4, 4, 0.5), "layer is 4"),
        (lambda: Schedule.step(4, -1, 0.5), "layer is -1"),
        (lambda: Schedule.step(4, 1, 1.5), "keep_rates[1] is 1.5"),
        (lambda: Schedule.stages(4, {1: 0.2, 2: 0.4}), "keep_rates[2] is 0.4"),
        (lambda: Schedule.sigmoid(4, 0.0, 0.5), "k is 0.0"),
        (lambda: Schedule.sigmoid(4, float("nan"), 0.5), "k is nan"),
        (lambda: Schedule.sigmoid(4, 1.0, 1.5), "budget is 1.5"),
        (lambda: Schedule.full(4).with_tail(2, -1.0), "rate is -1.0"),
        (lambda: Schedule.full(4).resample(0), "num_layers is 0"),
    ],
)
def test_bad_shapes_are_named(make: object, named: str) -> None:
    with pytest.raises(ThinsightError) as caught:
        make()  # type: ignore[operator]
    assert named in str(caught.value)


@given(st.integers(1, 80), st.floats(1e-6, 1000.0), st.floats(1e-6, 1 - 1e-6))
def test_sigmoid_holds_its_budget(depth: int, k: float, budget: float) -> None:
    mean = Schedule.sigmoid(depth, k, budget).mean_keep_rate
    assert mean <= budget
    assert mean == pytest.approx(budget, rel=1e-6)


def test_sigmoid_is_the_papers_curve() -> None:
    schedule = Schedule.sigmoid(32, 0.3558, 0.125)
    logits = [math.log(rate / (1 - rate)) for rate in schedule.keep_rates]
    assert np.diff(logits) == pytest.approx([-0.3558] * 31)
    assert Schedule.sigmoid(4, 1.0, 1.0).is_full
    assert Schedule.sigmoid(4, 1.0, 0.0).keep_rates == (0.0,) * 4


@given(rates, st.integers(1, 60))
def test_resample_keeps_the_mean(values: list[float], depth: int) -> None:
    schedule = Schedule(values)
    other = schedule.resample(depth)
    assert other.num_layers == depth
    assert other.mean_keep_rate == pytest.approx(schedule.mean_keep_rate, abs=1e-12)
    assert schedule.resample(len(values)) == schedule
    assert schedule.resample(len(values) * 3).resample(len(values)).keep_rates == pytest.approx(values, abs=1e-12)


def test_resample_example() -> None:
    assert Schedule([1.0, 0.5, 0.0]).resample(6).keep_rates == (1.0, 1.0, 0.5, 0.5, 0.0, 0.0)
    assert Schedule([1.0, 1.0, 0.5, 0.0]).resample(2).keep_rates == (1.0, 0.25)


@given(rates, st.data())
def test_with_tail_lowers_only_what_is_above(values: list[float], data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, len(values) - 1))
    rate = data.draw(st.floats(0, 1))
    tailed = Schedule(values).with_tail(layer, rate).keep_rates
    assert tailed[:layer] == tuple(values[:layer])
    assert tailed[layer:] == tuple(min(value, rate) for value in values[layer:])
