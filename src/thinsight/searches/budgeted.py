"""What all searches under a budget share: trials, how they are compared, and the result.

Knows nothing about how candidates are proposed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

from ..adaptive import Adaptive
from ..budget import Budget, KeepBudget, check_budget_value, make_budget
from ..errors import BadInput, Unreachable
from ..progress import Progress, SearchObserver, SearchPlan, Silent
from ..reduction import Reduction
from ..schedule import Schedule
from .result import SearchResult, Trial
from .shapes import first_layer_for
from .study import SearchEvaluator, Study, share_prefix


def merit(trial: Trial) -> tuple[float, float]:
    """What decides between two trials on the same examples: the score, then the agreement with the full
    model."""
    return trial.score, -math.inf if trial.agreement is None else trial.agreement


def earliest_layer(evaluator: SearchEvaluator) -> int:
    """The first layer at which the evaluator's ranker can rank; 1 where it does not say, as by attention."""
    return int(getattr(evaluator, "first_layer", 1))


def first_layers(
    evaluator: SearchEvaluator, budget: Budget, rankers: Sequence[dict[str, Any]], first_layer: int | None = None
) -> list[tuple[dict[str, Any] | None, int]]:
    """The rankers that can reach the budget, each with the first layer that is to get fewer tokens.

    No rankers: the evaluator's own, as None. A wanted ``first_layer`` holds for all.

    Raises:
        ThinsightError: none can reach it.
    """
    earliest_of = getattr(evaluator, "first_layer_of", lambda _: earliest_layer(evaluator))
    found: list[tuple[dict[str, Any] | None, int]] = []
    reason: Unreachable | None = None
    options: list[dict[str, Any] | None] = [*rankers] or [None]
    for ranker in options:
        earliest = earliest_layer(evaluator) if ranker is None else earliest_of(ranker)
        try:
            found.append((ranker, first_layer_for(budget, earliest, first_layer)))
        except Unreachable as error:
            reason = error
    if not found:
        assert reason is not None
        raise reason
    return found


class BudgetedRun:
    """Trials of one search, its journal and its result.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`.
        budget: for the evaluator's layers and tokens, see `budget_of`.
        settings: what defines the search, JSON values, its "method" and "seed" among them.
        expected: evaluations in all, for progress.
        study: journal file, or None; or an open study.
        resume: continue that journal.
        observer: told what happens.

    Raises:
        ThinsightError: a journal that cannot be used.
    """

    def __init__(
        self,
        evaluator: SearchEvaluator,
        budget: Budget,
        settings: dict[str, Any],
        *,
        expected: float,
        study: str | os.PathLike[str] | Study | None,
        resume: bool = False,
        observer: SearchObserver | None = None,
    ) -> None:
        self.evaluator, self.budget = evaluator, budget
        self.settings = {**settings, "budget": budget.to_dict()}
        if isinstance(study, Study):
            self.study = study
        else:
            self.study = Study(evaluator, self.settings, study, resume=resume)
        if settings["first_layer"]:
            share_prefix(evaluator, Schedule.full(budget.num_layers), settings["first_layer"])
        self.observer = observer or Silent()
        self.expected = expected
        self.trials: list[Trial] = []
        self.known: dict[tuple[Any, ...], Trial] = {}
        self.observer.on_start(
            SearchPlan(
                method=settings["method"],
                num_layers=int(evaluator.num_layers),
                first_layer=settings["first_layer"],
                num_vision_tokens=int(evaluator.num_vision_tokens),
                full_score=self.study.full_score,
                max_drop=None,
                recorded=self.study.recorded,
                expected=math.ceil(expected),
            )
        )

    @property
    def evaluations(self) -> float:
        """Evaluations so far; one on a sample counts as its share."""
        return math.fsum(trial.share for trial in self.trials)

    def run(
        self,
        schedule: Schedule,
        why: str,
        *,
        share: float = 1.0,
        ranker: Mapping[str, Any] | None = None,
        floor: float | None = None,
    ) -> Trial:
        """Evaluate a candidate, or give back what is known of it; it must hold the budget.

        With a ``floor`` the evaluation may end as soon as the score is sure to stay below it.
        """
        if not self.budget.holds(schedule):
            raise BadInput(f"a candidate ({why}) costs {self.budget.spent(schedule)} of {self.budget.limit}")
        return self.measure(schedule, why, share=share, ranker=ranker, floor=floor)

    def measure(
        self,
        schedule: Schedule,
        why: str,
        *,
        share: float = 1.0,
        ranker: Mapping[str, Any] | None = None,
        floor: float | None = None,
        adaptive: Adaptive | None = None,
    ) -> Trial:
        """Likewise, for a schedule that is no candidate and may cost anything, or an adaptive reduction's
        mean."""
        key = (schedule, repr(ranker), share, adaptive)
        if key not in self.known:
            self.known[key] = self._evaluate(schedule, why, share, ranker, floor, adaptive)
        return self.known[key]

    def count(self, trial: Trial, why: str) -> None:
        """Count another pass over what ``trial`` ran."""
        self.trials.append(replace(trial, why=why, seconds=0.0))

    def _evaluate(
        self,
        schedule: Schedule,
        why: str,
        share: float,
        ranker: Mapping[str, Any] | None,
        floor: float | None,
        adaptive: Adaptive | None,
    ) -> Trial:
        record = self.study.evaluate(schedule, floor, ranker=ranker, share=share, adaptive=adaptive)
        trial = Trial(
            layer=None,
            keep_rate=schedule.mean_keep_rate,
            count=sum(schedule.counts(self.budget.n_vision)),
            score=record.score,
            complete=record.complete,
            accepted=record.complete,
            schedule=schedule,
            cost=record.cost,
            seconds=record.seconds,
            agreement=record.agreement,
            share=record.share,
            ranker=ranker,
            why=why,
            adaptive=adaptive,
        )
        self.trials.append(trial)
        done = Progress(
            layer=None,
            evaluations=len(self.trials),
            expected=max(len(self.trials), math.ceil(len(self.trials) * self._left)),
            seconds=math.fsum(trial.seconds for trial in self.trials),
        )
        self.observer.on_trial(trial, done)
        return trial

    @property
    def _left(self) -> float:
        """How many times what was done there is to do in all."""
        return self.expected / max(self.evaluations, 1e-9)

    def finish(self, best: Trial) -> SearchResult:
        """The result whose schedule is ``best``'s, which was run on all examples."""
        share_prefix(self.evaluator, best.schedule, 0)
        costs = [trial.cost for trial in self.trials]
        known = [cost for cost in costs if cost is not None]
        cost = math.fsum(known) if len(known) == len(costs) else None
        full = getattr(self.evaluator, "full_cost", None)
        result = SearchResult(
            schedule=best.schedule,
            reduction=self._reduction(best),
            trials=tuple(self.trials),
            method=self.settings["method"],
            max_drop=None,
            full_score=self.study.full_score,
            score=best.score,
            seed=self.settings["seed"],
            cost=cost,
            seconds=math.fsum(trial.seconds for trial in self.trials),
            budget=self.budget.to_dict(),
            spent=self._spent(best),
            full_forwards=None if cost is None or not full else cost / full,
            agreement=best.agreement,
        )
        self.observer.on_end(result)
        return result

    def _reduction(self, best: Trial) -> Reduction:
        bound = getattr(self.evaluator, "reduction", Reduction)(best.schedule)
        record = {
            **self.settings,
            "evaluations": round(self.evaluations, 6),
            "num_vision_tokens": int(self.evaluator.num_vision_tokens),
            "full_score": self.study.full_score,
            "score": best.score,
            "spent": self._spent(best),
            "calibration": getattr(self.evaluator, "fingerprint", None),
        }
        return replace(bound, search=record, ranker=best.ranker or bound.ranker, adaptive=best.adaptive)

    def _spent(self, trial: Trial) -> float:
        """What the average prompt costs."""
        if trial.adaptive is None:
            return self.budget.spent(trial.schedule)
        return trial.adaptive.average(self.budget.spent)


def budget_of(evaluator: SearchEvaluator, budget: Budget | float, unit: str = "keep") -> Budget:
    """A budget that fits an evaluator: the one that is given, or one of so much for its median prompt.

    Args:
        evaluator: whose prompts are counted.
        budget: a budget, or a number, see `thinsight.budget.make_budget`.
        unit: of a number. "flops" and "ms" take a `thinsight.Evaluator`; for "ms" its device is profiled now.

    Raises:
        ThinsightError: no evaluator, an unknown unit, a value out of range, or a budget for another model.
    """
    for name in ("num_layers", "num_vision_tokens", "__call__"):
        if not hasattr(evaluator, name):
            raise BadInput(f"evaluator has no {name}; pass a thinsight.Evaluator or an object like it")
    if not isinstance(budget, Budget):
        return _counted(evaluator, budget, unit)
    if unit not in ("keep", budget.unit):
        raise BadInput(f"budget_unit is {unit!r} but the budget is in {budget.unit}; leave budget_unit out")
    for name, ours, theirs in (
        ("layers", budget.num_layers, int(evaluator.num_layers)),
        ("vision tokens", budget.n_vision, int(evaluator.num_vision_tokens)),
    ):
        if ours != theirs:
            raise BadInput(f"the budget is for {ours} {name} but the evaluator has {theirs}")
    return budget


def _counted(evaluator: Any, value: float, unit: str) -> Budget:
    """A number as a budget."""
    check_budget_value(value, unit)
    layers, n_vision = int(evaluator.num_layers), int(evaluator.num_vision_tokens)
    if unit == "keep":
        return KeepBudget(layers, n_vision, float(value))
    if not hasattr(evaluator, "prompt_sizes"):
        raise BadInput(
            f"budget_unit is {unit!r}, which takes a thinsight.Evaluator; give this evaluator a budget of "
            "thinsight.budget"
        )
    latency = None
    if unit == "ms":
        from ..evaluation.prompts import typical_batch
        from ..timing import profile

        batch = typical_batch(evaluator.processor, evaluator.examples, evaluator.batch_size)
        latency = profile(evaluator.model, batch)
    return make_budget(
        float(value),
        unit,
        config=evaluator.model.config,
        n_vision=n_vision,
        n_text=median_low(n_text for _, n_text in evaluator.prompt_sizes),
        latency=latency,
    )


def check_count(value: Any, field: str, minimum: int) -> None:
    """Refuse what is no whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BadInput(f"{field} is {value!r}; it must be a whole number of at least {minimum}")
