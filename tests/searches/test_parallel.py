"""G-Search with an evaluator that scores several schedules at the same time: the same schedule, sooner."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DrawingOracle, InterruptedOracle, NeedOracle, SeveralOracle, StoppingOracle, all_counts

from thinsight.searches import Bisect, Progress, SearchPlan, Silent, Trial, gsearch

AT_ONCE = (2, 3, 7)
NEEDS = [[11, 9, 9, 6, 2, 0], [12, 12, 5, 4, 4, 1], [7, 7, 7, 7, 1, 1], [16, 3, 3, 0, 0, 0], [9, 9, 9, 2, 2, 2]]
many = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def needs(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    n, depth, size = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    row = st.lists(st.integers(0, n), min_size=depth, max_size=depth)
    return n, draw(st.lists(row, min_size=size, max_size=size))


@many
@given(needs(), st.sampled_from(AT_ONCE), st.integers(0, 2), st.integers(1, 3))
def test_the_schedule_is_the_one_of_a_single_device(
    problem: tuple[int, list[list[int]]], at_once: int, given_up: int, step: int
) -> None:
    n, rows = problem
    options: dict[str, Any] = {"max_drop": given_up / len(rows), "first_layer": 0, "step": step}
    single = gsearch(NeedOracle(n, rows), **options)
    for inner in (NeedOracle(n, rows), StoppingOracle(n, rows)):
        found = gsearch(SeveralOracle(inner, at_once), **options)  # type: ignore[arg-type]
        assert found.schedule == single.schedule
        assert found.score == single.score
        assert len(set(inner.calls)) == len(inner.calls) == found.evaluations


@many
@given(needs(), st.sampled_from(AT_ONCE), st.integers(0, 2))
def test_it_is_the_least_in_reading_order(problem: tuple[int, list[list[int]]], at_once: int, given_up: int) -> None:
    n, rows = problem
    oracle = NeedOracle(n, rows)
    floor = 1 - given_up / len(rows) - 1e-9
    best = min(counts for counts in all_counts(n, oracle.num_layers, 0) if oracle.score(counts) >= floor)
    found = gsearch(
        SeveralOracle(oracle, at_once),  # type: ignore[arg-type]
        given_up / len(rows),
        first_layer=0,
    )
    assert found.schedule.counts(n) == best


@pytest.mark.parametrize(("at_once", "rounds"), [(1, 32), (2, 21), (3, 17), (7, 11)])
def test_rounds_are_logarithmic_and_each_is_asked_for_at_once(at_once: int, rounds: int) -> None:
    n = 576
    oracle = SeveralOracle(NeedOracle(n, [[n, n, 401, 200, 77, 3]]), at_once)
    result = gsearch(oracle, 0.0)  # type: ignore[arg-type]
    assert result.schedule.counts(n) == (n, n, 401, 200, 77, 3)
    uppers = (n, 401, 200, 77)
    assert len(oracle.rounds) <= sum(math.ceil(math.log(upper + 1, at_once + 1)) for upper in uppers)
    assert len(oracle.rounds) == rounds  # as docs/search.md says
    assert max(oracle.rounds) == at_once
    assert sum(oracle.rounds) == result.evaluations


def test_one_at_a_time_is_what_it_was() -> None:
    single = gsearch(NeedOracle(16, NEEDS), 0.2)
    oracle = SeveralOracle(NeedOracle(16, NEEDS), 1)
    assert gsearch(oracle, 0.2).trials == single.trials  # type: ignore[arg-type]
    assert set(oracle.rounds) == {1}
    assert [trial.count for trial in single.trials][:4] == [7, 11, 9, 8]


def test_every_evaluation_counts_as_cost() -> None:
    oracle = NeedOracle(16, NEEDS)
    result = gsearch(SeveralOracle(oracle, 3), 0.0)  # type: ignore[arg-type]
    assert result.cost == pytest.approx(sum(schedule.mean_keep_rate for schedule in oracle.calls))
    assert result.evaluations == len(oracle.calls) > gsearch(NeedOracle(16, NEEDS), 0.0).evaluations
    assert result.reduction.search is not None
    assert result.reduction.search["at_once"] == 3


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_a_score_that_is_not_monotone_still_ends_within_the_tolerance(at_once: int) -> None:
    class Jagged(NeedOracle):
        def score(self, counts: Any) -> float:
            return 1.0 if sum(counts) % 3 == 0 else 0.4

    result = gsearch(SeveralOracle(Jagged(9, [[0] * 5]), at_once), 0.1, first_layer=0)  # type: ignore[arg-type]
    assert result.score == 1.0
    assert sum(result.schedule.counts(9)) % 3 == 0


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("every", [1, 2, 5])
def test_resumed_equals_straight(tmp_path: Path, at_once: int, every: int) -> None:
    """Interrupted between two evaluations of one round, of which the later ones are finished."""
    options: dict[str, Any] = {"max_drop": 0.2, "first_layer": 1}
    straight = gsearch(SeveralOracle(NeedOracle(16, NEEDS), at_once), **options)  # type: ignore[arg-type]
    inner = NeedOracle(16, NEEDS)
    oracle = SeveralOracle(InterruptedOracle(inner, every), at_once)
    for _ in range(100):
        try:
            resumed = gsearch(oracle, study=tmp_path / "s", resume=True, **options)  # type: ignore[arg-type]
            break
        except KeyboardInterrupt:
            assert len((tmp_path / "s").read_text().splitlines()) == 1 + len(inner.calls)
    assert resumed == straight
    assert resumed.trials == straight.trials
    assert len(inner.calls) == len(set(inner.calls)) == straight.evaluations


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 7)])
def test_a_journal_goes_on_with_another_number_of_devices(tmp_path: Path, before: int, after: int) -> None:
    options: dict[str, Any] = {"max_drop": 0.2, "study": tmp_path / "s", "resume": True}
    stopped = SeveralOracle(InterruptedOracle(NeedOracle(16, NEEDS), 5), before)
    with pytest.raises(KeyboardInterrupt):
        gsearch(stopped, **options)  # type: ignore[arg-type]
    inner = NeedOracle(16, NEEDS)
    found = gsearch(SeveralOracle(inner, after), **options)  # type: ignore[arg-type]
    assert found.schedule == gsearch(NeedOracle(16, NEEDS), 0.2).schedule
    assert not set(stopped.calls) & set(inner.calls)


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_it_matters_not_which_of_a_round_were_written(tmp_path: Path, kept: tuple[int, ...]) -> None:
    path = tmp_path / "s"
    straight = gsearch(SeveralOracle(NeedOracle(16, NEEDS), 3), 0.2, study=path)  # type: ignore[arg-type]
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(lines[number] for number in kept)]) + "\n")
    oracle = SeveralOracle(NeedOracle(16, NEEDS), 3)
    assert gsearch(oracle, 0.2, study=path, resume=True).trials == straight.trials  # type: ignore[arg-type]
    assert oracle.rounds[0] == 3 - len(kept)
    assert len(oracle.calls) == straight.evaluations - len(kept)
    written = [json.loads(line)["keep_rates"] for line in path.read_text().splitlines()[1:]]
    assert len({tuple(rates) for rates in written}) == len(written) == straight.evaluations


def test_a_confidence_reaches_every_one_of_them() -> None:
    rows = [[need] * 4 for need in (30, 20, 9, 5, 5, 3, 2, 2, 1, 0) * 20]
    options: dict[str, Any] = {"max_drop": 0.2, "first_layer": 0, "confidence": 0.9, "seed": 4}
    oracle = SeveralOracle(DrawingOracle(32, rows), 3)
    found = gsearch(oracle, **options)  # type: ignore[arg-type]
    assert found.schedule == gsearch(DrawingOracle(32, rows), **options).schedule
    certain = SeveralOracle(DrawingOracle(32, rows), 3)
    gsearch(certain, **{**options, "confidence": None})  # type: ignore[arg-type]
    assert oracle.run < certain.run


def test_the_bayesian_solver_goes_on_asking_one_at_a_time() -> None:
    options: dict[str, Any] = {"max_drop": 0.2, "solver": "bayes", "n_trials": 3, "first_layer": 4}
    oracle = SeveralOracle(NeedOracle(16, NEEDS), 3)
    found = gsearch(oracle, **options)  # type: ignore[arg-type]
    assert set(oracle.rounds) == {1}
    assert found == gsearch(NeedOracle(16, NEEDS), **options)


def test_a_solver_of_ones_own_decides_for_itself() -> None:
    single = NeedOracle(16, NEEDS)
    by_three = gsearch(single, 0.2, solver=Bisect(at_once=3))
    assert by_three.trials == gsearch(SeveralOracle(NeedOracle(16, NEEDS), 3), 0.2).trials  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("step", [1, 3])
def test_the_observer_sees_everything_and_its_estimate_only_falls(at_once: int, step: int) -> None:
    class Recorder(Silent):
        trials: list[Trial]
        expected: list[int]

        def on_start(self, plan: SearchPlan) -> None:
            self.trials, self.expected = [], [plan.expected]

        def on_trial(self, trial: Trial, progress: Progress) -> None:
            self.trials.append(trial)
            self.expected.append(progress.expected)
            assert progress.evaluations == len(self.trials) <= progress.expected

        def on_layer(self, layer: int, count: int, progress: Progress) -> None:
            self.expected.append(progress.expected)

    recorder = Recorder()
    oracle = SeveralOracle(NeedOracle(16, NEEDS), at_once)
    result = gsearch(oracle, 0.0, step=step, observer=recorder)  # type: ignore[arg-type]
    assert tuple(recorder.trials) == result.trials
    assert recorder.expected == sorted(recorder.expected, reverse=True)
    assert recorder.expected[-1] == result.evaluations
