"""Workers on Ray: an actor each, with an evaluator of its own that stays loaded. Ray is loaded when they are begun.

Calls, candidates and scores go through the driver, and so do the full model's answers (token ids); weights and pixels
never do: each worker opens the files that it is told of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from ..errors import BadInput, MissingPackage, Unsupported, whole
from .dispatch import DONE, FAILED, LOST, READY, Event, State, Worker

AUTO = "auto"


def check_workers(workers: Any, gpus_per_worker: Any = None) -> None:
    """Refuse a number of workers, or of GPUs for each, that is none."""
    if workers != AUTO:
        if isinstance(workers, str):
            raise BadInput(f"workers is {workers!r}: it must be a whole number of at least 1, or 'auto'")
        whole(workers, "workers")
    number = isinstance(gpus_per_worker, (int, float)) and not isinstance(gpus_per_worker, bool)
    if gpus_per_worker is not None and (not number or not 0 <= gpus_per_worker < 1024):
        raise BadInput(f"gpus_per_worker is {gpus_per_worker!r}: it must be a number of at least 0")
    if number and gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
        raise BadInput(f"gpus_per_worker is {gpus_per_worker!r}: above 1 it must be a whole number")


def import_ray() -> Any:
    """Ray.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingPackage("workers run on Ray, which is not installed: pip install 'thinsight[ray]'") from None
    return ray


class RayTransport:
    """See `thinsight.evaluation.dispatch.Transport`.

    Where this process is not connected to Ray yet, it is now: to the cluster at ``address`` (or of ``RAY_ADDRESS``), or
    to a Ray that is started on this machine for it, with Ray's token authentication, and ended with the workers.

    Args:
        make: builds a worker's evaluator, in the worker.
        workers, address, gpus_per_worker: see `thinsight.Pool`.

    Raises:
        ThinsightError: Ray is not installed, or a bad argument.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        workers: int | str = AUTO,
        *,
        address: str | None = None,
        gpus_per_worker: float | None = None,
    ) -> None:
        check_workers(workers, gpus_per_worker)
        self._ray = import_ray()
        self._make, self._wanted, self._address, self._gpus = make, workers, address, gpus_per_worker
        self._actors: dict[Hashable, Any] = {}
        self._calls: dict[Any, tuple[Hashable, bool]] = {}  # by reference: the worker, and whether it begins
        self._options: dict[str, Any] = {}
        self._ours = False  # the Ray on this machine was started here

    def start(self) -> Sequence[Hashable]:
        """See `Transport`."""
        self._connect()
        resources = self._ray.cluster_resources()
        gpus, nodes = resources.get("GPU", 0.0), len([each for each in self._ray.nodes() if each["Alive"]])
        each = self._gpus if self._gpus is not None else float(gpus > 0)
        if each > gpus:
            raise Unsupported(f"gpus_per_worker is {each:g}, and Ray has {gpus:g} GPUs: give less, or another --ray")
        count = self._wanted
        if isinstance(count, str):
            count = max(1, int(gpus // each)) if each else nodes
        if each and count * each > gpus:
            raise Unsupported(
                f"workers is {count} with {each:g} GPUs each, and Ray has {gpus:g}: give at most {int(gpus // each)}"
            )
        # without GPUs, workers are spread over machines, which they would otherwise fill one by one
        self._options = {"num_cpus": 0 if self._ours else 1, "num_gpus": each, "scheduling_strategy": "SPREAD"}
        names = list(range(1, count + 1))
        for name in names:
            self._begin(name)
        return names

    def submit(self, worker: Hashable, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> None:
        """See `Transport`."""
        self._calls[self._actors[worker].do.remote(list(states), method, arguments)] = (worker, False)

    def wait(self, seconds: float | None) -> Sequence[Event]:
        """See `Transport`."""
        references = list(self._calls)
        ready, _ = self._ray.wait(references, num_returns=1, timeout=seconds)
        if ready:  # and whatever else is there
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [self._event(each, *self._calls.pop(each)) for each in ready]

    def replace(self, worker: Hashable) -> None:
        """See `Transport`."""
        self._begin(worker)

    def put(self, value: Any) -> Any:
        """See `Transport`."""
        return self._ray.put(value)

    def now(self) -> float:
        """See `Transport`."""
        return monotonic()

    def stop(self) -> None:
        """See `Transport`."""
        if self._ray.is_initialized():
            for actor in self._actors.values():
                self._ray.kill(actor)
            if self._ours:
                self._ray.shutdown()
        self._actors.clear()
        self._calls.clear()
        self._ours = False

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": "warning"}
        if self._address is not None or os.environ.get("RAY_ADDRESS"):
            try:
                self._ray.init(address=self._address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = self._address or os.environ["RAY_ADDRESS"]
                raise BadInput(f"ray is {where!r}, and no cluster answers there ({error}): see `ray status`") from None
            return
        self._ray.init(include_dashboard=False, **quiet)
        self._ours = True

    def _begin(self, worker: Hashable) -> None:
        actor = self._ray.remote(_Actor).options(**self._options).remote(self._make)
        self._actors[worker] = actor
        self._calls[actor.ready.remote()] = (worker, True)

    def _event(self, reference: Any, worker: Hashable, begins: bool) -> Event:
        errors = self._ray.exceptions
        try:
            value = self._ray.get(reference)
        except errors.RayTaskError as error:
            return Event(worker, FAILED, error.cause if isinstance(error.cause, Exception) else error)
        except errors.RayActorError as error:
            if begins and "creation task" in str(error):  # not lost: it would fail so again
                return Event(worker, FAILED, str(error).strip().rpartition("\n")[2])
            return Event(worker, LOST, _first_line(error))
        except errors.RayError as error:  # its object went with the machine that held it
            return Event(worker, LOST, _first_line(error))
        return Event(worker, READY if begins else DONE, value)


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._worker = Worker(make)

    def ready(self) -> None:
        """Answered once the evaluator is built."""

    def do(self, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> Any:
        """One call, see `Worker.do`."""
        told = [replace(each, arguments=_fetched(each.arguments)) for each in states]
        return self._worker.do(told, method, arguments)


def _fetched(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With values in place of what stands for them."""
    ray = import_ray()
    return tuple(ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in arguments)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
