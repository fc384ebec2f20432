"""Who does what next: work given out to workers that may be slow, fail or be lost. Plain Python.

Knows nothing about models, Ray or processes: it sees a transport, which carries calls to workers and says what came of
them. The same code runs on a cluster, on stubs, and on a clock that is not real (benchmarks/scale.py).
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import ThinsightError, Unsupported
from ..texts import brief

READY, DONE, FAILED, LOST = "ready", "done", "failed", "lost"

_MOST_FAILURES = 2  # of one task
_MOST_LOSSES = 6  # workers that one task may take with it: a kill is seldom the task's fault
_MOST_STARTS = 3  # of one worker that is lost each time before it is ready
_STRAGGLES = 3.0  # times the median time, from which on a task is given to an idle worker too
_MOST_SHOWN = 32  # workers that a line of progress shows one by one
_SLOW_START = 60.0  # seconds without any worker that is ready, from which on that is said
_KNOWN_TIMES = 5, 64  # times that a median takes, and the latest ones that it is of


class WorkerFailed(Unsupported):
    """A task that no worker could do."""


@dataclass(frozen=True)
class State:
    """What a worker has to be told before it does anything; of one name the latest holds."""

    version: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class Task:
    """One call of a worker's evaluator; ``what`` names it in an error."""

    method: str
    arguments: tuple[Any, ...]
    what: str = ""
    about: Any = None  # whoever gave it out knows
    failures: list[Hashable] = field(default_factory=list)  # workers it failed on
    losses: int = 0


@dataclass(frozen=True)
class Event:
    """What a transport tells of a worker: it is ready, its call is done (with the value) or failed (with the error), or
    it is lost."""

    worker: Hashable
    kind: str
    value: Any = None


class Transport(Protocol):
    """Carries calls to workers, one at a time to each."""

    def start(self) -> Sequence[Hashable]:
        """Begin all workers, and name them; each tells when it is ready."""

    def submit(self, worker: Hashable, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> None:
        """Have a worker that does nothing take these states, and then do this call."""

    def wait(self, seconds: float | None) -> Sequence[Event]:
        """What happened, as soon as something does; nothing after so many seconds."""

    def replace(self, worker: Hashable) -> None:
        """Begin a new worker in place of one that was lost, under its name."""

    def put(self, value: Any) -> Any:
        """What stands for a large value in arguments, so that it is sent to each machine once."""

    def now(self) -> float:
        """Seconds on the clock that `wait` waits by."""

    def stop(self) -> None:
        """End all workers at once, whatever they do."""


class Work(Protocol):
    """Whoever gives out tasks."""

    def next(self, worker: Hashable) -> Task | None:
        """A task for a worker that is idle; None: nothing for now."""

    def take(self, task: Task, value: Any) -> None:
        """What came of a task; once for each."""

    @property
    def finished(self) -> bool:
        """Whether all that is waited for is there."""


@dataclass(eq=False)
class _Flight:
    task: Task
    since: float


class Dispatcher:
    """Gives tasks to idle workers until the work is finished.

    The loss of a worker costs what it was doing, which another one does anew. A task that fails is tried once more, on
    another worker where there is one; if it fails again, that is an error. One that takes much longer than others do is
    given to an idle worker too, and whichever ends first counts. What nobody waits for any more goes on to its end,
    and its worker is idle from then on.

    Args:
        transport: carries the calls.
        note: told in a line what happens to workers.
        watch: told what each of them does, whenever that changes, as `shown` says it.
    """

    def __init__(
        self,
        transport: Transport,
        note: Callable[[str], object] = lambda text: None,
        watch: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.transport = transport
        self.note = note
        self.watch = watch
        self.counts: Counter[str] = Counter()  # given out, done, lost, failed, issued again
        self.homes: dict[Hashable, int] = {}  # the place of each worker
        self._idle: dict[Hashable, None] = {}  # in the order in which they became so
        self._flying: dict[Hashable, _Flight] = {}
        self._starts: Counter[Hashable] = Counter()
        self._states: dict[str, State] = {}
        self._told: dict[Hashable, dict[str, int]] = {}
        self._times: deque[float] = deque(maxlen=_KNOWN_TIMES[1])
        self._again: deque[Task] = deque()
        self._versions = 0
        self._running = False
        self._none_ready: float | None = None  # since when, where it was not said yet

    @property
    def size(self) -> int:
        """How many workers there are; they are begun when this is first asked."""
        self._begin()
        return len(self.homes)

    @property
    def shown(self) -> str:
        """A mark for each worker in its place: # does something, . waits for work, - begins; of very many how many do
        what."""
        marks = ["#" if name in self._flying else "." if name in self._idle else "-" for name in self.homes]
        if len(marks) <= _MOST_SHOWN:
            return f"workers {''.join(marks)}"
        return f"{marks.count('#')} of {len(marks)} workers busy, {marks.count('-')} begin"

    def tell(self, method: str, *arguments: Any) -> None:
        """Have every worker told this, before its next task; also those that come in place of lost ones."""
        self._versions += 1
        self._states[method] = State(self._versions, method, arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a worker says to one call."""
        single = _Single(Task(method, arguments, method))
        self.run(single)
        return single.value

    def run(self, work: Work) -> None:
        """Give out work until it is finished. An interrupt ends all workers at once.

        Raises:
            WorkerFailed: a task failed twice, or took several workers with it; or no worker is left.
        """
        if self._running:
            raise RuntimeError("workers are asked for something by what they are working for")
        self._running = True
        self._again.clear()
        self._times.clear()
        try:
            self._begin()
            mine: set[Task] = set()
            while not work.finished:
                self._fill(work, mine)
                self.watch(self.shown)
                for event in self.transport.wait(self._patience(mine)):
                    self._heard(event, work, mine)
        except BaseException as error:
            self._again.clear()
            if not isinstance(error, Exception):
                self.stop()
            raise
        finally:
            self._running = False

    def stop(self) -> None:
        """End all workers; they are begun anew when there is work."""
        self.transport.stop()
        for each in (self.homes, self._idle, self._flying, self._starts, self._told):
            each.clear()

    def _begin(self) -> None:
        if not self.homes:
            self.homes.update((name, place) for place, name in enumerate(self.transport.start()))
            self._told.update((name, {}) for name in self.homes)
            self._none_ready = self.transport.now()

    def _fill(self, work: Work, mine: set[Task]) -> None:
        for worker in list(self._idle):
            task = self._failed_elsewhere(worker) or work.next(worker) or self._straggler(worker, mine)
            if task is not None:
                mine.add(task)
                self._give(worker, task)
        if not self._flying and self._idle and len(self._idle) == len(self.homes):
            raise RuntimeError("work is not finished, and there is nothing to do")

    def _failed_elsewhere(self, worker: Hashable) -> Task | None:
        """A task that has to be done again, and has not failed on this worker while there are others."""
        for task in self._again:
            if worker not in task.failures or len(self.homes) == 1:
                self._again.remove(task)
                return task
        return None

    def _straggler(self, worker: Hashable, mine: set[Task]) -> Task | None:
        """A task that takes too long where it is."""
        limit, now = self._limit(), self.transport.now()
        late = [each for each in self._alone(mine) if now - each.since >= limit]
        if not late:
            return None
        self.counts["issued again"] += 1
        return min(late, key=lambda each: each.since).task

    def _alone(self, mine: set[Task]) -> list[_Flight]:
        """Flights that are waited for, of tasks that only one worker does."""
        holders = Counter(each.task for each in self._flying.values())
        return [each for each in self._flying.values() if each.task in mine and holders[each.task] == 1]

    def _limit(self) -> float:
        few = len(self._times) < _KNOWN_TIMES[0]
        return float("inf") if few else _STRAGGLES * statistics.median(self._times)

    def _patience(self, mine: set[Task]) -> float | None:
        """Seconds until a task that is under way may be given to an idle worker too, or something is to be said."""
        limit, now = self._limit(), self.transport.now()
        if self._none_ready is not None and not self._idle and not self._flying:
            if now - self._none_ready < _SLOW_START:
                return self._none_ready + _SLOW_START - now
            self.note(f"no worker is ready after {_SLOW_START:g} s: models load, or Ray has nothing free for them")
            self._none_ready = None
        if not self._idle or limit == float("inf"):
            return None
        ends = [each.since + limit - now for each in self._alone(mine)]
        return max(0.0, min(ends)) if ends else None

    def _give(self, worker: Hashable, task: Task) -> None:
        told = self._told[worker]
        missing = [each for name, each in self._states.items() if told.get(name) != each.version]
        missing.sort(key=lambda each: each.version)
        told.update((each.method, each.version) for each in missing)
        del self._idle[worker]
        self._flying[worker] = _Flight(task, self.transport.now())
        self.counts["given out"] += 1
        self.transport.submit(worker, missing, task.method, task.arguments)

    def _heard(self, event: Event, work: Work, mine: set[Task]) -> None:
        worker = event.worker
        if worker not in self.homes:  # given up
            return
        flight = self._flying.pop(worker, None)
        waited = None if flight is None or flight.task not in mine else flight.task
        if event.kind == READY:
            self._starts[worker] = 0
            self._idle[worker] = None
            self._none_ready = None
        elif event.kind == LOST:
            self._lost(worker, event.value)
            if waited is not None:
                self._do_again(waited, mine, worker, event.value, lost=True)
        elif event.kind == FAILED and flight is None:
            kind = type(event.value) if isinstance(event.value, ThinsightError) else WorkerFailed
            raise kind(f"worker {worker} could not begin: {_words(event.value)}")
        else:
            self._idle[worker] = None
            if event.kind == FAILED:
                self._told[worker] = {}  # what of the states it took is not known
                if waited is not None:
                    self._do_again(waited, mine, worker, event.value)
            elif waited is not None and flight is not None:
                self._times.append(self.transport.now() - flight.since)
                mine.discard(waited)
                if waited in self._again:
                    self._again.remove(waited)
                self.counts["done"] += 1
                work.take(waited, event.value)

    def _lost(self, worker: Hashable, why: Any) -> None:
        self.counts["lost"] += 1
        self._idle.pop(worker, None)
        self._told[worker] = {}
        self._starts[worker] += 1
        if self._starts[worker] < _MOST_STARTS:
            self.note(f"worker {worker} is lost, another one begins in its place")
            self.transport.replace(worker)
            return
        self.note(f"worker {worker} was lost {_MOST_STARTS} times before it was ready, and is given up")
        self.homes.pop(worker)
        if not self.homes:
            raise WorkerFailed(f"no worker is left, and none gets ready: {_words(why)}")

    def _do_again(self, task: Task, mine: set[Task], worker: Hashable, why: Any, lost: bool = False) -> None:
        """Count what went wrong, and have it done anew, unless another worker is at it."""
        if lost:
            task.losses += 1
        else:
            task.failures.append(worker)
            self.counts["failed"] += 1
        if len(task.failures) >= _MOST_FAILURES or task.losses >= _MOST_LOSSES:
            mine.discard(task)
            how = f"took {task.losses} workers with it" if lost else f"failed on workers {_named(task.failures)}"
            if isinstance(why, ThinsightError):  # its kind says what to do
                raise type(why)(f"{task.what} {how}: {why}")
            raise WorkerFailed(f"{task.what} {how}: {_words(why)}; run it without workers to see where")
        if all(each.task is not task for each in self._flying.values()):
            self._again.append(task)


class _Single:
    """One call."""

    def __init__(self, task: Task) -> None:
        self._task: Task | None = task
        self.finished = False
        self.value: Any = None

    def next(self, worker: Hashable) -> Task | None:
        task, self._task = self._task, None
        return task

    def take(self, task: Task, value: Any) -> None:
        self.finished, self.value = True, value


def _words(why: Any) -> str:
    if isinstance(why, ThinsightError):
        return str(why)
    text = str(why).strip() or type(why).__name__
    return brief(f"{type(why).__name__}: {text}" if isinstance(why, Exception) else text)


def _named(workers: Sequence[Hashable]) -> str:
    return " and ".join(map(str, workers))


UNSENT = ("model", "processor", "progress", "reader", "examples")


class Channel:
    """A dispatcher for one of several evaluators that each worker has: what is told and asked is told and asked of that
    one. Stands for a `Dispatcher`."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.dispatcher, self.name = dispatcher, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dispatcher, name)

    def tell(self, method: str, *arguments: Any) -> None:
        """See `Dispatcher.tell`."""
        self.dispatcher.tell(f"{self.name}:{method}", *arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """See `Dispatcher.ask`."""
        return self.dispatcher.ask(f"{self.name}:{method}", *arguments)

    def run(self, work: Work) -> None:
        """See `Dispatcher.run`."""
        self.dispatcher.run(_Addressed(work, self.name))


class _Addressed:
    """Work for one of several evaluators."""

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._name = work, name

    @property
    def finished(self) -> bool:
        return self._work.finished

    def next(self, worker: Hashable) -> Task | None:
        task = self._work.next(worker)
        if task is not None:
            task.method = f"{self._name}:{task.method}"
        return task

    def take(self, task: Task, value: Any) -> None:
        self._work.take(task, value)


class Worker:
    """A worker's side, in its process: an evaluator that is asked by name, or several, each built when first asked.

    Args:
        make: builds the evaluator; or gives a function that builds it, by name.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        made = make()
        self._makers: dict[str, Callable[[], Any]] = made if isinstance(made, dict) else {"": lambda: made}
        self._members: dict[str, _Member] = {}

    def do(self, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> Any:
        """Take the states, then answer a call; ``method`` may be "evaluator:method"."""
        for each in states:
            self._find(each.method)(*each.arguments)
        return self._find(method)(*arguments)

    def _find(self, method: str) -> Any:
        name, _, method = method.rpartition(":")
        if name not in self._members:
            self._members[name] = _Member(self._makers[name]())
        return getattr(self._members[name], method)


class _Member:
    """One evaluator of a worker."""

    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator
        self._rankers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    def __call__(self, candidate: Any) -> Any:
        return self._evaluator(candidate)

    def thinsight_look(self, name: str, ranker: Any) -> tuple[str, Any]:
        """What kind of attribute a name is, and the value of one that can be sent."""
        if name in UNSENT:
            return "missing", None
        try:
            value = getattr(self._of(ranker), name)
        except AttributeError:
            return "missing", None
        return ("method", None) if callable(value) else ("value", value)

    def thinsight_ask(self, name: str, ranker: Any, arguments: tuple[Any, ...]) -> Any:
        """What a method gives."""
        return getattr(self._of(ranker), name)(*arguments)

    def _of(self, ranker: Any) -> Any:
        if ranker is None:
            return self._evaluator
        key = repr(ranker)
        if key not in self._rankers:
            self._rankers[key] = self._evaluator.with_ranker(ranker)
        return self._rankers[key]
