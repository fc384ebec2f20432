"""The journal: what it refuses, and what a crash leaves behind."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
from oracles import NeedOracle, SeveralOracle, SmoothOracle, StoppingOracle

from thinsight.budget import KeepBudget
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation.result import Evaluation
from thinsight.schedule import Schedule
from thinsight.search import (
    Study,
    adaptive_search,
    frontier,
    gsearch,
    psigmoid,
    random_search,
    sensitivity_search,
)

NEEDS = [[8, 8, 5, 3, 0], [8, 7, 7, 2, 1]]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "study.jsonl"
    gsearch(NeedOracle(8, NEEDS), 0.0, study=path)
    return path


def test_an_existing_journal_is_not_overwritten(journal: Path) -> None:
    before = journal.read_bytes()
    with pytest.raises(ThinsightError, match="exists already"):
        gsearch(NeedOracle(8, NEEDS), 0.0, study=journal)
    assert journal.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_drop": 0.5}, "max_drop 0.0, this search has 0.5"),
        ({"first_layer": 1}, "first_layer 2, this search has 1"),
        ({"step": 2}, "solver"),
        ({"solver": "bayes"}, "solver"),
        ({"seed": 1}, "seed 0, this search has 1"),
    ],
)
def test_other_settings_are_refused(journal: Path, options: dict[str, object], named: str) -> None:
    arguments = {"max_drop": 0.0, "study": journal, "resume": True, **options}
    with pytest.raises(ThinsightError, match=named):
        gsearch(NeedOracle(8, NEEDS), **arguments)  # type: ignore[arg-type]


def test_another_evaluator_is_refused(journal: Path) -> None:
    with pytest.raises(ThinsightError, match="num_vision_tokens 8, this search has 9"):
        gsearch(NeedOracle(9, NEEDS), 0.0, study=journal, resume=True)
    with pytest.raises(ThinsightError, match=r"full_score 1\.0"):
        gsearch(NeedOracle(8, NEEDS, lost=1), 0.0, study=journal, resume=True)
    other = NeedOracle(8, NEEDS)
    other.fingerprint = "another"  # type: ignore[attr-defined]
    with pytest.raises(ThinsightError, match="fingerprint None, this search has 'another'"):
        gsearch(other, 0.0, study=journal, resume=True)


class PoorOracle(SmoothOracle):
    """A full model that scores as little as it is told to."""

    def __init__(self, full_score: float, doubt: str = "") -> None:
        super().__init__(8, 4, [4.0] * 8, [1.0] * 16)
        self.full_score, self.doubt = full_score, doubt

    def statistics(self, reduction: object) -> object:
        raise AssertionError("a schedule was run")


def everything(evaluator: PoorOracle, **options: object) -> dict[str, object]:
    """Every search there is, ready to be begun."""
    budget = KeepBudget(4, 8, 0.5)
    under = (adaptive_search, psigmoid, random_search, sensitivity_search)
    searches = {each.__name__: partial(each, evaluator, budget, n_trials=16, **options) for each in under}
    searches["gsearch"] = partial(gsearch, evaluator, 0.1, **options)
    searches["frontier"] = partial(frontier, evaluator, [budget], **options)
    return searches


@pytest.mark.parametrize("name", everything(PoorOracle(0.0)))
def test_no_search_begins_on_a_full_model_that_scores_nothing(name: str, tmp_path: Path) -> None:
    told = PoorOracle(0.0, "it says 'red', the label is 'zzz'")
    for oracle, words in ((PoorOracle(0.0), "full_score is 0"), (told, "the label is 'zzz'")):
        with pytest.raises(BadInput, match=words):
            everything(oracle, study=tmp_path / "s")[name]()  # type: ignore[operator]
        assert oracle.calls == []
    assert (tmp_path / "s").read_bytes() == b""  # a journal of mended labels may take its place


def test_a_search_warns_of_what_its_evaluator_doubts() -> None:
    with pytest.warns(UserWarning, match="hardly any loss can show"):
        gsearch(PoorOracle(0.02, "hardly any loss can show"), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gsearch(PoorOracle(0.02), 0.0)
        gsearch(PoorOracle(-3.0), 0.0)  # an oracle's own unit may be below 0


def test_a_line_cut_off_anywhere_is_run_again(journal: Path) -> None:
    whole = journal.read_bytes()
    straight = gsearch(NeedOracle(8, NEEDS), 0.0)
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        journal.write_bytes(whole[:cut])
        oracle = NeedOracle(8, NEEDS)
        assert gsearch(oracle, 0.0, study=journal, resume=True) == straight
        assert len(oracle.calls) == 1
        assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_journal_cut_off_in_its_header_starts_anew(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:20])
    straight = gsearch(NeedOracle(8, NEEDS), 0.0)
    assert gsearch(NeedOracle(8, NEEDS), 0.0, study=journal, resume=True) == straight


@pytest.mark.parametrize(
    ("number", "line", "named"),
    [
        (0, "{}", "not a search journal"),
        (0, "[]", "line 1 is not a JSON object"),
        (0, '{"thinsight_study": 1}', "no settings in its header"),
        (1, "nonsense", "line 2 is not a JSON object"),
        (1, "{}", "line 2 is damaged"),
        (
            1,
            '{"keep_rates": [2], "exact": true, "score": 1, "complete": true, "cost": null, "seconds": 0}',
            "damaged",
        ),
    ],
)
def test_damage_is_named(journal: Path, number: int, line: str, named: str) -> None:
    lines = journal.read_text().splitlines()
    lines[number] = line
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ThinsightError, match=named):
        gsearch(NeedOracle(8, NEEDS), 0.0, study=journal, resume=True)


def test_a_path_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "study.jsonl"):
        oracle = NeedOracle(8, NEEDS)
        with pytest.raises(ThinsightError, match=r"cannot be (read|written)"):
            gsearch(oracle, 0.0, study=path)
        assert oracle.calls == []


def test_every_evaluation_is_flushed_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.fsync

    def counting(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    result = gsearch(NeedOracle(8, NEEDS), 0.0, study=tmp_path / "s")
    assert len(sizes) == 1 + result.evaluations
    assert sizes == sorted(set(sizes))


def test_a_bound_does_not_pass_for_a_score(tmp_path: Path) -> None:
    oracle = StoppingOracle(8, NEEDS)
    schedule = Schedule.step(5, 2, 0.0)
    for resume in (False, True):
        study = Study(oracle, {}, tmp_path / "s", resume=resume)
        assert not study.evaluate(schedule, floor=0.9).complete
        exact = study.evaluate(schedule)
        assert exact.complete
        assert exact.score == 0.0
    assert len(oracle.calls) == 2


def test_several_are_run_once_each_and_come_in_their_order() -> None:
    counts = [3, 8, 0, 3, 5]
    schedules = [Schedule.step(5, 2, count / 8) for count in counts]
    for oracle in (NeedOracle(8, NEEDS), SeveralOracle(NeedOracle(8, NEEDS), 5)):
        study = Study(oracle, {})  # type: ignore[arg-type]
        study.evaluate(schedules[1])
        records = study.evaluate_all(schedules)
        assert [record.score for record in records] == [0.0, 1.0, 0.0, 0.0, 0.5]
        assert len(oracle.calls) == 4
        assert study.evaluate_all(schedules) == records
        assert len(oracle.calls) == 4


def test_several_take_no_longer_than_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("thinsight.search.study.time.perf_counter", lambda: next(clock))
    study = Study(SeveralOracle(NeedOracle(8, NEEDS), 2), {})  # type: ignore[arg-type]
    records = study.evaluate_all([Schedule.step(5, 2, 0.5), Schedule.step(5, 2, 0.25)])
    assert [record.seconds for record in records] == [3.0, 2.0]  # the second one finished first


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_what_finished_beside_a_failure_is_on_disk(tmp_path: Path, failure: type[BaseException]) -> None:
    class Failing(NeedOracle):
        def __call__(self, schedule: Schedule) -> Evaluation:
            if schedule == schedules[1]:
                raise failure
            return super().__call__(schedule)

    schedules = [Schedule.step(5, 2, count / 8) for count in (2, 4, 6)]
    study = Study(SeveralOracle(Failing(8, NEEDS), 3), {}, tmp_path / "s")  # type: ignore[arg-type]
    with pytest.raises(failure):
        study.evaluate_all(schedules)
    again = SeveralOracle(NeedOracle(8, NEEDS), 3)
    study = Study(again, {}, tmp_path / "s", resume=True)  # type: ignore[arg-type]
    assert study.recorded == 2
    study.evaluate_all(schedules)
    assert again.calls == [schedules[1]]
