"""Searches under a budget: they hold it, find what is there, and a seed and a journal decide everything."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import NeedOracle, SmoothOracle

from thinsight.budget import FlopsBudget, KeepBudget
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation.result import Evaluation
from thinsight.experimental.adaptive import adaptive_search
from thinsight.schedule import Schedule
from thinsight.searches import StandIn, frontier, psigmoid, random_search, sensitivity_search
from thinsight.searches.certify import certify
from thinsight.searches.sensitivity import SHARES, ExitModel
from thinsight.searches.shapes import deform, first_layer_for, fit_sigmoid, random_staircase, sigmoid

L, N = 8, 32
SEARCHES = [psigmoid, random_search, sensitivity_search]


def oracle() -> SmoothOracle:
    """A quarter of the tokens is needed for long, the rest leaves early."""
    leaves = [7.0] * (N // 4) + [2.0] * (N - N // 4)
    return SmoothOracle(N, L, leaves, np.linspace(0.1, 6.0, 32).tolist())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("rate", [0.5, 0.25, 0.2])
def test_what_is_found_spends_the_budget_and_was_run_on_all_examples(search: Any, rate: float) -> None:
    budget = KeepBudget(L, N, rate)
    result = search(oracle(), budget, n_trials=12)
    assert budget.holds(result.schedule)
    more = [min(N, count + 1) for count in result.schedule.counts(N)]
    assert sum(more) / (L * N) > rate
    best = [trial for trial in result.trials if trial.schedule == result.schedule and trial.share == 1]
    assert result.score == best[0].score == oracle()(result.schedule).score
    assert result.evaluations <= 12
    assert result.full_forwards == pytest.approx(result.cost / 32)
    assert result.reduction.search["method"] == result.method
    assert result.reduction.search["budget"]["limit"] == rate
    assert result.spent == budget.spent(result.schedule)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("rate", [0.25, np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_a_number_is_a_mean_keep_rate(search: Any, rate: Any) -> None:
    assert search(oracle(), rate, n_trials=8) == search(oracle(), KeepBudget(L, N, 0.25), n_trials=8)


def test_a_frontier_takes_numbers() -> None:
    budgets = [KeepBudget(L, N, rate) for rate in (0.2, 0.4)]
    wanted = frontier(oracle(), budgets)
    assert frontier(oracle(), [0.4, 0.2]) == wanted
    assert frontier(oracle(), np.array([0.2, 0.4])) == wanted
    assert frontier(oracle(), 0.4) == frontier(oracle(), [0.4]) == frontier(oracle(), budgets[1:])
    assert [point.budget["limit"] for point in frontier(oracle()).points] == list(SHARES[2:])


@pytest.mark.parametrize("value", [True, False, 0, 0.0, -0.25, 1.01, 10**400, float("nan"), float("inf")])
@pytest.mark.parametrize("search", [*SEARCHES, adaptive_search, frontier])
def test_a_number_that_is_no_keep_rate_is_refused(search: Any, value: Any) -> None:
    evaluator = oracle()
    with pytest.raises(BadInput, match=r"^budget is .*; in keep it must be above 0 and at most 1$"):
        search(evaluator, value)
    assert evaluator.calls == []


@pytest.mark.parametrize("value", ["0.25", None, [0.25], {"rate": 0.25}, np.array(0.25), 0.25j])
@pytest.mark.parametrize("search", [*SEARCHES, adaptive_search])
def test_what_is_no_number_is_no_budget(search: Any, value: Any) -> None:
    with pytest.raises(BadInput, match=r"^budget is .*; in keep it must be"):
        search(oracle(), value)


@pytest.mark.parametrize(
    ("budgets", "named"),
    [
        ([], r"budgets is \[\]"),
        (None, "budgets is None"),
        ("0.25", "budget is '0.25'"),
        ([0.25, True], "budget is True"),
    ],
)
def test_a_frontier_needs_budgets(budgets: Any, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        frontier(oracle(), budgets)


@pytest.mark.parametrize("search", [*SEARCHES, adaptive_search, frontier])
def test_units_are_those_of_numbers(search: Any) -> None:
    with pytest.raises(BadInput, match="budget_unit is 'furlongs'; choose one of keep, flops, ms"):
        search(oracle(), 0.25, budget_unit="furlongs")
    with pytest.raises(BadInput, match=r"budget_unit is 'ms', which takes a thinsight\.Evaluator"):
        search(oracle(), 80, budget_unit="ms")
    with pytest.raises(BadInput, match="budget_unit is 'flops' but the budget is in keep; leave budget_unit"):
        search(oracle(), KeepBudget(L, N, 0.25), budget_unit="flops")
    with pytest.raises(BadInput, match="evaluator has no num_layers"):
        search("evaluator", 0.25)


@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf"), 10**400, "2", True])
def test_a_ratio_of_flops_is_a_number_of_at_least_1(ratio: Any) -> None:
    with pytest.raises(BadInput, match="flops_ratio must be at least 1"):
        FlopsBudget.ratio(None, ratio, n_vision=4, n_text=4)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_seed_decides_everything(search: Any) -> None:
    budget = KeepBudget(L, N, 0.3)
    one, two = (search(oracle(), budget, n_trials=10, seed=4) for _ in range(2))
    assert one == two
    schedules = {search(oracle(), budget, n_trials=10, seed=seed).trials[-1].schedule for seed in range(3)}
    assert len(schedules) > 1


class Stopping(StandIn):
    """Stops the search after so many evaluations, as Ctrl-C does."""

    def __init__(self, inner: SmoothOracle, after: int) -> None:
        super().__init__(inner)
        self.after = after

    def sample(self, schedule: Schedule, share: float) -> Evaluation:
        if len(self.inner.calls) >= self.after:
            raise KeyboardInterrupt
        return self.inner.sample(schedule, share)

    def __call__(self, schedule: Schedule) -> Evaluation:
        return self.sample(schedule, 1.0)


@pytest.mark.parametrize("search", SEARCHES)
def test_resumed_equals_straight(search: Any, tmp_path: Path) -> None:
    budget, journal = KeepBudget(L, N, 0.3), tmp_path / "study.jsonl"
    straight = search(oracle(), budget, n_trials=10)
    with pytest.raises(KeyboardInterrupt):
        search(Stopping(oracle(), 5), budget, n_trials=10, study=journal)
    rest = oracle()
    resumed = search(rest, budget, n_trials=10, study=journal, resume=True)
    assert resumed == straight
    asked = len({(trial.schedule, trial.share) for trial in straight.trials})
    assert len(rest.calls) == asked - 5


def best_possible(budget: KeepBudget, evaluator: SmoothOracle) -> float:
    """The least that tokens can lack, over all schedules in two rates."""
    counts = range(0, N + 1, 2)
    found = []
    for first, high in itertools.product(range(1, L), counts):
        for second in range(first, L):
            for low in (c for c in counts if c <= high):
                rates = [1.0] * first + [high / N] * (second - first) + [low / N] * (L - second)
                if budget.holds(Schedule(rates)):
                    found.append(evaluator.lacking(Schedule(rates)))
    return min(found)


@pytest.mark.parametrize("rate", [0.5, 0.35, 0.25])
def test_the_sensitivity_search_comes_near_the_best_and_beats_the_others(rate: float) -> None:
    budget, evaluator = KeepBudget(L, N, rate), oracle()
    ours = evaluator.lacking(sensitivity_search(evaluator, budget).schedule)
    assert ours <= best_possible(budget, evaluator) + 0.15
    for other in (psigmoid, random_search):
        assert ours <= evaluator.lacking(other(evaluator, budget).schedule) + 1e-9


def test_the_exit_model_is_exact_where_losses_add_up() -> None:
    """Every schedule over the measured layers and rates is tried."""
    rng = np.random.default_rng(0)
    layers, rates = (1, 2, 3, 4, 5), (0.75, 0.5, 0.25, 0.0)
    widths = -np.diff([1.0, *rates])
    for _ in range(5):
        # by band and exit: the later, the less is lost; at exit L nothing
        bands = np.sort(rng.uniform(size=(4, 5)), axis=1)[:, ::-1]
        model = ExitModel(6, 1, layers, rates, np.cumsum(bands, axis=0).T)
        full = np.concatenate([bands, np.zeros((4, 1))], axis=1)
        np.testing.assert_allclose(model.band_losses(), full)
        for price in (0.01, 0.1, 0.5):

            def total(exits: tuple[int, ...], price: float = price, full: Any = full) -> float:
                loss = sum(full[b, e] for b, e in enumerate(exits))
                return float(loss + price * sum(w * (1 + e) for w, e in zip(widths, exits, strict=True)))

            allowed = [e for e in itertools.product(range(6), repeat=4) if list(e) == sorted(e)]
            best = min(allowed, key=total)
            rates_of_best = np.ones(6)
            for exit_place, rate in zip(best, rates, strict=True):
                rates_of_best[1 + exit_place :] = rate
            assert model._best(price).keep_rates == tuple(rates_of_best)


def test_the_frontier_rises_and_picks() -> None:
    budgets = [KeepBudget(L, N, rate) for rate in (0.05, 0.2, 0.4, 0.7)]
    found = frontier(oracle(), budgets)
    assert [point.budget["limit"] for point in found.points] == [0.2, 0.4, 0.7]  # layer 0 alone costs .125
    scores = [point.score for point in found.points]
    assert scores == sorted(scores)
    assert found.within(0.5) == found.points[1]
    assert found.at_drop(0.0) in (*found.points, None)
    assert found.at_drop(1.0) == found.points[0]
    with pytest.raises(ThinsightError, match="the cheapest point costs"):
        found.within(0.1)


def test_a_warm_start_is_tried_first() -> None:
    start = Schedule.sigmoid(L, k=1.5, budget=0.4)
    result = psigmoid(oracle(), KeepBudget(L, N, 0.4), n_trials=3, warm_start=start)
    assert result.trials[0].why == f"k={fit_sigmoid(start, 2)['k']:.4g}"
    assert fit_sigmoid(start)["k"] == pytest.approx(1.5, rel=1e-3)


def test_the_ranker_may_be_searched_too() -> None:
    class TwoRankers(SmoothOracle):
        def sample(self, schedule: Any, share: float) -> Evaluation:
            bad = getattr(schedule, "ranker", {"name": "good"})["name"] == "random"
            found = super().sample(getattr(schedule, "schedule", schedule), share)
            worse = 0.5 if bad else 1.0
            return Evaluation(score=found.score * worse, agreement=found.agreement * worse, share=found.share)

    evaluator = TwoRankers(N, L, [7.0] * 8 + [2.0] * 24, [1.0] * 16)
    rankers = [{"name": "random", "seed": 0}, {"name": "uniform"}]
    result = sensitivity_search(evaluator, KeepBudget(L, N, 0.3), rankers=rankers)
    assert result.reduction.ranker["name"] == "uniform"
    assert {trial.ranker["name"] for trial in result.trials if trial.why == "ranker"} == {"random", "uniform"}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_trials": 0}, "n_trials is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"first_layer": 0}, "first_layer is 0"),
        ({"first_layer": L}, f"first_layer is {L}"),
        ({"budget": KeepBudget(L, N, 0.1)}, "the budget is 0.1"),
        ({"budget": KeepBudget(L + 1, N, 0.5)}, "the budget is for 9 layers but the evaluator has 8"),
        ({"budget": KeepBudget(L, N - 1, 0.5)}, "the budget is for 31 vision tokens"),
    ],
)
def test_bad_arguments_are_named_before_any_work(search: Any, arguments: dict[str, Any], named: str) -> None:
    evaluator = oracle()
    with pytest.raises(ThinsightError, match=named):
        search(evaluator, **{"budget": KeepBudget(L, N, 0.5), **arguments})
    assert evaluator.calls == []


# --- shapes


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.9])
def test_shapes_spend_the_budget(rate: float) -> None:
    budget, rng = KeepBudget(L, N, rate), np.random.default_rng(0)
    shapes = [sigmoid(budget, k, first_layer=1) for k in (0.01, 1.0, 50.0)]
    shapes += [sigmoid(budget, 1.0, amplitude=0.6, floor=0.2, first_layer=1)]
    shapes += [random_staircase(budget, rng, 1) for _ in range(20)]
    shapes += [deform(budget, shapes[0], rng, 2.0, 1) for _ in range(20)]
    for schedule in shapes:
        assert schedule.keep_rates[0] == 1
        assert budget.holds(schedule)
        assert sum(min(N, count + 1) for count in schedule.counts(N)) / (L * N) > rate
    assert len(set(shapes)) > 10


def test_the_first_layer_is_the_papers_unless_the_budget_is_small() -> None:
    assert first_layer_for(KeepBudget(L, N, 0.6), 1) == 2
    assert first_layer_for(KeepBudget(L, N, 0.3), 1) == 1
    assert first_layer_for(KeepBudget(L, N, 0.1), 0) == 0


# -- certified points ----------------------------------------------------------------------------------------


class Scored(NeedOracle):
    """Tells each example's score."""

    def __call__(self, candidate: Any, /) -> Evaluation:
        counts = getattr(candidate, "schedule", candidate).counts(self.num_vision_tokens)
        right = [all(c >= k for c, k in zip(counts, need, strict=True)) for need in self.needs]
        scores = np.array([*right, *[False] * self.lost], dtype=float)
        return Evaluation(float(scores.mean()), scores, cost=float(sum(counts)))


def test_a_frontier_is_certified_from_its_costly_end() -> None:
    rng = np.random.default_rng(0)

    def drawn(count: int) -> Scored:
        """Half of the tokens are enough for all, an eighth for nine of ten."""
        needs = np.where(rng.random(count) < 0.1, rng.integers(8, 32, count), rng.integers(0, 8, count))
        return Scored(64, [[0, 0, need, need] for need in needs], lost=count // 10)

    found = frontier(drawn(200), [0.55, 0.65, 0.8])
    fresh = drawn(1000)
    chosen = found.certified(fresh, 0.02)
    certificate = chosen.certificate
    assert certificate is not None
    assert certificate.schedule == chosen.schedule
    assert certificate.path == tuple(point.schedule for point in reversed(found.points))
    spent = [schedule.mean_keep_rate for schedule in certificate.path]
    assert spent == sorted(spent, reverse=True)
    assert certificate == certify([point.reduction for point in reversed(found.points)], fresh, 0.02)
    again = found.certified(drawn(20), 0.02)
    assert again.schedule.is_full
    assert again.certificate is not None
    assert again.certificate.schedule is None
    with pytest.raises(BadInput, match="max_drop is 0"):
        found.certified(fresh, 0.0)
