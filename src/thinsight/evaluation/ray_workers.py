"""Workers on Ray: an actor each, with an evaluator of its own that stays loaded. Ray is loaded when they are begun.

Calls, candidates and scores go through the driver, and so do the full model's answers (token ids); weights and pixels
never do: each worker opens the files that it is told of.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from types import FrameType
from typing import Any

from ..errors import BadInput, MissingPackage, StorageError, Unsupported, whole
from ..texts import brief
from .dispatch import DONE, FAILED, LOST, READY, Event, State, Worker

AUTO = "auto"
_QUIET = {"log_to_driver": False, "logging_level": "error"}
_KNOCK_SECONDS, _ANSWER_SECONDS = 5, 30
_TRY = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')"


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


def check_address(address: str | None) -> None:
    """Refuse an address at which no Ray cluster answers; None: that of ``RAY_ADDRESS``, if there is one.

    Ray itself goes on trying for minutes, and fills the terminal meanwhile: another process tries first.
    """
    where = _address_of(address)
    if where is None or import_ray().is_initialized():
        return
    if "://" in where:
        raise BadInput(f"ray is {where!r}: give auto or HOST:PORT, on a machine of the cluster or in a job of its own")
    why = _deaf(where) or _refused(where)
    if why:
        raise BadInput(f"ray is {where!r}, and no cluster answers there ({why}): see `ray status`")


def _address_of(address: str | None) -> str | None:
    """Where the cluster is; None: no cluster is asked for."""
    where = address or os.environ.get("RAY_ADDRESS") or None
    return None if where == "local" else where


def _deaf(where: str) -> str:
    """Why nothing can be reached there."""
    host, _, port = where.rpartition(":")
    if where == AUTO:
        return ""
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return "it is not HOST:PORT"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _refused(where: str) -> str:
    """Why what can be reached there lets nobody in."""
    command = [sys.executable, "-c", _TRY, where]
    try:
        tried = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"nothing is heard in {_ANSWER_SECONDS} s"
    if not tried.returncode:
        return ""
    if "authentication token" in tried.stderr.lower():
        return "its token is missing here or is another one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    return brief(tried.stderr.strip().rpartition("\n")[2] or f"exit code {tried.returncode}")


class RayTransport:
    """See `thinsight.evaluation.dispatch.Transport`.

    Where this process is not connected to Ray yet, it is when workers begin: to the cluster at ``address`` (or of
    ``RAY_ADDRESS``), or to a Ray that is started for it, which listens on this machine's loopback alone, with Ray's
    token authentication, and ends with the workers.

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

    def start(self) -> Sequence[Hashable]:
        """See `Transport`."""
        self._connect()
        resources = self._ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
        each = self._gpus if self._gpus is not None else float(gpus > 0)
        if each > gpus:
            raise Unsupported(f"gpus_per_worker is {each:g}, and Ray has {gpus:g} GPUs: give less, or another --ray")
        count = self._wanted
        if isinstance(count, str):
            nodes = sum(node["Alive"] for node in self._ray.nodes())
            count = max(1, int(gpus // each)) if each else nodes
        if each and count * each > gpus:
            raise Unsupported(
                f"workers is {count} with {each:g} GPUs each, and Ray has {gpus:g}: give at most {int(gpus // each)}"
            )
        if not _made.here and count > cpus:
            raise Unsupported(f"workers is {count} with a CPU each, and Ray has {cpus:g}: give at most {int(cpus)}")
        # without GPUs, workers are spread over machines, which they would otherwise fill one by one
        self._options = {"num_cpus": 0 if _made.here else 1, "num_gpus": each, "scheduling_strategy": "SPREAD"}
        if _made.here and "OMP_NUM_THREADS" not in os.environ:  # or Ray makes it 1
            threads = {"OMP_NUM_THREADS": str(max(1, int(cpus // count)))}
            self._options["runtime_env"] = {"env_vars": threads}
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
        last = _made.leave(self)
        if self._ray.is_initialized():
            for actor in self._actors.values():
                self._ray.kill(actor)
            if last:
                self._ray.shutdown()
        self._actors.clear()
        self._calls.clear()

    def _connect(self) -> None:
        ray, where = self._ray, _address_of(self._address)
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if self._address not in (None, AUTO) and here.rpartition(":")[2] != self._address.rpartition(":")[2]:
                raise BadInput(
                    f"address is {self._address!r}, and this process is connected to the Ray at {here} already"
                )
            _made.join(self)
            return
        if where is not None:
            check_address(where)
        with _signals_later():
            if where is None:
                with _loopback(ray):
                    ray.init(address="local", include_dashboard=False, **_QUIET)
            else:
                try:
                    ray.init(address=where, **_QUIET)
                except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                    raise BadInput(f"ray is {where!r}, and cannot be connected to ({brief(error)})") from None
            _made.begin(self, here=where is None)

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
            return Event(worker, LOST, _first_line(error))
        except errors.RayError as error:  # its object went with the machine that held it
            return Event(worker, LOST, _first_line(error))
        return Event(worker, READY if begins else DONE, value)


class _Made:
    """The connection to Ray that this process has from here, not from its user: the last who uses it ends it."""

    def __init__(self) -> None:
        self._users: set[RayTransport] = set()
        self.here = False  # to a Ray on this machine that was started for it, and that nobody else uses

    def begin(self, user: RayTransport, here: bool) -> None:
        self._users, self.here = {user}, here

    def join(self, user: RayTransport) -> None:
        if self._users:
            self._users.add(user)

    def leave(self, user: RayTransport) -> bool:
        """Whether that was the last one."""
        was = user in self._users
        self._users.discard(user)
        self.here = self.here and bool(self._users)
        return was and not self._users


_made = _Made()


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._worker: Any = None

    def ready(self) -> None:
        """Answered once the evaluator is built."""
        try:
            self._worker = Worker(self._make)
        except (BadInput, MissingPackage, StorageError, Unsupported) as error:
            raise type(error)(f"{error} (on {socket.gethostname()})") from None

    def do(self, states: Sequence[State], method: str, arguments: tuple[Any, ...]) -> Any:
        """One call, see `Worker.do`."""
        told = [replace(each, arguments=_fetched(each.arguments)) for each in states]
        return self._worker.do(told, method, arguments)


@contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """A Ray that is started meanwhile listens on the loopback alone, as it does on Windows and macOS by itself; else on
    every interface."""
    constants, name = ray._private.ray_constants, "ENABLE_RAY_CLUSTER"
    before = getattr(constants, name)
    setattr(constants, name, False)
    try:
        yield
    finally:
        setattr(constants, name, before)


@contextmanager
def _signals_later() -> Iterator[None]:
    """What a signal does is done afterwards, for Ray crashes where it is begun by half; a second signal's at once. Who
    has said what SIGTERM does keeps that, in whose place Ray puts an answer of its own."""
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def later(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():  # which alone may say
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, later)
    try:
        yield
    finally:
        for changed, handler in handlers.items():
            signal.signal(changed, handler)
    if came:
        handlers[came[0][0]](*came[0])


def _fetched(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With values in place of what stands for them."""
    ray = import_ray()
    return tuple(ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in arguments)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
