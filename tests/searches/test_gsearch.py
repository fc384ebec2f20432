"""G-Search against brute force, interruption, progress and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DrawingOracle, InterruptedOracle, NeedOracle, StoppingOracle, TokenOracle, all_counts

from thinsight.errors import ThinsightError
from thinsight.evaluation.result import Evaluation
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule
from thinsight.searches import Progress, SearchPlan, SearchResult, Silent, Trial, gsearch

many = settings(max_examples=200, deadline=None, derandomize=True)
needs_of_five = [[11, 9, 9, 6, 2, 0], [12, 12, 5, 4, 4, 1], [7, 7, 7, 7, 1, 1], [16, 3, 3, 0, 0, 0], [9, 9, 9, 2, 2, 2]]


@st.composite
def token_oracles(draw: st.DrawFn) -> TokenOracle:
    n, depth, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rankings = [draw(st.permutations(range(n))) for _ in range(size)]
    essential = []
    for _ in range(size):
        sets = [draw(st.frozensets(st.integers(0, n - 1)))]
        while len(sets) < depth:
            sets.append(sets[-1] & draw(st.frozensets(st.integers(0, n - 1))))
        essential.append(sets)
    return TokenOracle(n, rankings, essential, lost=draw(st.integers(0, 2)))


@st.composite
def needs(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    n, depth, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.lists(st.integers(0, n), min_size=depth, max_size=depth)
    falling = row.map(lambda values: sorted(values, reverse=True))
    return n, draw(st.lists(falling, min_size=size, max_size=size))


def feasible(oracle: NeedOracle, first_layer: int, max_drop: float) -> list[tuple[int, ...]]:
    floor = oracle.full_score - max_drop - 1e-9
    candidates = all_counts(oracle.num_vision_tokens, oracle.num_layers, first_layer)
    return [counts for counts in candidates if oracle.score(counts) >= floor]


def found(oracle: NeedOracle, **arguments: Any) -> tuple[int, ...]:
    result = gsearch(oracle, **arguments)
    assert result.score == oracle.score(result.schedule.counts(oracle.num_vision_tokens))
    return result.schedule.counts(oracle.num_vision_tokens)


@many
@given(token_oracles(), st.data())
def test_finds_the_optimum_under_the_papers_assumption(oracle: TokenOracle, data: st.DataObject) -> None:
    first_layer = data.draw(st.integers(0, oracle.num_layers - 1))
    depth = oracle.num_layers
    layer_costs = data.draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth))
    everything = feasible(oracle, first_layer, 0.0)

    def cost(counts: tuple[int, ...]) -> int:
        return sum(price * count for price, count in zip(layer_costs, counts, strict=True))

    best = min(cost(counts) for counts in everything)
    optimum = [counts for counts in everything if cost(counts) == best]
    assert [found(oracle, max_drop=0.0, first_layer=first_layer)] == optimum


@many
@given(needs(), st.integers(0, 3), st.data())
def test_finds_the_optimum_with_a_drop_when_examples_share_an_order(
    problem: tuple[int, list[list[int]]], given_up: int, data: st.DataObject
) -> None:
    n, rows = problem
    # sorted layer by layer: now the row that needs the k-th least does so at every layer
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    ordered = data.draw(st.permutations(list(zip(*columns, strict=True))))
    oracle = NeedOracle(n, ordered)
    first_layer = data.draw(st.integers(0, oracle.num_layers - 1))
    max_drop = given_up / len(rows)
    everything = feasible(oracle, first_layer, max_drop)
    counts = found(oracle, max_drop=max_drop, first_layer=first_layer)
    assert counts in everything
    # no schedule within the tolerance has fewer at any layer: the optimum for every cost that rises with them
    assert counts == tuple(map(min, zip(*everything, strict=True)))


@many
@given(needs(), st.integers(0, 3))
def test_is_the_least_in_reading_order_for_any_monotone_score(
    problem: tuple[int, list[list[int]]], given_up: int
) -> None:
    n, rows = problem
    oracle = NeedOracle(n, rows)
    max_drop = given_up / len(rows)
    assert found(oracle, max_drop=max_drop, first_layer=0) == min(feasible(oracle, 0, max_drop))


def test_without_a_common_order_a_drop_may_be_spent_better() -> None:
    oracle = NeedOracle(4, [[4, 0], [3, 3]])
    counts = found(oracle, max_drop=0.5, first_layer=0)
    assert counts == (3, 3)  # gives up the first example, which needs the most here
    assert min(map(sum, feasible(oracle, 0, 0.5))) == sum((4, 0))


@many
@given(needs(), st.integers(0, 2))
def test_early_stopping_changes_only_the_cost(problem: tuple[int, list[list[int]]], given_up: int) -> None:
    n, rows = problem
    max_drop = given_up / len(rows)
    plain = gsearch(NeedOracle(n, rows, lost=1), max_drop, first_layer=0)
    stopping = gsearch(StoppingOracle(n, rows, lost=1), max_drop, first_layer=0)
    assert stopping.schedule == plain.schedule
    assert stopping.score == plain.score
    assert [trial.accepted for trial in stopping.trials] == [trial.accepted for trial in plain.trials]
    assert all(trial.complete for trial in stopping.trials if trial.accepted)


def test_no_candidate_is_run_twice_and_bisection_is_logarithmic() -> None:
    oracle = NeedOracle(16, needs_of_five)
    result = gsearch(oracle, 0.0, first_layer=0)
    assert result.schedule.counts(16) == (16, 12, 9, 7, 4, 2)
    assert len(set(oracle.calls)) == len(oracle.calls) == result.evaluations
    # at most ceil(log2(count above + 1)) evaluations for each layer
    assert result.evaluations <= 5 + 5 + 4 + 4 + 3 + 3


def test_ends_once_a_layer_needs_no_token() -> None:
    oracle = NeedOracle(8, [[8, 3, 0, 0, 0, 0]])
    result = gsearch(oracle, 0.0, first_layer=1)
    assert result.schedule.counts(8) == (8, 3, 0, 0, 0, 0)
    assert {trial.layer for trial in result.trials} == {1, 2}


def test_first_layer_keeps_the_layers_above_full() -> None:
    oracle = NeedOracle(8, [[1, 1, 1, 1]])
    assert found(oracle, max_drop=0.0) == (8, 8, 1, 1)
    assert found(oracle, max_drop=0.0, first_layer=3) == (8, 8, 8, 1)


def test_the_first_layer_is_no_earlier_than_one_at_which_the_ranker_can_rank() -> None:
    oracle = NeedOracle(8, [[1, 1, 1, 1]])
    oracle.first_layer = 3
    assert found(oracle, max_drop=0.0) == (8, 8, 8, 1)
    assert found(oracle, max_drop=0.0, first_layer=2) == (8, 8, 1, 1)


def test_everything_may_go_when_the_tolerance_allows() -> None:
    assert found(NeedOracle(8, [[8, 8, 8, 8]]), max_drop=1.0) == (8, 8, 0, 0)


def test_nothing_goes_when_all_is_needed() -> None:
    result = gsearch(NeedOracle(8, [[8, 8, 8, 8]]), 0.0)
    assert result.schedule.is_full
    assert result.score == result.full_score == 1.0
    assert result.drop == 0.0


def test_a_score_that_is_not_monotone_still_ends_within_the_tolerance() -> None:
    class Jagged(NeedOracle):
        def score(self, counts: Any) -> float:
            return 1.0 if sum(counts) % 3 == 0 else 0.4

    oracle = Jagged(9, [[0] * 5])
    result = gsearch(oracle, 0.1, first_layer=0)
    assert result.score == 1.0
    assert sum(result.schedule.counts(9)) % 3 == 0


@pytest.mark.parametrize("solver", ["bisect", "bayes"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_resumed_equals_straight(tmp_path: Path, solver: str, every: int) -> None:
    options: dict[str, Any] = {"max_drop": 0.2, "first_layer": 1, "solver": solver, "seed": 3}
    options |= {"n_trials": 4} if solver == "bayes" else {}
    straight = gsearch(NeedOracle(16, needs_of_five), **options)
    oracle = InterruptedOracle(NeedOracle(16, needs_of_five), every)
    interruptions = 0
    while True:
        try:
            resumed = gsearch(oracle, study=tmp_path / "study.jsonl", resume=True, **options)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert len((tmp_path / "study.jsonl").read_text().splitlines()) == 1 + every * interruptions
    assert interruptions == (straight.evaluations - 1) // every
    assert resumed == straight
    assert resumed.trials == straight.trials
    assert len(oracle.inner.calls) == straight.evaluations


def test_a_finished_study_is_read_without_any_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "study.jsonl"
    first = gsearch(StoppingOracle(16, needs_of_five), 0.2, study=path)
    again = StoppingOracle(16, needs_of_five)
    assert gsearch(again, 0.2, study=path, resume=True) == first
    assert again.calls == []


def test_trials_tell_what_was_tried() -> None:
    result = gsearch(NeedOracle(16, needs_of_five), 0.0)
    for trial in result.trials:
        assert trial.schedule.counts(16)[trial.layer :] == (trial.count,) * (6 - trial.layer)
        assert trial.keep_rate == trial.count / 16
        assert trial.accepted == (trial.score == 1.0)
    assert result.cost == pytest.approx(sum(trial.schedule.mean_keep_rate for trial in result.trials))
    last = [trial for trial in result.trials if trial.accepted][-1]
    assert last.schedule == result.schedule


def test_cost_is_unknown_when_the_evaluator_does_not_tell() -> None:
    class Silent(NeedOracle):
        def __call__(self, schedule: Schedule) -> Evaluation:
            return Evaluation(score=super().__call__(schedule).score)

    assert gsearch(Silent(4, [[4, 4, 1]]), 0.0).cost is None


def test_the_reduction_says_how_it_was_found() -> None:
    class Bound(NeedOracle):
        fingerprint = "abc"

        def reduction(self, schedule: Schedule) -> Reduction:
            return Reduction(schedule, {"name": "random", "seed": 1}, model_type="llava")

    result = gsearch(Bound(16, needs_of_five), 0.2, seed=7)
    assert result.reduction.schedule == result.schedule
    assert result.reduction.ranker == {"name": "random", "seed": 1}
    assert result.reduction.model_type == "llava"
    assert result.reduction.search == {
        "method": "gsearch",
        "max_drop": 0.2,
        "first_layer": 2,
        "solver": {"name": "bisect", "step": 1},
        "seed": 7,
        "evaluations": result.evaluations,
        "num_vision_tokens": 16,
        "full_score": 1.0,
        "score": 0.8,
        "calibration": "abc",
    }
    assert gsearch(NeedOracle(4, [[4, 1, 1]]), 0.0).reduction.ranker == {"name": "text-attention"}


def unforeseen(examples: int = 400) -> list[list[int]]:
    """Examples whose needs nothing foretells; most need little."""
    drawn = np.random.default_rng(0).geometric(0.25, size=(examples, 4)).clip(0, 32)
    return np.sort(drawn, axis=1)[:, ::-1].tolist()


def test_a_confidence_runs_fewer_examples_to_a_schedule_within_the_tolerance() -> None:
    certain, confident = DrawingOracle(32, unforeseen(2000)), DrawingOracle(32, unforeseen(2000))
    exact = gsearch(certain, 0.1, first_layer=0, step=4)
    early = gsearch(confident, 0.1, first_layer=0, step=4, confidence=0.99)
    assert early.schedule == exact.schedule
    assert early.score == exact.score >= 0.9 - 1e-9
    assert [trial.accepted for trial in early.trials] == [trial.accepted for trial in exact.trials]

    def run_in_vain(result: SearchResult) -> float:
        return sum(trial.cost or 0.0 for trial in result.trials if not trial.accepted)

    assert run_in_vain(early) < 0.6 * run_in_vain(exact)
    assert confident.run < certain.run


def test_a_wrong_drop_costs_tokens_and_never_score() -> None:
    """At a confidence of a half, candidates within the tolerance are dropped now and then."""
    exact = gsearch(NeedOracle(32, unforeseen()), 0.05, first_layer=0).schedule.mean_keep_rate
    rates = []
    for seed in range(20):
        result = gsearch(DrawingOracle(32, unforeseen()), 0.05, first_layer=0, confidence=0.5, seed=seed)
        counts = result.schedule.counts(32)
        assert result.score == pytest.approx(NeedOracle(32, unforeseen()).score(counts))
        assert result.score >= 0.95 - 1e-9
        rates.append(result.schedule.mean_keep_rate)
    assert max(rates) > exact


def test_without_a_confidence_the_evaluator_is_asked_as_ever(tmp_path: Path) -> None:
    class Strict(StoppingOracle):
        def at_least(self, schedule: Schedule, floor: float, **more: Any) -> Evaluation:
            assert not more
            return super().at_least(schedule, floor)

    result = gsearch(Strict(16, needs_of_five), 0.2, study=tmp_path / "s")
    assert "confidence" not in (tmp_path / "s").read_text()
    assert result.reduction.search is not None
    assert "confidence" not in result.reduction.search


def test_an_evaluator_that_knows_no_confidence_goes_on_being_certain() -> None:
    plain = gsearch(StoppingOracle(16, needs_of_five), 0.2)
    confident = gsearch(StoppingOracle(16, needs_of_five), 0.2, confidence=0.9)
    assert confident.trials == plain.trials
    assert confident.reduction.search == {**(plain.reduction.search or {}), "confidence": 0.9}


def test_a_confident_search_resumes_to_the_same_result(tmp_path: Path) -> None:
    class Stops(DrawingOracle):
        left = 5

        def at_least(self, *arguments: Any, **more: Any) -> Evaluation:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().at_least(*arguments, **more)

    options: dict[str, Any] = {"max_drop": 0.05, "first_layer": 0, "confidence": 0.9, "seed": 2}
    straight = gsearch(DrawingOracle(32, unforeseen()), **options)
    with pytest.raises(KeyboardInterrupt):
        gsearch(Stops(32, unforeseen()), study=tmp_path / "s", **options)
    with pytest.raises(ThinsightError, match=r"made with confidence 0.9, this search has None"):
        gsearch(DrawingOracle(32, unforeseen()), study=tmp_path / "s", resume=True, **{**options, "confidence": None})
    again = DrawingOracle(32, unforeseen())
    assert gsearch(again, study=tmp_path / "s", resume=True, **options).trials == straight.trials
    assert len(again.calls) == straight.evaluations - 5


class Recorder(Silent):
    def __init__(self) -> None:
        self.plans: list[SearchPlan] = []
        self.trials: list[Trial] = []
        self.progress: list[Progress] = []
        self.layers: list[tuple[int, int]] = []
        self.results: list[SearchResult] = []

    def on_start(self, plan: SearchPlan) -> None:
        self.plans.append(plan)

    def on_trial(self, trial: Trial, progress: Progress) -> None:
        self.trials.append(trial)
        self.progress.append(progress)

    def on_layer(self, layer: int, count: int, progress: Progress) -> None:
        self.layers.append((layer, count))
        self.progress.append(progress)

    def on_end(self, result: SearchResult) -> None:
        self.results.append(result)


@pytest.mark.parametrize("options", [{}, {"step": 3}, {"solver": "bayes", "n_trials": 3}])
def test_the_observer_sees_everything_and_its_estimate_only_falls(options: dict[str, Any]) -> None:
    recorder = Recorder()
    result = gsearch(NeedOracle(16, needs_of_five), 0.0, observer=recorder, **options)
    assert tuple(recorder.trials) == result.trials
    assert recorder.results == [result]
    assert recorder.layers == list(enumerate(result.schedule.counts(16)))[2:]
    expected = [recorder.plans[0].expected] + [progress.expected for progress in recorder.progress]
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == result.evaluations
    assert all(progress.evaluations <= progress.expected for progress in recorder.progress)
    assert recorder.progress[-1].seconds_left == 0.0


def test_the_plan_counts_what_the_journal_holds(tmp_path: Path) -> None:
    first = gsearch(NeedOracle(16, needs_of_five), 0.0, study=tmp_path / "s")
    recorder = Recorder()
    gsearch(NeedOracle(16, needs_of_five), 0.0, study=tmp_path / "s", resume=True, observer=recorder)
    assert recorder.plans[0].recorded == first.evaluations


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"max_drop": "1%"}, "max_drop is '1%'"),
        ({"max_drop": True}, "max_drop is True"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"first_layer": 6}, "first_layer is 6; it must be a whole number from 0 to 5"),
        ({"first_layer": 1.5}, "first_layer is 1.5"),
        ({"solver": "newton"}, "solver is 'newton'; choose 'bisect' or 'bayes'"),
        ({"solver": 3}, "solver is 3"),
        ({"step": 0}, "step is 0"),
        ({"solver": "bayes", "n_trials": 0}, "n_trials is 0"),
        ({"solver": "bayes", "trade_off": -1}, "trade_off is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 99}, "confidence is 99"),
        ({"confidence": 0.99, "solver": "bayes"}, "confidence is 0.99, but solver 'bayes'"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: dict[str, Any], named: str) -> None:
    class Expensive(NeedOracle):
        def __getattribute__(self, name: str) -> Any:
            assert name != "full_score", "the full model was run before the arguments were checked"
            return super().__getattribute__(name)

    oracle = Expensive(16, needs_of_five)
    with pytest.raises(ThinsightError) as caught:
        gsearch(oracle, **arguments)
    assert named in str(caught.value)
    assert oracle.calls == []


def test_what_is_no_evaluator_is_refused() -> None:
    with pytest.raises(ThinsightError, match="evaluator has no num_layers"):
        gsearch(object())  # type: ignore[arg-type]
    oracle = NeedOracle(4, [[4, 4, 4]])
    oracle.at_once = 0  # type: ignore[attr-defined]
    with pytest.raises(ThinsightError, match=r"evaluator\.at_once is 0"):
        gsearch(oracle)
    oracle = NeedOracle(4, [[4, 4, 4]])
    oracle.full_score = float("nan")
    with pytest.raises(ThinsightError, match=r"full_score is nan"):
        gsearch(oracle)


def test_a_solver_may_not_choose_what_was_not_accepted() -> None:
    class Wild:
        settings = {"name": "wild"}  # noqa: RUF012
        exact = False

        def most_evaluations(self, upper: int) -> int:
            return 0

        def solve(self, problem: Any) -> int:
            return 0

    with pytest.raises(ThinsightError, match="count 0 at layer 2, which no probe accepted"):
        gsearch(NeedOracle(4, [[4, 4, 4]]), 0.0, solver=Wild())
