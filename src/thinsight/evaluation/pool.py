"""A pool of evaluators of one model on several devices, which scores several schedules at the same time.

Each evaluator has a thread of its own for as long as several schedules are scored; all else is asked of the first.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from ..errors import BadInput
from ..reduction import Reduction
from ..runtime.anatomy import unwrapped
from ..schedule import Schedule
from .base import SearchEvaluator, StandIn, as_evaluator
from .evaluator import Evaluator, Progress
from .examples import Example
from .result import Evaluation

T = TypeVar("T")

_SHOWN = 12  # characters of a fingerprint in a message


class EvaluatorPool(StandIn):
    """Several evaluators of the same weights and examples, one per device, that a search sees as one.

    Where a search can use several scores at once (`gsearch` with *bisect*), each evaluator scores a schedule
    of its own at the same time. Calls, samples and whatever else is asked for go to the first evaluator, whose
    batch size holds for all. Every evaluator runs the full model once, all at the same time, when the full score
    is first asked for; each has caches of its own, so that main memory must hold as many. The devices should be of
    one kind: on others the same weights may give another answer where two are nearly as likely.

    Args:
        evaluators: thinsight.Evaluator objects, each with a model and a processor of its own.

    Raises:
        ThinsightError: there are none, two share a model or a processor, or their fingerprints (model,
            examples, metric, ranker and decoding rules) differ.
    """

    def __init__(self, evaluators: Sequence[Any]) -> None:
        self._members = tuple(as_evaluator(each) for each in evaluators)
        _check(self._members)
        super().__init__(self._members[0])

    @classmethod
    def on_devices(
        cls,
        devices: Sequence[Any],
        model: Any,
        processor: Any,
        examples: Sequence[Example],
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> EvaluatorPool:
        """A pool on copies of a model, one on each device. Copies are made where the model is now and then moved:
        load it on the CPU. The model itself is moved to the first device.

        Args:
            devices: names or torch devices, such as ``["cuda:0", "cuda:1"]``.
            model: as for `thinsight.Evaluator`, on one device; likewise all else.
            progress: told what the first evaluator does.

        Raises:
            ThinsightError: no devices, a model that ``device_map`` has spread over several, or as for
                `thinsight.Evaluator`.
        """
        if isinstance(devices, str) or len(devices) == 0:
            raise BadInput(f"devices is {devices!r}; give a list of them, such as ['cuda:0', 'cuda:1']")
        model = unwrapped(model)
        spread = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
        if len(spread) > 1:
            raise BadInput(
                f"the model is spread over {', '.join(spread)}, and copies of it need a device each: load it "
                "without device_map"
            )
        copies = [(copy.deepcopy(model).to(each), copy.deepcopy(processor)) for each in devices[1:]]
        first = Evaluator(model.to(devices[0]), processor, examples, progress=progress, **options)
        return cls([first, *(Evaluator(*each, examples, **options) for each in copies)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._members)} x {self._members[0]!r})"

    @property
    def at_once(self) -> int:  # type: ignore[override]
        """How many schedules are scored at the same time: the number of evaluators."""
        return len(self._members)

    @cached_property
    def full_score(self) -> float:
        """The full model's score; all evaluators compute it at the same time when it is first asked for.

        Raises:
            ThinsightError: they do not agree in it, or in the batch size with which it fits into memory.
        """
        first, *others = self._members
        for each in others:
            each.fix_batch_size(first.batch_size)
        scores: dict[int, float] = {}
        self._all_at_once([lambda member: float(member.full_score)] * len(self._members), scores.__setitem__)
        for place, each in enumerate(others, start=1):
            _same(place, "full_score", scores[place], scores[0], "use devices of one kind and one dtype")
            remedy = "build all of them with the smaller one, which fits"
            _same(place, "batch_size", each.batch_size, first.batch_size, remedy)
        return scores[0]

    def several(
        self,
        candidates: Sequence[Schedule | Reduction],
        floor: float | None,
        done: Callable[[int, Evaluation], object],
        **early: Any,
    ) -> None:
        """Score several candidates at the same time, the first one on the first evaluator and so on; as many
        as there are evaluators, then the next ones.

        Where an evaluation fails, those beside it finish and are handed over before its error is raised. An
        interrupt (Ctrl-C) ends them after their current batch. No thread is left running. Arguments as for
        `SearchEvaluator.several`.
        """

        def score(member: SearchEvaluator, candidate: Schedule | Reduction) -> Evaluation:
            return member(candidate) if floor is None else member.at_least(candidate, floor, **early)

        _ = self.full_score  # all of them need the full model's answers, and must agree in them
        for start in range(0, len(candidates), self.at_once):
            part = candidates[start : start + self.at_once]
            work = [partial(score, candidate=each) for each in part]
            self._all_at_once(work, done, start)

    def share(self, schedule: Schedule, layer: int) -> None:
        """Tell all evaluators what the candidates to come share, see `Evaluator.share`."""
        for each in self._members:
            each.share(schedule, layer)

    def fix_batch_size(self, size: int | None = None) -> int | None:
        """The batch size of all evaluators for good, see `Evaluator.fix_batch_size`."""
        if size is None:
            _ = self.full_score
        else:
            for each in self._members:
                each.fix_batch_size(size)
        return self._members[0].batch_size

    def with_ranker(self, ranker: Any) -> EvaluatorPool:
        """This pool with another ranker for bare schedules; what was computed is shared."""
        other = copy.copy(self)
        other._members = tuple(each.with_ranker(ranker) for each in self._members)
        other.inner = other._members[0]
        return other

    def _all_at_once(
        self, work: Sequence[Callable[[Any], T]], done: Callable[[int, T], object], first: int = 0
    ) -> None:
        """Let each evaluator do one thing in a thread of its own, and hand over what comes of it at once, as
        ``done(place, result)``; places begin at ``first``."""
        stop = threading.Event()
        members = self._members[: len(work)]
        futures: dict[Future[T], int] = {}
        failed: dict[int, BaseException] = {}
        with _stoppable(members, stop), ThreadPoolExecutor(len(work), "thinsight") as threads:
            try:
                for place, (member, each) in enumerate(zip(members, work, strict=True), start=first):
                    futures[threads.submit(_on_its_device, member, each)] = place
                for future in as_completed(list(futures)):
                    place, failure = futures.pop(future), future.exception()
                    if failure is None:
                        done(place, future.result())
                    else:
                        failed[place] = failure
                        if not isinstance(failure, Exception):
                            stop.set()
            except BaseException as error:
                stop.set()
                wait(futures)
                if isinstance(error, KeyboardInterrupt):  # what finished meanwhile is not lost
                    for future, place in futures.items():
                        if future.exception() is None:
                            done(place, future.result())
                raise
        if failed:  # of several one is told: an interrupt, else an error, else what was stopped for it
            told = {i: (isinstance(each, Exception), isinstance(each, _Stopped), i) for i, each in failed.items()}
            raise failed[min(failed, key=told.__getitem__)]


class _Stopped(Exception):
    """What ends an evaluation that nobody waits for any more."""


@contextmanager
def _stoppable(members: Sequence[Any], stop: threading.Event) -> Iterator[None]:
    """Meanwhile, evaluators that tell their progress end at their next batch once ``stop`` is set, and tell
    it one at a time."""
    telling = threading.Lock()
    ours = [(each, each.progress) for each in members]

    def tell(progress: Progress | None, what: str, done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        if progress is not None:
            with telling:
                progress(what, done, total)

    try:
        for member, progress in ours:
            member.progress = partial(tell, progress)
        yield
    finally:
        for member, progress in ours:
            member.progress = progress


def _on_its_device(member: Any, work: Callable[[Any], T]) -> T:
    """What comes of the work in this thread, with the evaluator's GPU as the current one, for kernels that
    ask which it is."""
    on_gpu = member.model is not None and member.model.device.type == "cuda"
    with torch.cuda.device(member.model.device) if on_gpu else nullcontext():
        return work(member)


def _check(members: Sequence[Any]) -> None:
    """Refuse evaluators that cannot run at the same time, or not in place of each other."""
    if not members:
        raise BadInput("evaluators is empty; give one for each device")
    for place, each in enumerate(members[1:], start=1):
        for earlier, other in enumerate(members[:place]):
            if each is other or (each.model is not None and each.model is other.model):
                raise BadInput(
                    f"evaluators[{place}].model is that of evaluators[{earlier}] too, and a model runs one schedule "
                    "at a time: give each a model of its own, such as copy.deepcopy(model).to(device)"
                )
            if each.processor is not None and each.processor is other.processor:
                raise BadInput(
                    f"evaluators[{place}].processor is that of evaluators[{earlier}] too, and a tokenizer serves one "
                    "thread at a time: give each a processor of its own, such as copy.deepcopy(processor)"
                )
        for name in ("num_layers", "num_vision_tokens", "fingerprint"):
            remedy = "build all of them on the same weights, examples, metric and ranker"
            _same(place, name, getattr(each, name), getattr(members[0], name), remedy)


def _same(place: int, name: str, found: Any, expected: Any, remedy: str) -> None:
    if found != expected:
        here, first = (each[:_SHOWN] if isinstance(each, str) else each for each in (found, expected))
        raise BadInput(f"evaluators[{place}].{name} is {here!r}, that of evaluators[0] is {first!r}: {remedy}")
