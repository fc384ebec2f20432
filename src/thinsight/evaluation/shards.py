"""Pool: evaluators on several workers, which a search sees as one.

What one evaluator would score batch by batch is given out batch by batch, ahead of what is known to be needed, and
taken in the order in which one evaluator would go: what it would not have run is left out. So scores, early stops and
trials are those of a single worker, to the bit, whoever ran what.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import BadInput
from ..reduction import Reduction
from ..schedule import Schedule
from .base import SearchEvaluator, StandIn
from .bounds import LossTest, Order, check_confidence
from .dispatch import UNSENT, Channel, Dispatcher, Task, Transport
from .result import Evaluation, Part

Progress = Callable[[str, int, int], None]
Floor = float | Callable[[int], float | None] | None
_CAREFUL = 8  # batches under way of a candidate that may be lost after a few
_WINDOW = 64  # batches among which a worker looks for one whose images it has


class Pool(StandIn):
    """Evaluators of the same weights and examples on several workers, that every search takes as one evaluator.

    An evaluation is split over the workers by batches; where a search says what it will ask for next, workers that have
    nothing to do begin with that. Results are the ones of a single evaluator at the same settings. Evaluators without
    batches (`SearchEvaluator` of your own) score a candidate each.

    A worker that is lost costs what it was doing. The full model's answers are computed once, each worker a part.

    Args:
        make: builds a worker's evaluator, in the worker's process: ``lambda: ts.Evaluator(*ts.load_model(...),
            examples)``. It is sent there, so it should name files, not hold weights or pixels.
        workers: how many; "auto": one for each of the GPUs there are, else for each machine.
        address: of a Ray cluster, "auto" for the one that this machine is part of; None: that of ``RAY_ADDRESS``, or
            else workers on this machine. A process that is connected to Ray already stays so.
        gpus_per_worker: what each worker is given; None: 1 where there are GPUs, else none. Above 1, load the model
            with a ``device_map``.
        inner: an evaluator of this process that is asked what no worker need be asked; None: a worker is asked.
        transport: carries calls in place of Ray, see `thinsight.evaluation.dispatch.Transport`; or a channel to workers
            that other pools use too.
        progress: called as ``progress(what, done, total)``; None: that of ``inner``.
        note: told in a line what happens to workers.

    Raises:
        ThinsightError: Ray is not installed, or a bad argument.
    """

    def __init__(
        self,
        make: Callable[[], Any] | None = None,
        workers: int | str = "auto",
        *,
        address: str | None = None,
        gpus_per_worker: float | None = None,
        inner: SearchEvaluator | None = None,
        transport: Transport | Channel | None = None,
        progress: Progress | None = None,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        if transport is None:
            from .ray_workers import RayTransport

            if make is None:
                raise BadInput("make is None: give a function that builds a worker's evaluator")
            transport = RayTransport(make, workers, address=address, gpus_per_worker=gpus_per_worker)
        self._shared = _Shared(transport if isinstance(transport, Channel) else Dispatcher(transport, note))
        super().__init__(_Remote(self._shared.dispatcher) if inner is None else inner)
        if progress is not None:
            self.progress = progress

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._shared.dispatcher.homes) or 'no'} workers begun)"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; they are begun anew when something is asked."""
        self._shared.dispatcher.stop()

    @property
    def workers(self) -> int:  # type: ignore[override]
        """How many workers there are; they are begun when this is first asked."""
        return self._shared.dispatcher.size

    @property
    def at_once(self) -> int:  # type: ignore[override]
        """How many candidates a search is best asked for: 1 where evaluations are split by batches."""
        return 1 if self._splits else self.workers

    @property
    def full(self) -> Evaluation:
        """The full model's evaluation; its answers are computed by all workers when first asked for."""
        self._know_full()
        return self._once("full")

    @property
    def full_score(self) -> float:
        """The full model's score."""
        self._know_full()
        return float(self._once("full_score"))

    @property
    def doubt(self) -> str:  # type: ignore[override]
        """See `Evaluator.doubt`."""
        self._know_full()
        return str(getattr(self.inner, "doubt", ""))

    @property
    def full_cost(self) -> float | None:  # type: ignore[override]
        """See `Evaluator.full_cost`."""
        self._know_full()
        cost: float | None = getattr(self.inner, "full_cost", None)
        return cost

    def __call__(self, candidate: Any, /) -> Evaluation:
        """The score of the model under a candidate; errors as of `Evaluator`."""
        return self._score([_Asked(candidate)])[0]

    def at_least(self, candidate: Any, /, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        """See `Evaluator.at_least`."""
        return self._score([_Asked(candidate, floor, confidence, seed)])[0]

    def sample(self, candidate: Any, /, share: float) -> Evaluation:
        """See `Evaluator.sample`."""
        if not 0 < share <= 1:
            raise BadInput(f"share is {share!r}: it must be above 0 and at most 1")
        return self._score([_Asked(candidate, share=share)])[0]

    def several(
        self, candidates: Sequence[Any], floor: Floor, done: Callable[[int, Evaluation], object], **early: Any
    ) -> None:
        """See `SearchEvaluator.several`; of ``share`` of the examples each, if that is given. ``floor`` may be a
        function of the place, asked when all candidates before it are scored."""
        share = early.pop("share", 1.0)
        self._score([_Asked(each, floor, share=share, **early) for each in candidates], done)

    def predictions(self, schedule: Schedule | Reduction, places: Sequence[int] | None = None) -> list[str]:
        """See `Evaluator.predictions`; one evaluator gives them."""
        self._know_full()
        found: list[str] = self.inner.predictions(schedule, places)
        return found

    def bind(self, candidate: Schedule | Reduction) -> Reduction:
        """A candidate as a reduction; none asks a worker for what it is already."""
        return candidate if isinstance(candidate, Reduction) else self.reduction(candidate)

    def share(self, schedule: Schedule, layer: int) -> None:
        """Tell all workers what the candidates to come share, see `Evaluator.share`."""
        self._shared.dispatcher.tell("share", schedule, layer)

    def fix_batch_size(self, size: int | None = None) -> int | None:
        """The batch size of all workers for good, see `Evaluator.fix_batch_size`."""
        if size is None:
            self._know_full()
        else:
            self._settle(size)
        return self.batch_size

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Prompts per forward pass."""
        if self._shared.batch_size is None:
            self._shared.batch_size = getattr(self.inner, "batch_size", None)
        return self._shared.batch_size

    def with_ranker(self, ranker: Any) -> Pool:
        """This pool with another ranker for bare schedules; workers and what they know are shared."""
        other = copy.copy(self)
        other.inner = self.inner.with_ranker(ranker)
        return other

    # -- how it is done ----------------------------------------------------------------------------------------

    @cached_property
    def _splits(self) -> bool:
        """Whether the evaluators score batch by batch."""
        if isinstance(self.inner, _Remote):
            return bool(self.inner.has("part"))
        return hasattr(self.inner, "part")

    def _once(self, name: str) -> Any:
        if name not in self._shared.facts:
            self._shared.facts[name] = getattr(self.inner, name)
        return self._shared.facts[name]

    def _settle(self, size: int) -> None:
        if self._shared.batch_size != size:
            self._shared.batch_size = size
            self._shared.dispatcher.tell("fix_batch_size", size)
            if not isinstance(self.inner, _Remote):
                self.inner.fix_batch_size(size)

    def _know_full(self) -> None:
        """The full model's answers, each worker a part of them, then known to all."""
        if self._shared.knows_full or not self._splits:
            return
        inner: Any = self.inner
        answers = inner.known_full()
        size = self.batch_size
        assert size is not None
        self._shared.dispatcher.tell("fix_batch_size", size)
        while answers is None:
            work = _FullModel(inner.full_parts(), self._report)
            self._shared.dispatcher.run(work)
            if work.fits:
                answers = [work.answers[index] for index in range(len(work.answers))]
            else:
                self._shared.dispatcher.note(f"batch_size {size} does not fit into memory, now it is {size // 2}")
                size = size // 2
                self._settle(size)
        dispatcher = self._shared.dispatcher
        dispatcher.tell("take_full", dispatcher.transport.put(answers))
        if not isinstance(inner, _Remote):
            inner.take_full(answers)
        self._shared.knows_full = True

    def _score(
        self, asked: Sequence[_Asked], done: Callable[[int, Evaluation], object] = lambda place, found: None
    ) -> list[Evaluation]:
        found: dict[int, Evaluation] = {}

        def keep(place: int, evaluation: Evaluation) -> None:
            found[place] = evaluation
            done(place, evaluation)

        if not self._splits:
            bind = self.inner.bind if getattr(self.inner, "bound", False) else lambda each: each
            self._shared.dispatcher.run(_Whole(asked, keep, bind))
            return [found[place] for place in range(len(asked))]
        self._know_full()
        if self._shared.order is None:
            self._shared.order = copy.deepcopy(self.inner.plan())
        jobs = [self._job(place, each) for place, each in enumerate(asked)]
        self._shared.dispatcher.run(_Split(jobs, self._shared, self.full, keep, self._report))
        return [found[place] for place in range(len(asked))]

    def _job(self, place: int, asked: _Asked) -> _Job:
        if asked.confidence is not None:
            check_confidence(asked.confidence)
        reduction = self.bind(asked.candidate)
        key = self.inner.key_of(reduction)
        known = self._shared.known.setdefault(key, _Known())
        return _Job(place, reduction, asked, key, known)

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"{what}, {self._shared.dispatcher.shown}", done, total)


@dataclass
class _Shared:
    """What a pool and those made of it with other rankers have in common."""

    dispatcher: Dispatcher | Channel
    batch_size: int | None = None
    knows_full: bool = False
    order: Order | None = None
    known: dict[str, _Known] = field(default_factory=dict)  # by key of the candidate
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Known:
    """Batches that were run under candidates of one key, and those that a single evaluator would have run."""

    parts: dict[int, Part] = field(default_factory=dict)  # by the number of the batch
    taken: set[int] = field(default_factory=set)
    losses: Any = None  # (batches,), of the highest score there can be, in examples; NaN: not run
    flying: Any = None  # (batches,), whether it is under way and waited for

    def begin(self, batches: int) -> None:
        """Nothing is waited for; what an earlier search left under way is not."""
        self.flying = np.zeros(batches, dtype=bool)
        if self.losses is None:
            self.losses = np.full(batches, np.nan)


@dataclass(frozen=True)
class _Asked:
    """One evaluation as a search asks for it."""

    candidate: Any
    floor: Floor = None
    confidence: float | None = None
    seed: int = 0
    share: float = 1.0

    def least(self, place: int) -> float | None:
        """The floor as of now."""
        return self.floor(place) if callable(self.floor) else self.floor


class _Remote:
    """An evaluator that is with the workers: what it is asked, any of them is."""

    def __init__(self, dispatcher: Dispatcher | Channel, ranker: Any = None) -> None:
        self._dispatcher, self._ranker = dispatcher, ranker
        self._facts: dict[str, Any] = {}
        self.bound = ranker is not None  # bare schedules mean another ranker than the workers' own

    def has(self, name: str) -> bool:
        """Whether it has an attribute of this name."""
        return self._look(name) is not _MISSING

    def with_ranker(self, ranker: Any) -> _Remote:
        """The same with another ranker for bare schedules."""
        return _Remote(self._dispatcher, ranker)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = self._look(name)
        if found is _MISSING:
            raise AttributeError(name)
        if found is not _METHOD:
            return found

        def call(*arguments: Any) -> Any:
            return self._dispatcher.ask("thinsight_ask", name, self._ranker, arguments)

        return call

    def __call__(self, candidate: Any) -> Any:
        return self._dispatcher.ask("__call__", candidate)

    def _look(self, name: str) -> Any:
        if name in UNSENT:
            return _MISSING
        if name not in self._facts:
            self._facts[name] = self._dispatcher.ask("thinsight_look", name, self._ranker)
        kind, value = self._facts[name]
        return {"missing": _MISSING, "method": _METHOD}.get(kind, value)


_MISSING, _METHOD = object(), object()
# -- work ------------------------------------------------------------------------------------------------------


class _FullModel:
    """The full model's answers in parts."""

    def __init__(self, parts: int, report: Callable[[str, int, int], None]) -> None:
        self._left = deque(range(parts))
        self._parts = self._waiting = parts
        self._report = report
        self.answers: dict[int, Any] = {}
        self.fits = True

    @property
    def finished(self) -> bool:
        return not self._waiting or not self.fits

    def next(self, worker: Hashable) -> Task | None:
        return Task("full_part", (self._left.popleft(),), "the full model") if self._left else None

    def take(self, task: Task, value: Any) -> None:
        if value is None:
            self.fits = False
            return
        self._waiting -= 1
        self.answers.update(value)
        self._report("full model, parts", self._parts - self._waiting, self._parts)


class _Whole:
    """A candidate for each worker."""

    def __init__(
        self, asked: Sequence[_Asked], done: Callable[[int, Evaluation], object], bind: Callable[[Any], Any]
    ) -> None:
        self._asked, self._done, self._bind = asked, done, bind
        self._left = deque(range(len(asked)))
        self._waiting = len(asked)

    @property
    def finished(self) -> bool:
        return not self._waiting

    def next(self, worker: Hashable) -> Task | None:
        if not self._left:
            return None
        place = self._left.popleft()
        asked = self._asked[place]
        candidate, floor = self._bind(asked.candidate), asked.least(place)
        method: str = "__call__"
        arguments: tuple[Any, ...] = (candidate,)
        if asked.share < 1:
            method, arguments = "sample", (candidate, asked.share)
        elif floor is not None:
            early = () if asked.confidence is None else (asked.confidence, asked.seed)
            method, arguments = "at_least", (candidate, floor, *early)
        return Task(method, arguments, repr(asked.candidate), place)

    def take(self, task: Task, value: Any) -> None:
        self._waiting -= 1
        self._done(task.about, value)


@dataclass(eq=False)
class _Job:
    """One evaluation: what is to be run, and how far it is taken. Batches go by their number in `Order.batches`."""

    place: int
    reduction: Reduction
    asked: _Asked
    key: str
    known: _Known
    floor: float | None = None
    order: list[int] | None = None  # before its turn: as it would be if that were now
    begun: bool = False  # whether its turn has come
    seen: tuple[int, float | None] | None = None  # its floor before that, and when
    test: LossTest | None = None
    at: int = 0
    ahead: deque[int] = field(default_factory=deque)  # to be given out
    basis: Any = None  # what `ahead` was made of
    scores: Any = None
    likelihoods: list[float] = field(default_factory=list)
    fresh: dict[int, float] = field(default_factory=dict)  # what each example cost

    @property
    def is_full(self) -> bool:
        """Whether it is the full model's, on all examples."""
        return self.reduction.schedule.is_full and self.asked.share == 1

    @property
    def ends_early(self) -> bool:
        """Whether it may end before its last batch."""
        return self.asked.floor is not None and self.asked.share == 1 and not self.is_full


class _Split:
    """Evaluations in the order in which a single evaluator would make them, their batches given out ahead."""

    def __init__(
        self,
        jobs: Sequence[_Job],
        shared: _Shared,
        full: Evaluation,
        done: Callable[[int, Evaluation], object],
        report: Callable[[str, int, int], None],
    ) -> None:
        assert shared.order is not None
        self._jobs, self._order, self._done, self._report = jobs, shared.order, done, report
        self._dispatcher, self._full = shared.dispatcher, full
        self._known = {job.key: job.known for job in jobs}
        self._numbers = {id(batch): number for number, batch in enumerate(self._order.batches)}
        for each in self._known.values():
            each.begin(len(self._numbers))
        self._current = 0
        self._first = 0  # the first job that may have batches to give out
        self._hardest: tuple[int, list[int]] | None = None  # the order now, and how many evaluations it knows
        self._retire()

    @property
    def finished(self) -> bool:
        return self._current >= len(self._jobs)

    # what is given out

    def next(self, worker: Hashable) -> Task | None:
        self._first = max(self._first, self._current)
        for careful in (True, False):  # what is expected to be needed, else what may be
            for job in self._jobs[self._first :]:
                self._look_ahead(job, careful)
                number = self._choose(job, worker)
                if number is not None:
                    return self._give(job, number)
                if not job.ends_early and self._jobs[self._first] is job:
                    self._first += 1
            if not any(job.ends_early for job in self._jobs[self._first :]):
                break
        return None

    def _give(self, job: _Job, number: int) -> Task:
        job.known.flying[number] = True
        batch = self._order.batches[number]
        return Task("part", (job.reduction, batch), repr(job.reduction.schedule), (job.key, number))

    def _choose(self, job: _Job, worker: Hashable) -> int | None:
        """One of the next batches of a job: one whose images the worker knows, else the first."""
        home, count = self._dispatcher.homes.get(worker, 0), len(self._dispatcher.homes)
        while job.ahead:
            window = min(len(job.ahead), count if job.ends_early else _WINDOW)
            found = next((place for place in range(window) if job.ahead[place] % count == home), 0)
            number = job.ahead[found]
            del job.ahead[found]
            if number not in job.known.parts and not job.known.flying[number]:  # for another candidate of this key
                return number
        return None

    def _look_ahead(self, job: _Job, careful: bool) -> None:
        """Bring up to date what a job has to give out."""
        known = job.known
        basis = (careful, self._current, len(known.parts)) if job.ends_early else ()
        if job.basis == basis:
            return
        if job.is_full:
            job.order = []
        elif not job.begun:
            job.order = self._hardest_first() if job.ends_early else self._drawn(job, None)[0]
        assert job.order is not None
        order = np.array(job.order, dtype=np.int64)
        missing = np.isnan(known.losses[order]) & ~known.flying[order]
        if job.ends_early and careful:
            missing[self._expected(job, order) :] = False
            missing[np.cumsum(missing) > max(_CAREFUL, len(known.parts)) - known.flying.sum()] = False
        job.basis, job.ahead = basis, deque(order[missing].tolist())

    def _expected(self, job: _Job, order: Any) -> int:
        """How many batches in this order a job takes until its floor is out of reach, where those that are not known
        lose what the others do on average."""
        losses, floor = job.known.losses, job.floor if job.begun else self._floor(job)
        if floor is None or not job.known.parts:
            return len(order)
        rate = float(np.nanmean(losses))
        lost = np.cumsum(np.where(np.isnan(losses[order]), rate, losses[order]))
        spare = float(self._order.ceilings.sum()) - floor * len(self._order.full)
        return int(np.searchsorted(lost, spare, side="right")) + 1

    def _floor(self, job: _Job) -> float | None:
        """The floor of a job whose turn is yet to come, as of now."""
        if job.seen is None or job.seen[0] != self._current:
            job.seen = self._current, job.asked.least(job.place)
        return job.seen[1]

    def _hardest_first(self) -> list[int]:
        if self._hardest is None or self._hardest[0] != self._current:
            self._hardest = self._current, self._numbered(self._order.hardest_first())
        return self._hardest[1]

    def _numbered(self, batches: Sequence[list[int]]) -> list[int]:
        return [self._numbers[id(batch)] for batch in batches]

    def _drawn(self, job: _Job, floor: float | None) -> tuple[list[int], LossTest | None]:
        asked, order = job.asked, self._order
        if asked.share < 1:
            return self._numbered(order.sample(asked.share)), None
        if floor is None:
            return list(range(len(order.batches))), None
        if asked.confidence is None:
            return self._hardest_first(), None
        batches, test = order.drawn(floor, asked.confidence, [asked.seed, zlib.crc32(job.key.encode())])
        return self._numbered(batches), test

    # what is taken

    def take(self, task: Task, value: Any) -> None:
        key, number = task.about
        known = self._known[key]
        known.flying[number] = False
        known.parts[number] = value
        known.losses[number] = float(self._order.ceilings[self._order.batches[number]].sum()) - sum(value.scores)
        self._retire()

    def _retire(self) -> None:
        """Take what is there in the order in which a single evaluator comes to it."""
        while not self.finished:
            job = self._jobs[self._current]
            if job.is_full:
                self._current += 1
                self._done(job.place, self._full)
                continue
            if not job.begun:
                job.floor = job.asked.least(job.place) if job.asked.share == 1 else None
                job.order, job.test = self._drawn(job, job.floor)
                job.begun, job.basis = True, None
                job.scores = np.full(len(self._order.full), np.nan)
            assert job.order is not None
            lost = False
            while job.at < len(job.order) and not lost:
                number = job.order[job.at]
                if number not in job.known.parts:
                    return
                lost = self._take(job, number, job.known.parts[number])
            evaluation = self._evaluation(job)
            self._current += 1
            self._done(job.place, evaluation)

    def _take(self, job: _Job, number: int, part: Part) -> bool:
        """A batch's part of an evaluation; whether the floor is out of reach."""
        batch = self._order.batches[number]
        job.at += 1
        job.scores[batch] = part.scores
        job.likelihoods += part.likelihoods
        if number not in job.known.taken and not job.reduction.schedule.is_full:
            job.known.taken.add(number)
            job.fresh.update(zip(batch, part.costs, strict=True))
        self._report("reduced model", int(np.count_nonzero(~np.isnan(job.scores))), len(job.scores))
        return job.floor is not None and self._order.is_lost(job.scores, batch, job.floor, job.test)

    def _evaluation(self, job: _Job) -> Evaluation:
        """As `Evaluator` makes it of the same batches."""
        scores = job.scores
        self._order.note(scores)
        run = np.flatnonzero(~np.isnan(scores))
        complete = job.floor is None or len(run) == len(scores)
        bound = self._order.upper_bound(scores)
        return Evaluation(
            score=float(np.mean(scores[run]) if complete or job.floor is None else min(bound, job.floor)),
            per_example=scores,
            complete=complete,
            full_score=self._full.score,
            cost=sum((job.fresh[index] for index in sorted(job.fresh)), 0.0),
            agreement=float(np.mean(np.exp(job.likelihoods))),
            share=len(run) / len(scores) if complete else 1.0,
        )
