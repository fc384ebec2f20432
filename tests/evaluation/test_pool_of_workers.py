"""Many workers as one evaluator: the very results of a single one, whatever is lost, fails or is slow meanwhile."""

from __future__ import annotations

import inspect
import random
import signal
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from benchmarks.simulated import SimulatedTransport
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation import Evaluation, Evaluator, Example, Pool, ray_workers
from thinsight.evaluation.dispatch import Channel, Dispatcher, WorkerFailed
from thinsight.progress import SearchObserver
from thinsight.schedule import Schedule
from thinsight.searches import Bisect, SearchEvaluator, gsearch

QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")
SCHEDULES = [Schedule.step(4, 2, count / 16) for count in (2, 6, 10, 14)]
KILLS = 50


def evaluator(**settings: Any) -> Evaluator:
    images = tiny_images(3)
    of = [Example(f"e{i}", (images[i % 3],), QUESTIONS[i % 4]) for i in range(14)]
    return Evaluator(tiny_llava(), tiny_processor(), of, **{"batch_size": 2, "max_new_tokens": 3, **settings})


@pytest.fixture(scope="module")
def single() -> Evaluator:
    return evaluator()


def uneven(worker: Hashable, method: str, arguments: tuple[Any, ...]) -> float:
    """Calls end in another order than they begin."""
    return 1.0 + random.Random(f"{worker} {method} {arguments!r}").random()


def real(workers: int = 3, **about: Any) -> tuple[Pool, SimulatedTransport]:
    transport = SimulatedTransport(evaluator, workers, uneven, **about)
    return Pool(transport=transport), transport


def alike(found: Evaluation, expected: Evaluation) -> None:
    assert (found.score, found.complete, found.agreement) == (expected.score, expected.complete, expected.agreement)
    assert found.per_example is not None
    assert expected.per_example is not None
    assert found.per_example.tobytes() == expected.per_example.tobytes()
    assert (found.full_score, found.share) == (expected.full_score, expected.share)


# -- the results of one evaluator --------------------------------------------------------------------------------


def test_every_way_of_scoring_is_to_the_bit_what_one_evaluator_gives() -> None:
    """In the same order of calls, on which early stops depend."""
    pool, transport = real()
    alone = evaluator()
    assert pool.full == alone.full
    for schedule in SCHEDULES:
        alike(pool.sample(schedule, 0.5), alone.sample(schedule, 0.5))
        alike(pool.at_least(schedule, 0.9), alone.at_least(schedule, 0.9))
        alike(pool.at_least(schedule, 0.9, 0.9, 3), alone.at_least(schedule, 0.9, 0.9, 3))
        found, expected = pool(schedule), alone(schedule)
        alike(found, expected)
        assert found.cost == expected.cost
    assert len({worker for worker, method, _ in transport.calls if method == "part"}) == 3


def test_it_takes_whatever_one_evaluator_takes() -> None:
    for name, method in vars(Pool).items():
        alone = vars(Evaluator).get(name)
        if name.startswith("_") or not callable(method) or alone is None:
            continue
        ours, its = (list(inspect.signature(each).parameters.values())[2:] for each in (method, alone))
        assert [(each.name, each.default) for each in ours] == [(each.name, each.default) for each in its], name


def test_answers_to_some_examples() -> None:
    pool, _ = real(2)
    for schedule in (SCHEDULES[0], Schedule.full(4)):
        assert pool.predictions(schedule, [3, 1]) == evaluator().predictions(schedule, [3, 1])


def test_the_full_model_is_run_once_in_all() -> None:
    pool, transport = real()
    assert pool.full_score == 1.0
    parts = [arguments for _, method, arguments in transport.calls if method == "full_part"]
    assert sorted(parts) == [(number,) for number in range(len(parts))]
    assert len(parts) > 1
    pool(SCHEDULES[0])
    assert [method for _, method, _ in transport.calls].count("full_part") == len(parts)


def test_several_at_once_are_taken_in_their_order_and_share_what_was_run() -> None:
    pool, transport = real()
    alone = evaluator()
    best: list[float | None] = [None]

    def done(place: int, evaluation: Evaluation) -> None:
        order.append(place)
        alike(evaluation, alone(SCHEDULES[place]) if best[0] is None else alone.at_least(SCHEDULES[place], best[0]))
        best[0] = max(best[0] or 0.0, evaluation.score if evaluation.complete else 0.0)

    order: list[int] = []
    pool.several(SCHEDULES, lambda place: best[0], done)
    assert order == [0, 1, 2, 3]
    before = len(transport.calls)
    again = pool(SCHEDULES[0])
    assert again.cost == 0.0  # as one evaluator knows it already
    assert [method for _, method, _ in transport.calls[before:]].count("part") == 0


@pytest.mark.parametrize("max_drop", [0.5, 0.3])
def test_a_search_finds_the_same_by_the_same_trials(single: Evaluator, max_drop: float, tmp_path: Path) -> None:
    pool, _ = real()
    found = gsearch(pool, max_drop, step=4, study=tmp_path / "s")
    alone = gsearch(evaluator(), max_drop, step=4)
    assert found.reduction == alone.reduction
    assert [(each.schedule, each.score, each.complete) for each in found.trials] == [
        (each.schedule, each.score, each.complete) for each in alone.trials
    ]
    assert gsearch(single, max_drop, step=4, study=tmp_path / "s", resume=True).reduction == found.reduction


def test_a_search_names_early_all_that_it_is_sure_to_want(tmp_path: Path) -> None:
    """So that no worker waits for the end of an evaluation; the journal is continued by one alone all the same."""
    pool, _ = real(4)
    asked: list[int] = []
    several = pool.several

    def counted(candidates: Any, *rest: Any, **more: Any) -> None:
        asked.append(len(candidates))
        several(candidates, *rest, **more)

    pool.several = counted  # type: ignore[method-assign]
    found = ts.random_search(pool, 0.5, n_trials=6, study=tmp_path / "s")
    assert asked == [len(found.trials)]
    assert len(found.trials) > 1
    resumed = ts.random_search(evaluator(), 0.5, n_trials=6, study=tmp_path / "s", resume=True)
    assert resumed.trials == found.trials


@pytest.mark.parametrize("search", [ts.random_search, ts.psigmoid, ts.sensitivity_search])
def test_searches_under_a_budget_find_the_same(search: Callable[..., Any]) -> None:
    pool, _ = real()
    found, alone = (search(each, 0.5, n_trials=8, seed=1) for each in (pool, evaluator()))
    assert found.reduction == alone.reduction
    assert [(each.schedule, each.score) for each in found.trials] == [
        (each.schedule, each.score) for each in alone.trials
    ]


def test_another_ranker_and_what_a_worker_is_asked(single: Evaluator) -> None:
    pool, _ = real(2)
    assert (pool.num_layers, pool.num_vision_tokens, pool.first_layer, pool.workers) == (4, 16, 1, 2)
    assert pool.fingerprint == single.fingerprint
    assert pool.full_cost == single.full_cost
    assert pool.reduction(SCHEDULES[0]) == single.reduction(SCHEDULES[0])
    other = pool.with_ranker("uniform")
    assert (other.full_score, other.fingerprint) == (pool.full_score, evaluator(ranker="uniform").fingerprint)
    assert other.fingerprint != pool.fingerprint
    alike(other(SCHEDULES[1]), single.with_ranker("uniform")(SCHEDULES[1]))
    alike(pool(SCHEDULES[1]), single(SCHEDULES[1]))
    assert pool.predictions(SCHEDULES[1]) == single.predictions(SCHEDULES[1])
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pool.no_such_thing
    with pytest.raises(BadInput, match="share is 0"):
        pool.sample(SCHEDULES[0], 0)


def test_what_a_search_finds_says_all_that_it_says_of_one_device(single: Evaluator) -> None:
    found = gsearch(real(2)[0], 0.5)
    alone = gsearch(single, 0.5)
    assert not found.schedule.is_full
    assert (found.score, found.full_score) == (alone.score, alone.full_score)
    assert found.reduction.ranker == alone.reduction.ranker
    assert found.reduction.search is not None
    assert found.reduction.search["calibration"] == single.fingerprint
    for trial in found.trials:
        exact = single(trial.schedule)
        assert trial.score == exact.score if trial.complete else trial.score >= exact.score
    assert found.full_forwards == pytest.approx((found.cost or 0) / (single.full_cost or 0))


def test_all_workers_are_told_what_candidates_share_and_their_batch_size() -> None:
    made: list[Evaluator] = []

    def kept() -> Evaluator:
        made.append(evaluator(batch_size=3))
        return made[-1]

    pool = Pool(transport=SimulatedTransport(kept, 3, uneven))
    assert pool.fix_batch_size(4) == pool.batch_size == 4
    pool.share(SCHEDULES[0], 2)
    found = pool(SCHEDULES[1])
    assert found.score == evaluator(batch_size=4)(SCHEDULES[1]).score
    assert [each.batch_size for each in made] == [4] * 3
    assert [each._prefixes._announced for each in made if each._prefixes] == [(1.0, 1.0)] * 3


def test_workers_without_batches_try_as_many_counts_as_they_are() -> None:
    """Where the score is not monotone it is as one device that tries as many."""

    class Uneven(Stub):
        def __call__(self, schedule: Schedule) -> Evaluation:
            return Evaluation(score=1.0 - 0.01 * (sum(schedule.counts(64)) * 7 % 23))

    pool = Pool(transport=SimulatedTransport(Uneven, 2, uneven))
    assert pool.at_once == 2
    found, alone = gsearch(pool, 0.1), gsearch(Uneven(), 0.1, solver=Bisect(at_once=2))
    assert [(trial.count, trial.accepted) for trial in found.trials] == [
        (trial.count, trial.accepted) for trial in alone.trials
    ]
    assert found.schedule == alone.schedule
    assert found.schedule != gsearch(Uneven(), 0.1).schedule


def test_the_front_door_has_it() -> None:
    assert ts.Pool is Pool


def test_batches_that_do_not_fit_are_halved_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinsight.evaluation.full_model import FullModel

    answer_part = FullModel.answer_part
    monkeypatch.setattr(
        FullModel, "answer_part", lambda self, number: answer_part(self, number) if self.batch_size == 1 else None
    )
    said: list[str] = []
    transport = SimulatedTransport(evaluator, 2)
    pool = Pool(transport=transport, note=said.append)
    assert pool.fix_batch_size() == 1
    assert said == ["batch_size 2 does not fit into memory, now it is 1"]
    alike(pool(SCHEDULES[1]), evaluator(batch_size=1)(SCHEDULES[1]))


# -- faults --------------------------------------------------------------------------------------------------------


class Stub(SearchEvaluator):
    """Scores a schedule by its rates; does what it is told before."""

    num_layers, num_vision_tokens, full_score = 4, 64, 1.0

    def __init__(self, act: Callable[[Schedule], object] = lambda schedule: None) -> None:
        self.act = act

    def __call__(self, schedule: Schedule) -> Evaluation:
        self.act(schedule)
        return Evaluation(score=min(1.0, 2 * schedule.mean_keep_rate))


def stubs(workers: int, act: Callable[[Schedule], object] = lambda schedule: None, **about: Any) -> Any:
    transport = SimulatedTransport(lambda: Stub(act), workers, about.pop("seconds", uneven), **about)
    return Pool(transport=transport), transport


def test_fifty_kills_lose_nothing_but_what_was_under_way() -> None:
    kills = [random.Random(number).uniform(2, 50) for number in range(KILLS)]
    pool, transport = stubs(5, kills=kills, starts=0.5)
    many = [Schedule.step(4, 1, rate / 200) for rate in range(200)]
    found: dict[int, Evaluation] = {}

    def done(place: int, each: Evaluation) -> None:
        assert place not in found
        found[place] = each

    pool.several(many, None, done)
    assert [found[place] for place in range(200)] == [Stub()(each) for each in many]
    counts = pool._shared.dispatcher.counts
    assert counts["lost"] == KILLS
    scored = [method for _, method, _ in transport.calls].count("__call__")
    assert 200 < scored <= 200 + KILLS + counts["issued again"]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_with_kills_ends_like_one_without(seed: int, tmp_path: Path) -> None:
    kills = [random.Random(100 * seed + number).uniform(1, 150) for number in range(KILLS)]
    pool, _ = real(3, kills=kills, starts=0.25, seed=seed)
    found = gsearch(pool, 0.5, step=4, study=tmp_path / "s")
    alone = gsearch(evaluator(), 0.5, step=4)
    assert found.reduction == alone.reduction
    assert [(each.schedule, each.score) for each in found.trials] == [
        (each.schedule, each.score) for each in alone.trials
    ]
    assert pool._shared.dispatcher.counts["lost"] > 5
    assert (tmp_path / "s").read_text().count("\n") == 1 + len(found.trials)


def test_a_driver_that_ends_early_goes_on_with_other_workers(tmp_path: Path) -> None:
    class Ended(SearchObserver):
        trials = 0

        def on_trial(self, trial: Any, progress: Any) -> None:
            self.trials += 1
            if self.trials == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gsearch(real(3)[0], 0.5, step=1, study=tmp_path / "s", observer=Ended())
    assert (tmp_path / "s").read_text().count("\n") == 1 + 3
    pool, transport = real(2)
    found = gsearch(pool, 0.5, step=1, study=tmp_path / "s", resume=True)
    alone = gsearch(evaluator(), 0.5, step=1)
    assert found.reduction == alone.reduction
    assert [(each.schedule, each.score) for each in found.trials] == [
        (each.schedule, each.score) for each in alone.trials
    ]
    assert {worker for worker, method, _ in transport.calls if method == "part"} == {0, 1}


def test_a_schedule_that_fails_twice_is_named() -> None:
    def act(schedule: Schedule) -> None:
        if schedule == SCHEDULES[2]:
            raise RuntimeError("device-side assert")

    pool, transport = stubs(3, act)
    found: dict[int, Evaluation] = {}
    with pytest.raises(WorkerFailed) as caught:
        pool.several(SCHEDULES, None, found.__setitem__)
    assert repr(SCHEDULES[2]) in str(caught.value)
    assert "RuntimeError: device-side assert" in str(caught.value)
    tried = [worker for worker, _, arguments in transport.calls if arguments == (SCHEDULES[2],)]
    assert len(tried) == len(set(tried)) == 2  # the second time on another worker
    assert sorted(found) == [0, 1, 3]  # none of the others is lost
    assert pool(SCHEDULES[0]) == Stub()(SCHEDULES[0])  # and the pool goes on


def test_one_that_fails_once_is_scored_elsewhere() -> None:
    failed: list[Schedule] = []

    def act(schedule: Schedule) -> None:
        if schedule == SCHEDULES[1] and not failed:
            failed.append(schedule)
            raise RuntimeError("out of memory")

    pool, _ = stubs(2, act)
    found: dict[int, Evaluation] = {}
    pool.several(SCHEDULES, None, found.__setitem__)
    assert sorted(found) == [0, 1, 2, 3]
    assert failed


def test_an_error_keeps_its_kind() -> None:
    def act(schedule: Schedule) -> None:
        raise BadInput("the schedule has 4 layers but the model has 2")

    pool, _ = stubs(2, act)
    with pytest.raises(BadInput, match=r"Schedule.* failed on workers .*the model has 2"):
        pool(SCHEDULES[0])


def test_a_schedule_that_kills_its_workers_is_an_error() -> None:
    pool, _ = stubs(1, kills=[0.5 + number for number in range(100)], seconds=lambda *_: 1.2)
    with pytest.raises(WorkerFailed, match=r"took 6 workers with it: killed"):
        pool.several(SCHEDULES[:1], None, lambda place, each: None)


def test_workers_that_never_get_ready_are_an_error() -> None:
    pool, _ = stubs(2, kills=[0.1 * number for number in range(1, 50)], starts=30.0)
    with pytest.raises(WorkerFailed, match="no worker is left"):
        pool(SCHEDULES[0])


def test_a_worker_that_cannot_be_built_says_why() -> None:
    class Broken(SimulatedTransport):
        def replace(self, worker: Hashable) -> None:
            from thinsight.evaluation.dispatch import FAILED, Event

            self._at(0.0, worker, lambda: Event(worker, FAILED, BadInput("model is 'x': no such folder")))

    pool = Pool(transport=Broken(Stub, 2))
    with pytest.raises(BadInput, match=r"could not begin: .*no such folder"):
        pool(SCHEDULES[0])


def test_a_straggler_is_given_to_another_worker() -> None:
    slow = {"first": True}

    def seconds(worker: Hashable, method: str, arguments: tuple[Any, ...]) -> float:
        if method == "__call__" and slow.pop("first", False):
            return 1e6
        return 1.0

    pool, transport = stubs(2, seconds=seconds)
    many = [Schedule.step(4, 1, rate / 20) for rate in range(20)]
    found: dict[int, Evaluation] = {}
    pool.several(many, None, found.__setitem__)
    assert sorted(found) == list(range(20))
    assert transport.clock < 50
    assert pool._shared.dispatcher.counts["issued again"] == 1
    assert pool(SCHEDULES[0]).score == Stub()(SCHEDULES[0]).score  # the slow one is still at it, and nobody waits
    assert transport.clock < 60


def test_unequal_workers_do_not_wait_for_each_other() -> None:
    """One that is four times slower does a fourth of what the others do, and nobody idles before the end."""
    speeds = {0: 4.0, 1: 1.0, 2: 1.0}
    pool, transport = stubs(3, seconds=lambda worker, method, arguments: speeds[worker])
    many = [Schedule.step(4, 1, rate / 90) for rate in range(90)]
    pool.several(many, None, lambda place, each: None)
    done = Counter(worker for worker, method, _ in transport.calls if method == "__call__")
    assert done == {0: 10, 1: 40, 2: 40}
    assert transport.clock < 1.15 * 90 / (1 / 4 + 1 + 1)


def test_that_none_gets_ready_is_said_once() -> None:
    said: list[str] = []
    transport = SimulatedTransport(Stub, 2, lambda *_: 1.0, starts=200.0)
    Pool(transport=transport, note=said.append)(SCHEDULES[0])
    assert said == ["no worker is ready after 60 s: models load, or Ray has nothing free for them"]


def test_an_interrupt_ends_all_workers_and_loses_nothing_that_is_finished() -> None:
    def act(schedule: Schedule) -> None:
        if schedule == SCHEDULES[3]:
            raise KeyboardInterrupt

    found: dict[int, Evaluation] = {}
    pool, transport = stubs(2, act, seconds=lambda *_: 1.0)
    with pytest.raises(KeyboardInterrupt):
        pool.several(SCHEDULES, None, found.__setitem__)
    assert transport.stopped == 1
    assert {0, 1} <= set(found)
    assert pool(SCHEDULES[0]) == Stub()(SCHEDULES[0])  # workers are begun anew


def test_a_journal_that_cannot_be_written_ends_a_search_and_the_pool_goes_on() -> None:
    def full_disk(place: int, evaluation: Evaluation) -> None:
        raise ThinsightError("study cannot be written; free the disk, then resume")

    pool, _ = stubs(2)
    with pytest.raises(ThinsightError, match="free the disk"):
        pool.several(SCHEDULES, None, full_disk)
    assert pool(SCHEDULES[1]) == Stub()(SCHEDULES[1])


def test_each_is_handed_over_as_soon_as_it_is_finished() -> None:
    pool, _ = stubs(2, seconds=lambda worker, method, arguments: 9.0 if arguments == (SCHEDULES[0],) else 1.0)
    order: list[int] = []
    pool.several(SCHEDULES, None, lambda place, each: order.append(place))
    assert order == [1, 2, 3, 0]


def test_progress_shows_each_worker() -> None:
    said: list[str] = []
    transport = SimulatedTransport(Stub, 3, lambda *_: 1.0, starts=0.5, kills=[2.2])
    dispatcher = Dispatcher(transport, watch=said.append)
    pool = Pool(transport=Channel(dispatcher, ""))
    pool.several(SCHEDULES, None, lambda place, each: None)
    assert said[0] == "workers ---"
    assert "workers ###" in said
    assert any(sorted(each[8:]) == ["#", "#", "-"] for each in said)  # one is lost, another one begins
    many = Dispatcher(SimulatedTransport(Stub, 40, lambda *_: 1.0), watch=said.append)
    Pool(transport=Channel(many, "")).several(SCHEDULES, None, lambda place, each: None)
    assert "4 of 40 workers busy, 0 begin" in said


def test_an_image_is_encoded_once_in_all_where_workers_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thinsight.evaluation import features

    encoded: list[int] = []
    encode = features.encode_images

    def counted(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        found = encode(model, inputs, *rest, **more)
        encoded.append(len(found.features))
        return found

    alone = evaluator()
    expected = [alone(schedule) for schedule in SCHEDULES[:2]]
    monkeypatch.setattr(features, "encode_images", counted)
    pool = Pool(transport=SimulatedTransport(lambda: evaluator(cache_dir=tmp_path), 3, uneven))
    for schedule, each in zip(SCHEDULES[:2], expected, strict=True):
        alike(pool(schedule), each)
    assert sum(encoded) == 3  # of three images, which all workers ask about


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_begins_is_heeded_afterwards(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)
    done: list[int] = []

    def raised(times: int) -> None:
        with ray_workers._signals_later():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)

    try:
        for times in (1, 2):  # a second one is heeded at once
            with pytest.raises(KeyboardInterrupt):
                raised(times)
            assert signal.getsignal(number) is signal.default_int_handler
        assert done == [1]
    finally:
        signal.signal(number, before)


def test_without_ray_it_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ts.MissingPackage, match=r"pip install 'thinsight\[ray\]'"):
        Pool(Stub, 2)
    for workers in (0, -1, "many", 1.5):
        with pytest.raises(BadInput, match="workers is"):
            Pool(Stub, workers)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"gpus_per_worker is 1\.5: above 1"):
        Pool(Stub, 1, gpus_per_worker=1.5)
    with pytest.raises(BadInput, match="make is None"):
        Pool()
