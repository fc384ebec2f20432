"""SearchEvaluator: all that a search sees of a model and its data. No torch in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ..budget import Budget, KeepBudget, check_budget_value
from ..errors import BadInput
from ..reduction import Reduction
from ..schedule import Schedule
from .result import Evaluation


class SearchEvaluator:
    """Schedules in, scores out. Subclass it: ``num_layers``, ``num_vision_tokens`` and ``__call__`` are needed.

    All else has a default, and says here what a search makes of it. A candidate is a `Schedule`, which means
    that the evaluator's own ranker is used, or a `Reduction`, where the search chooses the ranker too.
    An object that does not subclass it serves as well, see `as_evaluator`.

    Attributes:
        num_layers: L, the number of decoder layers.
        num_vision_tokens: the reference N in which a search counts tokens.
        examples: what is scored, in the order of `Evaluation.per_example`; empty where there are none to show.
        at_once: how many candidates `several` is best asked for.
        workers: how many work at the same time. Where more than one does, a search asks `several` early for all that it
            is sure to want, with a ``share`` of the examples or a ``floor`` by place.
        samples: whether `sample` runs fewer examples than a call.
        first_layer: the first layer at which the evaluator's ranker can rank.
        full_cost: of one full evaluation, in the unit of `Evaluation.cost`; None where that is not known.
        score_range: the least and the highest score that there can be, beyond which a journal's are damaged.
        fingerprint: names model, data, metric and ranker; a journal of another one is refused.
        metric_names: the metrics that scores are of, for a certificate to name; empty where that is not known.
        doubt: why the full score is too low to search with, in a sentence; empty where it is not.
        model, processor, batch_size: what a pool of evaluators keeps apart or alike; None where there is none.
        progress: called as ``progress(what, done, total)`` by one that can be stopped there.
    """

    num_layers: int
    num_vision_tokens: int
    examples: Sequence[Any] = ()
    at_once: int = 1
    workers: int = 1
    samples: bool = False
    first_layer: int = 1
    full_cost: float | None = None
    score_range: tuple[float, float] = (-math.inf, math.inf)
    fingerprint: str | None = None
    metric_names: str = ""
    doubt: str = ""
    model: Any = None
    processor: Any = None
    batch_size: int | None = None
    progress: Callable[[str, int, int], None] | None = None

    @cached_property
    def full(self) -> Evaluation:
        """The full model's evaluation."""
        return self(Schedule.full(self.num_layers))

    @cached_property
    def full_score(self) -> float:
        """The full model's score on the same examples. A search refuses 0: nothing could be lost."""
        return self.full.score

    def __call__(self, candidate: Any, /) -> Evaluation:
        """The score of the model under a candidate."""
        raise NotImplementedError

    def at_least(self, candidate: Any, /, floor: float, confidence: float | None = None, seed: int = 0) -> Evaluation:
        """Likewise, but may stop as soon as the score provably cannot reach ``floor``; with ``confidence``, as
        soon as it does not with that confidence, examples drawn by ``seed``. Here: never."""
        return self(candidate)

    def sample(self, candidate: Any, /, share: float) -> Evaluation:
        """The score on about that share of the examples, the same ones every time. Here: on all."""
        return self(candidate)

    def several(
        self, candidates: Sequence[Any], floor: float | None, done: Callable[[int, Evaluation], object], **early: Any
    ) -> None:
        """Score several, each as ``at_least(candidate, floor, **early)`` does, or as a call where ``floor`` is
        None. Here: one after the other.

        ``done(place, evaluation)`` is called in the calling thread as soon as one is finished, in any order.
        Where one fails or the calling thread is interrupted, it is called of all that did finish, nothing is
        left running, and the error goes on.
        """
        for place, each in enumerate(candidates):
            done(place, self(each) if floor is None else self.at_least(each, floor, **early))

    def fix_batch_size(self, size: int | None = None) -> int | None:
        """The batch size for good, ``size`` if that is given. Here: there is none."""
        return self.batch_size

    def share(self, schedule: Schedule, layer: int) -> None:
        """Told from which layer on the candidates to come differ from a schedule; 0 when there are none."""

    def reduction(self, schedule: Schedule) -> Reduction:
        """The schedule bound to the evaluator's ranker and model family."""
        return Reduction(schedule)

    def bind(self, candidate: Schedule | Reduction) -> Reduction:
        """A candidate as a reduction."""
        return candidate if isinstance(candidate, Reduction) else self.reduction(candidate)

    def cost(self, candidate: Schedule | Reduction) -> float:
        """What a prefill costs under a candidate, as a share of the full model's. Here: its mean keep rate."""
        return self.bind(candidate).average(lambda schedule: schedule.mean_keep_rate)

    def budget(self, value: float, unit: str = "keep") -> Budget:
        """A budget of ``value`` for the median prompt, see `thinsight.budget.make_budget`.

        Raises:
            ThinsightError: an unknown unit, a value out of range, or a unit that takes a model.
        """
        check_budget_value(value, unit)
        if unit != "keep":
            raise BadInput(
                f"budget_unit is {unit!r}, which takes a thinsight.Evaluator; give this evaluator a budget of "
                "thinsight.budget"
            )
        return KeepBudget(int(self.num_layers), int(self.num_vision_tokens), float(value))

    def first_layer_of(self, ranker: Any) -> int:
        """The first layer at which another ranker can rank."""
        return self.first_layer

    def with_ranker(self, ranker: Any) -> SearchEvaluator:
        """This evaluator with another ranker for bare schedules."""
        raise BadInput(f"ranker is {ranker!r}, but this evaluator cannot change its own; pass a thinsight.Evaluator")

    def can_rank(self, ranker: Any) -> bool:
        """Whether the model has what a ranker reads."""
        return True


class _PassedOn:
    """A name that is asked of another object. What that lacks, or has from `SearchEvaluator`, is the stand-in's own
    default, which builds on the stand-in's other methods."""

    def __init__(self, name: str) -> None:
        self.name, self.default = name, vars(SearchEvaluator).get(name)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        inner = instance.inner
        if not isinstance(inner, SearchEvaluator) or self._is_its_own(inner):
            try:
                return getattr(inner, self.name)
            except AttributeError:
                pass
        return getattr(super(StandIn, instance), self.name)

    def _is_its_own(self, inner: SearchEvaluator) -> bool:
        return self.name in vars(inner) or getattr(type(inner), self.name, None) is not self.default


class StandIn(SearchEvaluator):
    """An evaluator that stands for another object: whatever its own class does not define is asked of that."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, candidate: Any, /) -> Evaluation:
        evaluation: Evaluation = self.inner(candidate)
        return evaluation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":  # as `copy` asks before there is one
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)


for _name in [*SearchEvaluator.__annotations__, *vars(SearchEvaluator)]:
    if not _name.startswith("_"):
        setattr(StandIn, _name, _PassedOn(_name))


def as_evaluator(given: Any) -> SearchEvaluator:
    """What a search was given, with a default for whatever it lacks.

    Raises:
        ThinsightError: it is no evaluator.
    """
    for name in ("num_layers", "num_vision_tokens", "__call__"):
        if not hasattr(given, name):
            raise BadInput(f"evaluator has no {name}; pass a thinsight.Evaluator, or subclass SearchEvaluator")
    if isinstance(given, SearchEvaluator):
        return given
    stand_in = StandIn(given)
    stand_in.samples = hasattr(given, "sample")
    return stand_in
