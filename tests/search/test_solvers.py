"""The solvers on single layers and, for the Bayesian one, on whole searches."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NeedOracle

from thinsight.schedule import Schedule
from thinsight.search import Bayes, Bisect, LayerProblem, Trial, gsearch


def problem(upper: int, least: int, seen: list[int], score: Any = None) -> LayerProblem:
    """A layer whose counts pass from ``least`` on."""

    def probe(count: int, *, exact: bool = False) -> Trial:
        seen.append(count)
        value = (1.0 if count >= least else 0.0) if score is None else score(count)
        return Trial(0, 0.0, count, value, True, count >= least, Schedule.full(1))

    return LayerProblem(upper, 1.0, probe, lambda count: count / 100, seed=0)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 600), st.data())
def test_bisect_finds_the_least_multiple_of_step(upper: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(0, upper))
    step = data.draw(st.integers(1, 40))
    seen: list[int] = []
    solver = Bisect(step)
    count = solver.solve(problem(upper, least, seen))
    assert count == min(-(-least // step) * step, upper)
    assert len(seen) == len(set(seen)) <= solver.most_evaluations(upper)
    assert all(0 <= tried < upper for tried in seen)


def test_bayes_weighs_accuracy_against_cost() -> None:
    def score(count: int) -> float:
        return 0.9 + count / 1000  # each token gives 0.001; it costs trade_off / 100

    least = [Bayes(trade_off, 12).solve(problem(100, 0, [], score)) for trade_off in (0.0, 10.0)]
    assert least == [100, 0]


def test_bayes_never_leaves_the_tolerance_and_saves() -> None:
    oracle = NeedOracle(64, [[64, 64, 40, 40, 20, 3], [60, 60, 50, 20, 20, 3], [64, 30, 30, 30, 10, 0]] * 7)
    result = gsearch(oracle, 0.05, solver="bayes", trade_off=5.0, n_trials=6)
    exact = gsearch(oracle, 0.05)
    assert result.score >= 0.95 - 1e-9
    assert exact.schedule.mean_keep_rate <= result.schedule.mean_keep_rate < 0.8
    assert result.evaluations <= 4 * 6
    assert all(trial.complete for trial in result.trials)


def test_bayes_is_decided_by_its_seed() -> None:
    def run(seed: int) -> list[int]:
        return [
            trial.count
            for trial in gsearch(
                NeedOracle(64, [[64, 64, 40, 9]]), 0.0, solver=Bayes(n_trials=3), seed=seed
            ).trials
        ]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    gsearch(NeedOracle(8, [[8, 8, 4]]), 0.0, solver="bayes", n_trials=2)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
