"""The solvers on single layers and, for the Bayesian one, on whole searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NeedOracle

from thinsight.errors import ThinsightError
from thinsight.schedule import Schedule
from thinsight.searches import Bayes, Bisect, LayerProblem, Trial, gsearch


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


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(1, 40), st.sets(st.integers(0, 600)))
def test_one_at_a_time_halves_what_is_left(upper: int, step: int, passing: set[int]) -> None:
    wanted: list[int] = []
    fails, passes = -1, -(-upper // step)
    while passes - fails > 1:
        middle = (fails + passes) // 2
        wanted.append(middle * step)
        fails, passes = (fails, middle) if middle * step in passing else (middle, passes)
    seen: list[int] = []

    def probe(count: int, *, exact: bool = False) -> Trial:
        seen.append(count)
        return Trial(0, 0.0, count, 0.0, True, count in passing, Schedule.full(1))

    assert Bisect(step).solve(LayerProblem(upper, 1.0, probe, float, seed=0)) == min(passes * step, upper)
    assert seen == wanted


def in_rounds(single: LayerProblem, rounds: list[list[int]]) -> LayerProblem:
    """The same question, asked several counts at a time."""

    def probe_all(counts: Sequence[int]) -> list[Trial]:
        rounds.append(list(counts))
        return [single.probe(count) for count in counts]

    return replace(single, probe_all=probe_all)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(1, 9), st.data())
def test_several_at_once_find_the_same_in_fewer_rounds(upper: int, at_once: int, data: st.DataObject) -> None:
    least, step = data.draw(st.integers(0, upper)), data.draw(st.integers(1, 40))
    seen: list[int] = []
    rounds: list[list[int]] = []
    solver = Bisect(step, at_once)
    count = solver.solve(in_rounds(problem(upper, least, seen), rounds))
    assert count == Bisect(step).solve(problem(upper, least, []))
    assert len(seen) == len(set(seen)) <= solver.most_evaluations(upper)
    assert all(0 <= tried < upper and tried % step == 0 for tried in seen)
    assert all(counts == sorted(counts) and 1 <= len(counts) <= at_once for counts in rounds)
    width = -(-upper // step) + 1
    assert len(rounds) <= math.ceil(round(math.log(width, at_once + 1), 9))


def test_each_round_cuts_into_parts_of_like_width() -> None:
    rounds: list[list[int]] = []
    assert Bisect(at_once=3).solve(in_rounds(problem(63, 22, []), rounds)) == 22
    assert rounds == [[15, 31, 47], [19, 23, 27], [20, 21, 22]]
    rounds.clear()
    assert Bisect(step=10, at_once=7).solve(in_rounds(problem(64, 22, []), rounds)) == 30
    assert rounds == [[0, 10, 20, 30, 40, 50, 60]]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 9))
def test_the_most_evaluations_never_fall_with_the_count(upper: int, at_once: int) -> None:
    solver = Bisect(at_once=at_once)
    assert solver.most_evaluations(upper - 1) <= solver.most_evaluations(upper)
    assert Bisect().most_evaluations(upper) == upper.bit_length()


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 100), st.integers(1, 9), st.sets(st.integers(0, 99)))
def test_where_nothing_is_monotone_what_is_found_was_accepted(upper: int, at_once: int, passing: set[int]) -> None:
    tried: list[int] = []

    def probe(count: int, *, exact: bool = False) -> Trial:
        tried.append(count)
        return Trial(0, 0.0, count, 0.0, True, count in passing, Schedule.full(1))

    count = Bisect(at_once=at_once).solve(LayerProblem(upper, 1.0, probe, float, seed=0))
    assert count == upper or (count in passing and count in tried)
    assert count == 0 or (count - 1 in tried and count - 1 not in passing)  # its neighbour fails


def test_a_problem_without_probe_all_is_probed_one_after_another() -> None:
    seen: list[int] = []
    assert Bisect(at_once=3).solve(problem(15, 5, seen)) == 5
    assert seen == [3, 7, 11, 4, 5, 6]


def test_several_at_once_is_no_setting_and_must_be_a_number() -> None:
    assert Bisect(4, at_once=3).settings == Bisect(4).settings == {"name": "bisect", "step": 4}
    with pytest.raises(ThinsightError, match="at_once is 0"):
        Bisect(at_once=0)


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
            for trial in gsearch(NeedOracle(64, [[64, 64, 40, 9]]), 0.0, solver=Bayes(n_trials=3), seed=seed).trials
        ]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("bisect", {"trade_off": math.nan}, "trade_off is nan, which solver 'bisect' does not take"),
        ("bisect", {"n_trials": 8}, "n_trials is 8, which solver 'bisect' does not take: .* choose 'bayes'"),
        ("bayes", {"step": 1}, "step is 1, which solver 'bayes' does not take: .* choose 'bisect'"),
        (Bisect(4), {"step": 4}, "step is 4, which solver Bisect"),
        (Bayes(), {"n_trials": 4}, "n_trials is 4, which solver Bayes"),
        ("bayes", {"trade_off": math.inf}, "trade_off is inf; it must be a finite number"),
        ("", {}, "solver is ''; choose"),
    ],
)
def test_settings_that_a_solver_does_not_take_are_refused(solver: Any, options: dict[str, Any], words: str) -> None:
    oracle = NeedOracle(8, [[8, 8, 4]])
    with pytest.raises(ThinsightError, match=words):
        gsearch(oracle, 0.0, solver=solver, **options)
    assert oracle.calls == []


def test_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    gsearch(NeedOracle(8, [[8, 8, 4]]), 0.0, solver="bayes", n_trials=2)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


class Exact(Bisect):
    """A user's solver that reads complete scores only."""

    @property
    def exact(self) -> bool:
        return True


def test_what_a_solver_reads_is_its_own_word() -> None:
    oracle = NeedOracle(4, [[4, 4, 4]])
    for solver in (Bayes(), Exact()):
        name = solver.settings["name"]
        with pytest.raises(ThinsightError, match=f"confidence is 0.9, but solver '{name}' scores every"):
            gsearch(oracle, 0.1, solver=solver, confidence=0.9)
    assert oracle.calls == []
    gsearch(oracle, 0.1, solver=Bisect(), confidence=0.9)


def test_an_object_without_all_members_is_no_solver() -> None:
    class Old:
        settings = {"name": "old"}  # noqa: RUF012

        def solve(self, problem: Any) -> int:
            return int(problem.upper)

    with pytest.raises(ThinsightError, match="pass an object with all members of Solver"):
        gsearch(NeedOracle(4, [[4, 4, 4]]), 0.0, solver=Old())  # type: ignore[arg-type]
