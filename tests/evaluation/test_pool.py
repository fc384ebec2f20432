"""Several evaluators as one: the same scores, at the same time, and nothing lost where one fails."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluation, Evaluator, EvaluatorPool, Example
from thinsight.schedule import Schedule
from thinsight.searches import Bisect, SearchEvaluator, gsearch

QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")
SCHEDULES = [Schedule.step(4, 2, count / 16) for count in (2, 6, 10, 14)]
SECONDS = 20  # of patience with a thread


def examples(count: int = 12) -> list[Example]:
    images = tiny_images(3)
    return [Example(f"e{i}", (images[i % 3],), QUESTIONS[i % 4]) for i in range(count)]


def evaluator(seed: int = 0, **settings: Any) -> Evaluator:
    settings = {"batch_size": 2, "max_new_tokens": 3, **settings}
    return Evaluator(tiny_llava(seed=seed), tiny_processor(), settings.pop("of", examples()), **settings)


@pytest.fixture(scope="module")
def single() -> Evaluator:
    return evaluator()


def collected(pool: EvaluatorPool, schedules: list[Schedule], floor: float | None = None) -> dict[int, Any]:
    found: dict[int, Evaluation] = {}
    pool.several(schedules, floor, found.__setitem__)
    return found


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("thinsight")]


# -- real evaluators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_drop", "step"), [(0.5, 1), (0.5, 4), (0.2, 1)])
def test_a_search_finds_what_a_single_evaluator_finds(
    single: Evaluator, max_drop: float, step: int, tmp_path: Path
) -> None:
    found = gsearch(EvaluatorPool([evaluator(), evaluator()]), max_drop, step=step, study=tmp_path / "s")
    alone = gsearch(single, max_drop, step=step)
    assert found.schedule == alone.schedule
    assert not found.schedule.is_full
    assert (found.score, found.full_score) == (alone.score, alone.full_score)
    assert found.reduction.ranker == alone.reduction.ranker
    assert found.reduction.search is not None
    assert found.reduction.search["calibration"] == single.fingerprint
    for trial in found.trials:
        exact = single(trial.schedule)
        assert trial.score == exact.score if trial.complete else trial.score >= exact.score
    assert found.full_forwards == pytest.approx((found.cost or 0) / single.full_cost)
    resumed = gsearch(evaluator(), max_drop, step=step, study=tmp_path / "s", resume=True)  # one goes on alone
    assert resumed.schedule == found.schedule


@pytest.mark.parametrize("max_drop", [0.3, 0.4])
def test_where_the_score_is_not_monotone_it_is_as_one_device_that_tries_as_many(
    single: Evaluator, max_drop: float
) -> None:
    found = gsearch(EvaluatorPool([evaluator(), evaluator()]), max_drop)
    alone = gsearch(single, max_drop, solver=Bisect(at_once=2))
    assert [(trial.count, trial.accepted) for trial in found.trials] == [
        (trial.count, trial.accepted) for trial in alone.trials
    ]
    assert found.schedule == alone.schedule
    assert found.schedule != gsearch(single, max_drop).schedule  # a random model's score is not monotone
    assert single(found.schedule).score == found.score >= 1 - max_drop - 1e-9


def test_each_evaluator_takes_its_part_and_scores_are_the_same(single: Evaluator) -> None:
    members = [evaluator(), evaluator(), evaluator()]
    pool = EvaluatorPool(members)
    assert pool.at_once == 3
    found = collected(pool, SCHEDULES)  # three, then one
    assert sorted(found) == [0, 1, 2, 3]
    for place, schedule in enumerate(SCHEDULES):
        exact = single(schedule)
        assert (found[place].score, found[place].agreement) == (exact.score, exact.agreement)
        assert found[place].per_example.tolist() == exact.per_example.tolist()
    assert [len(each._memo) for each in members] == [2, 1, 1]
    assert threads() == []


def test_evaluations_stop_early_below_the_floor(single: Evaluator) -> None:
    pool = EvaluatorPool([evaluator(), evaluator()])
    exact = [single(schedule).score for schedule in SCHEDULES[:2]]
    assert max(exact) < 0.95
    found = collected(pool, SCHEDULES[:2], floor=1.0)
    assert not any(each.complete for each in found.values())
    assert all(exact[place] <= each.score < 1.0 for place, each in found.items())
    early: dict[int, Evaluation] = {}
    pool.several(SCHEDULES[:2], 1.0, early.__setitem__, confidence=0.9, seed=1)
    assert not any(each.complete for each in early.values())


def test_all_of_them_are_told_what_candidates_share() -> None:
    members = [evaluator(), evaluator()]
    EvaluatorPool(members).share(SCHEDULES[0], 2)
    assert [each._prefixes._announced for each in members if each._prefixes] == [(1.0, 1.0)] * 2


def test_whatever_else_is_asked_goes_to_the_first(single: Evaluator) -> None:
    pool = EvaluatorPool([evaluator(), evaluator()])
    assert pool(SCHEDULES[1]).score == single(SCHEDULES[1]).score
    assert pool.at_least(SCHEDULES[1], 0.0).complete
    assert pool.sample(SCHEDULES[1], 0.5).share == 0.5
    assert pool.fingerprint == single.fingerprint
    assert (pool.num_layers, pool.num_vision_tokens, pool.first_layer) == (4, 16, 1)
    assert pool.full_cost == single.full_cost
    assert pool.reduction(SCHEDULES[1]) == single.reduction(SCHEDULES[1])
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pool.no_such_thing
    with pytest.raises(AttributeError, match="_prefixes"):
        _ = pool._prefixes


def test_another_ranker_for_all_of_them(single: Evaluator) -> None:
    members = [evaluator(), evaluator()]
    pool = EvaluatorPool(members)
    other = pool.with_ranker("uniform")
    assert other.full_score == pool.full_score
    assert other.fingerprint != pool.fingerprint
    alone = evaluator(ranker="uniform")
    found = collected(other, SCHEDULES[:2])
    assert [found[place].score for place in (0, 1)] == [alone(each).score for each in SCHEDULES[:2]]
    assert pool.reduction(SCHEDULES[0]) == single.reduction(SCHEDULES[0])


def test_the_first_ones_batch_size_holds_for_all() -> None:
    members = [evaluator(), evaluator(batch_size=3)]
    pool = EvaluatorPool(members)
    assert pool.fix_batch_size() == 2
    assert [each.batch_size for each in members] == [2, 2]
    fixed = EvaluatorPool([evaluator(), evaluator(batch_size="auto")])
    assert fixed.fix_batch_size(4) == fixed.batch_size == 4


def test_copies_of_a_model_on_several_devices(single: Evaluator) -> None:
    said: list[str] = []
    model = tiny_llava()
    pool = EvaluatorPool.on_devices(
        ["cpu", "cpu"],
        model,
        tiny_processor(),
        examples(),
        batch_size=2,
        max_new_tokens=3,
        progress=lambda what, done, total: said.append(f"{what} {done}/{total}"),
    )
    assert pool.model is model
    found = gsearch(pool, 0.5, step=4)
    assert found.schedule == gsearch(single, 0.5, step=4).schedule
    assert said.count("full model 12/12") == 1  # the first one's only
    with pytest.raises(ThinsightError, match=r"devices is 'cuda'; give a list"):
        EvaluatorPool.on_devices("cuda", model, tiny_processor(), examples())
    model.hf_device_map = {"a": "cuda:0", "b": "cuda:1"}
    with pytest.raises(ThinsightError, match="spread over cuda:0, cuda:1"):
        EvaluatorPool.on_devices(["cpu"], model, tiny_processor(), examples())


def test_the_front_door_has_it() -> None:
    assert ts.EvaluatorPool is EvaluatorPool


# -- what cannot be a pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"seed": 1}, {"of": examples(11)}, {"ranker": "uniform"}, {"max_new_tokens": 4}])
def test_evaluators_that_differ_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ThinsightError) as caught:
        EvaluatorPool([evaluator(), evaluator(), evaluator(**settings)])
    assert "evaluators[2].fingerprint is '" in str(caught.value)
    assert "build all of them on the same weights, examples, metric and ranker" in str(caught.value)


def test_evaluators_that_share_what_serves_one_thread_are_refused(single: Evaluator) -> None:
    with pytest.raises(ThinsightError, match="evaluators is empty"):
        EvaluatorPool([])
    with pytest.raises(ThinsightError, match=r"evaluators\[1\]\.model is that of evaluators\[0\] too"):
        EvaluatorPool([single, Evaluator(single.model, tiny_processor(), examples())])
    other = Evaluator(copy.deepcopy(single.model), single.processor, examples())
    with pytest.raises(ThinsightError, match=r"evaluators\[1\]\.processor is that of evaluators\[0\] too"):
        EvaluatorPool([single, other])


def test_evaluators_whose_full_models_disagree_are_refused() -> None:
    pool = EvaluatorPool([Member(), Member(full_score=0.75)])
    with pytest.raises(ThinsightError, match=r"evaluators\[1\]\.full_score is 0.75, that of evaluators\[0\]"):
        _ = pool.full_score


def test_one_that_had_to_halve_its_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [evaluator(), evaluator()]
    full = members[1]._full_model
    monkeypatch.setattr(full, "answers", lambda _: full.fix_batch_size(1) or members[0]._full)
    with pytest.raises(ThinsightError, match=r"evaluators\[1\]\.batch_size is 1, that of evaluators\[0\] is 2"):
        _ = EvaluatorPool(members).full_score


# -- threads -------------------------------------------------------------------------------------------------


class Member(SearchEvaluator):
    """An evaluator of a pool that does what it is told for each schedule."""

    num_layers, num_vision_tokens = 4, 16

    def __init__(self, act: Callable[[], object] = lambda: None, full_score: float = 1.0) -> None:
        self.act = act
        self.full_score = full_score
        self.progress: Any = None

    def __call__(self, schedule: Schedule) -> Evaluation:
        self.act()
        return Evaluation(score=schedule.mean_keep_rate)

    def work_for_ever(self) -> None:
        for batch in range(10_000):
            threading.Event().wait(0.002)
            self.progress("reduced model", batch, 10_000)


def fail() -> None:
    raise RuntimeError("out of memory")


def test_evaluations_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=SECONDS)  # breaks where one waits for another to end
    pool = EvaluatorPool([Member(together.wait) for _ in range(3)])
    assert {place: each.score for place, each in collected(pool, SCHEDULES[:3]).items()} == {
        place: schedule.mean_keep_rate for place, schedule in enumerate(SCHEDULES[:3])
    }


def test_each_is_handed_over_as_soon_as_it_is_finished() -> None:
    told = threading.Event()
    slow, quick = Member(lambda: told.wait(SECONDS)), Member()
    order: list[int] = []

    def done(place: int, evaluation: Evaluation) -> None:
        assert threading.current_thread() is threading.main_thread()
        order.append(place)
        told.set()

    EvaluatorPool([slow, quick]).several(SCHEDULES[:2], None, done)
    assert order == [1, 0]


def test_where_one_fails_the_others_finish_and_are_handed_over() -> None:
    failing = threading.Event()

    def broken() -> None:
        failing.set()
        fail()

    members = [Member(lambda: failing.wait(SECONDS)), Member(broken), Member()]
    found: dict[int, Evaluation] = {}
    with pytest.raises(RuntimeError, match="out of memory"):
        EvaluatorPool(members).several(SCHEDULES[:3], None, found.__setitem__)
    assert sorted(found) == [0, 2]
    assert threads() == []


def test_after_a_failure_no_more_are_begun() -> None:
    pool = EvaluatorPool([Member(), Member(fail)])
    found: dict[int, Evaluation] = {}
    with pytest.raises(RuntimeError):
        pool.several(SCHEDULES, None, found.__setitem__)
    assert sorted(found) == [0]


def test_an_interrupt_in_one_thread_ends_the_others() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    busy = Member()
    busy.act = busy.work_for_ever
    with pytest.raises(KeyboardInterrupt):
        collected(EvaluatorPool([busy, Member(interrupt)]), SCHEDULES[:2])
    assert threads() == []
    assert busy.progress is None  # as it was


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_ends_them_and_loses_nothing_that_is_finished(tmp_path: Path) -> None:
    """The key is pressed when one evaluation is in the journal; one then finishes, one would go on for
    ever."""
    study, pressed = tmp_path / "s", threading.Event()

    def press() -> None:
        while not (study.exists() and study.read_text().count("\n") == 2):
            threading.Event().wait(0.002)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        pressed.set()

    busy, last = Member(), Member(lambda: pressed.wait(SECONDS))
    busy.act = busy.work_for_ever
    with pytest.raises(KeyboardInterrupt):
        gsearch(EvaluatorPool([busy, Member(), Member(press), last]), 0.5, study=study)
    assert threads() == []
    assert study.read_text().count("\n") == 1 + 3
    resumed = gsearch(EvaluatorPool([Member() for _ in range(4)]), 0.5, study=study, resume=True)
    assert resumed == gsearch(EvaluatorPool([Member() for _ in range(4)]), 0.5)


def test_a_journal_that_cannot_be_written_ends_them() -> None:
    busy = Member()
    busy.act = busy.work_for_ever

    def full_disk(place: int, evaluation: Evaluation) -> None:
        raise ThinsightError("study cannot be written; free the disk, then resume")

    with pytest.raises(ThinsightError, match="free the disk"):
        EvaluatorPool([busy, Member()]).several(SCHEDULES[:2], None, full_disk)
    assert threads() == []


def test_progress_is_told_one_at_a_time() -> None:
    inside = threading.Lock()
    told: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        assert inside.acquire(blocking=False)
        told.append(done)
        inside.release()

    members = [Member(), Member()]
    for each in members:
        each.progress = progress
        each.act = lambda each=each: [each.progress("reduced model", i, 50) for i in range(50)]
    collected(EvaluatorPool(members), SCHEDULES[:2])
    assert sorted(told) == sorted([*range(50)] * 2)
    assert [each.progress for each in members] == [progress, progress]
