"""The journal: what it refuses, and what a crash leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from damage import changes, failing_writes, full_disk, refused_or_same
from oracles import NeedOracle, SeveralOracle, SmoothOracle, StoppingOracle

from thinsight.budget import KeepBudget
from thinsight.errors import BadInput, StorageError, ThinsightError
from thinsight.evaluation.result import Evaluation
from thinsight.experimental.adaptive import adaptive_search
from thinsight.records import seal, unseal
from thinsight.schedule import Schedule
from thinsight.searches import Study, frontier, gsearch, psigmoid, random_search, sensitivity_search

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
    assert not (tmp_path / "s").exists()  # a journal of mended labels may take its place


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
        (0, "{}", "line 1 is not a search journal's; remove it and search again, or pass another path"),
        (0, "[]", "line 1 is not a search journal's"),
        (0, '{"thinsight_study": 1}', "is a journal of version 1, and this thinsight reads 2; remove it and"),
        (0, '{"thinsight_study": 2}', "line 1 is damaged .it has no checksum"),
        (0, json.dumps(seal({"thinsight_study": 2})), "no settings in its header"),
        (1, "nonsense", "line 2 is damaged .Expecting value.*; remove the line, then resume"),
        (1, "[" * 100_000, "line 2 is damaged .it is nested too deep"),
        (1, "[" * 70 + "]" * 70, "line 2 is damaged .it is nested more than 64 deep"),
        (1, "[]", "line 2 is damaged .it is not a JSON object"),
        (1, "{}", "line 2 is damaged .it has no checksum"),
        (1, f'{{"score": 1{"0" * 5000}}}', "line 2 is damaged .a whole number of 5001 digits"),
        (1, '{"score": Infinity}', "line 2 is damaged .Infinity is not a JSON number"),
        (1, '{"score": 1e400}', "line 2 is damaged .1e400 is too large a number"),
    ],
)
def test_damage_is_named(journal: Path, number: int, line: str, named: str) -> None:
    lines = journal.read_text().splitlines()
    lines[number] = line
    journal.write_text("\n".join(lines) + "\n")
    oracle = NeedOracle(8, NEEDS)
    with pytest.raises(StorageError, match=named):
        gsearch(oracle, 0.0, study=journal, resume=True)
    assert oracle.calls == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep_rates": [2.0]}, r"keep_rates\[0\] is 2"),
        ({"keep_rates": [1.0, "0.5"]}, r"\.keep_rates\[1\]: expected a finite number, got '0.5'"),
        ({"keep_rates": []}, "keep_rates is empty"),
        ({"score": None}, r"\.score: expected a finite number, got None"),
        ({"complete": "false"}, r"\.complete: expected true or false, got 'false'"),
        ({"exact": 1}, r"\.exact: expected true or false"),
        ({"cost": "1"}, r"\.cost: expected a finite number"),
        ({"more": 1}, "unknown key 'more'"),
        ({"ranker": "random"}, r"\.ranker: expected an object"),
        ({"adaptive": {}}, "adaptive is {}"),
    ],
)
def test_a_line_that_was_written_anew_is_read_strictly(journal: Path, change: dict[str, Any], named: str) -> None:
    """With a checksum that fits."""
    lines = journal.read_text().splitlines()
    lines[2] = json.dumps(seal({**unseal(json.loads(lines[2])), **change}))
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(StorageError, match=rf"line 3.*{named}.*; remove the line, then resume"):
        gsearch(NeedOracle(8, NEEDS), 0.0, study=journal, resume=True)


@pytest.mark.parametrize("score", [1.45, 5, -0.1])
def test_a_score_out_of_the_metrics_range_is_damage(journal: Path, score: float) -> None:
    class Ranged(NeedOracle):
        score_range = (0.0, 1.0)

    straight = gsearch(Ranged(8, NEEDS), 0.0)
    assert gsearch(Ranged(8, NEEDS), 0.0, study=journal, resume=True) == straight
    lines = journal.read_text().splitlines()
    lines[2] = json.dumps(seal({**unseal(json.loads(lines[2])), "score": score}))
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(StorageError, match=rf"line 3 is damaged \(score is {score}.*not from 0 to 1"):
        gsearch(Ranged(8, NEEDS), 0.0, study=journal, resume=True)


@pytest.mark.parametrize("number", [0, 1, 2, -1])
def test_one_changed_byte_is_told_or_changes_nothing(journal: Path, number: int) -> None:
    """Of 774 changes of one digit, 276 gave another schedule before lines had checksums."""
    straight = gsearch(NeedOracle(8, NEEDS), 0.0)
    whole = journal.read_bytes()
    line = whole.splitlines(keepends=True)[number]
    start = whole.index(line)

    def resumed() -> Any:
        return gsearch(NeedOracle(8, NEEDS), 0.0, study=journal, resume=True)

    for changed in changes(line, 150, seed=number):
        journal.write_bytes(whole[:start] + changed + whole[start + len(line) :])
        refused_or_same(resumed, straight, journal)


def test_a_torn_journal_is_told_or_changes_nothing(journal: Path) -> None:
    straight = gsearch(NeedOracle(8, NEEDS), 0.0)
    whole = journal.read_bytes()
    for cut in range(0, len(whole), 61):
        journal.write_bytes(whole[:cut])
        assert gsearch(NeedOracle(8, NEEDS), 0.0, study=journal, resume=True) == straight


@pytest.mark.parametrize("content", [b"weights", b"\x00" * 64, b'{"thinsight": 1}', b"# notes\n", b"\n"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: bytes, resume: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ThinsightError, match="exists already" if not resume else "not a search journal"):
        gsearch(NeedOracle(8, NEEDS), 0.0, study=path, resume=resume)
    assert path.read_bytes() == content


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_journal_that_cannot_be_written_goes_on_where_it_stopped(tmp_path: Path, error: BaseException) -> None:
    straight = gsearch(NeedOracle(8, NEEDS), 0.0)
    for call in itertools.count():
        path = tmp_path / str(call) / "study.jsonl"
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            gsearch(NeedOracle(8, NEEDS), 0.0, study=path)
        assert [each.name for each in path.parent.glob("*")] in ([], ["study.jsonl"])
        if path.exists():
            assert all(unseal(json.loads(line)) for line in path.read_text().splitlines())
            assert path.read_bytes().endswith(b"\n")
        assert gsearch(NeedOracle(8, NEEDS), 0.0, study=path, resume=True) == straight
        if not failed:
            break
    assert call > 10


def test_a_failure_in_the_middle_of_a_line_leaves_no_half_of_it(tmp_path: Path) -> None:
    """The next line would continue it."""
    study = Study(NeedOracle(8, NEEDS), {}, tmp_path / "s")
    with failing_writes(1, full_disk()), pytest.raises(StorageError, match=r"No space left.*then resume"):
        study.evaluate(Schedule.step(5, 2, 0.5))
    study.evaluate(Schedule.step(5, 2, 0.25))
    again = Study(NeedOracle(8, NEEDS), {}, tmp_path / "s", resume=True)
    assert again.recorded == 1


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
    monkeypatch.setattr("thinsight.searches.study.time.perf_counter", lambda: next(clock))
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
