"""Workers on a clock that is not real: what a search would do on many machines, in seconds and always alike.

For tests of what is lost where workers fail, and for benchmarks/scale.py.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from thinsight.evaluation.dispatch import DONE, FAILED, LOST, READY, Event, State, Worker


class SimulatedTransport:
    """See `thinsight.evaluation.dispatch.Transport`; calls run in this process when the clock says that they end.

    Args:
        make: builds a worker's evaluator.
        workers: how many.
        seconds: what a call takes, by worker, method and arguments.
        starts: seconds until a worker is ready.
        kills: at which times a worker that is drawn is lost, whatever it does.
        seed: of these draws.

    Attributes:
        clock: seconds so far.
        calls: (worker, method, arguments) of all that was begun, in order.
        busy: seconds in which each worker did something.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        workers: int,
        seconds: Callable[[Hashable, str, tuple[Any, ...]], float] = lambda worker, method, arguments: 1.0,
        *,
        starts: float = 0.0,
        kills: Sequence[float] = (),
        seed: int = 0,
    ) -> None:
        self._make, self._names, self._seconds, self._starts = make, tuple(range(workers)), seconds, starts
        self._kills = sorted(kills)
        self._random = random.Random(seed)
        self._workers: dict[Hashable, Worker] = {}
        self._lives: Counter[Hashable] = Counter()  # which worker of a name it is
        self._events: list[tuple[float, int, Hashable, int, Callable[[], Event]]] = []
        self._begun: dict[Hashable, float] = {}
        self._number = 0
        self.clock = 0.0
        self.calls: list[tuple[Hashable, str, tuple[Any, ...]]] = []
        self.busy: dict[Hashable, float] = dict.fromkeys(self._names, 0.0)
        self.stopped = 0

    def start(self) -> Sequence[Hashable]:
        """See `Transport`."""
        for name in self._names:
            self.replace(name)
        return self._names

    def submit(self, worker: Hashable, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> None:
        """See `Transport`."""
        self.calls.append((worker, method, arguments))
        self._begun[worker] = self.clock
        ours = self._workers[worker]

        def end() -> Event:
            self.busy[worker] += self.clock - self._begun.pop(worker)
            try:
                return Event(worker, DONE, ours.do(states, method, arguments))
            except Exception as error:
                return Event(worker, FAILED, error)

        self._at(self.clock + self._seconds(worker, method, arguments), worker, end)

    def wait(self, seconds: float | None) -> Sequence[Event]:
        """See `Transport`."""
        until = float("inf") if seconds is None else self.clock + seconds
        while True:
            upcoming = self._events[0][0] if self._events else float("inf")
            kill = self._kills[0] if self._kills else float("inf")
            if min(upcoming, kill) > until:
                self.clock = until
                return []
            if kill < upcoming:
                self.clock = max(self.clock, self._kills.pop(0))
                return [self._lose(self._random.choice(self._names))]
            if not self._events:
                raise RuntimeError("nothing is under way, and nothing will ever happen")
            self.clock, _, worker, life, end = heapq.heappop(self._events)
            if life == self._lives[worker]:
                return [end()]

    def replace(self, worker: Hashable) -> None:
        """See `Transport`."""
        self._workers[worker] = Worker(self._make)
        self._at(self.clock + self._starts, worker, lambda: Event(worker, READY))

    def put(self, value: Any) -> Any:
        """See `Transport`."""
        return value

    def now(self) -> float:
        """See `Transport`."""
        return self.clock

    def stop(self) -> None:
        """See `Transport`."""
        self.stopped += 1
        for name in self._names:
            self._lives[name] += 1
        self._events.clear()
        self._begun.clear()

    def _lose(self, worker: Hashable) -> Event:
        self._lives[worker] += 1
        if worker in self._begun:
            self.busy[worker] += self.clock - self._begun.pop(worker)
        return Event(worker, LOST, "killed")

    def _at(self, time: float, worker: Hashable, end: Callable[[], Event]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, worker, self._lives[worker], end))
