"""The frontier: one run, a family of schedules from cheap to full, from which a tolerance or a budget picks.

Knows nothing about models, nor how one point is searched (sensitivity.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .. import shown
from ..budget import Budget, check_budget_value
from ..errors import BadInput, Unreachable
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..schedule import Schedule
from .run import Run, SearchResult, budget_of, check_count
from .sensitivity import SensitivitySearch, exit_model
from .shapes import first_layer_for
from .study import Study

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Points of a frontier, as shares of the full cost; the full model itself is always one."""

LEAST_TRIALS = 4  # per point
_SLACK = 1e-9  # as in gsearch: a drop of exactly the tolerance is within it


@dataclass(frozen=True)
class Frontier(shown.Shown):
    """Points in the order of their cost, cheapest first; the full model is not among them.

    ``evaluations`` counts all that were spent, the sensitivities included.
    """

    points: tuple[SearchResult, ...]
    full_score: float
    evaluations: float

    def __repr__(self) -> str:
        ends = [self.points[0], self.points[-1]] if self.points else []
        range_ = " to ".join(f"{point.spent:.4g}" for point in ends if point.spent is not None)
        return f"Frontier({len(self.points)} points, cost {range_}, {self.evaluations:g} evaluations)"

    def _tables(self) -> Iterable[shown.Table]:
        columns = (
            shown.Column("mean keep rate", lambda point: shown.percent(point.schedule.mean_keep_rate)),
            shown.Column("spent", lambda point: shown.NOTHING if point.spent is None else f"{point.spent:.4g}"),
            shown.Column("calibration score", lambda point: shown.percent(point.score)),
            shown.Column("drop in points", lambda point: shown.points(point.drop)),
        )
        return [shown.Table("Points of the frontier, cheapest first", self.points, *columns)]

    def within(self, limit: float) -> SearchResult:
        """The best-scoring point that costs at most ``limit``, in the budgets' unit.

        Raises:
            ThinsightError: no point is that cheap.
        """
        fitting = [p for p in self.points if p.spent is not None and p.spent <= limit * (1 + _SLACK)]
        if not fitting:
            raise BadInput(f"the cheapest point costs {self.points[0].spent}, more than {limit}")
        return max(fitting, key=lambda p: (p.score, p.agreement or 0.0))

    def at_drop(self, max_drop: float) -> SearchResult | None:
        """The cheapest point whose calibration score falls by at most ``max_drop``; None: only the full
        model."""
        fitting = [p for p in self.points if p.drop <= max_drop + _SLACK]
        return min(fitting, key=lambda p: p.spent or 0.0) if fitting else None


def frontier(
    evaluator: SearchEvaluator,
    budgets: Sequence[Budget | float] | Budget | float = SHARES,
    *,
    budget_unit: str = "keep",
    n_trials: int = 4,
    seed: int = 0,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> Frontier:
    """One schedule per budget, the sensitivities measured once and each point starting from the last.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`.
        budgets: mean keep rates, or budgets of one unit; those that the ranker cannot reach are left out.
        budget_unit: of numbers, see `psigmoid`.
        n_trials: evaluations per point.
        seed: of everything random.
        study: journal file.
        resume: continue that journal.
        observer: told of each point as a search of its own.

    Raises:
        ThinsightError: bad arguments, budgets of several units, or none that can be reached.
    """
    check_count(n_trials, "n_trials", LEAST_TRIALS)
    check_count(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    wanted = _wanted(evaluator, budgets, budget_unit)
    if len({budget.unit for budget in wanted}) > 1:
        raise BadInput("budgets are of several units; give budgets of one unit")
    reachable = _reachable(evaluator, sorted(wanted, key=lambda budget: budget.limit))
    settings = {
        "method": "frontier",
        "n_trials": n_trials,
        "seed": seed,
        "budgets": [budget.to_dict() for budget, _ in reachable],
    }
    journal = Study(evaluator, settings, study, resume=resume)
    points: list[SearchResult] = []
    start: Schedule | None = None
    models = {}
    own = evaluator.reduction(Schedule.full(int(evaluator.num_layers))).ranker
    for budget, first in reachable:
        facts = {**settings, "first_layer": first, "budgets": None, "rankers": []}
        run = Run(evaluator, facts, budget=budget, expected=n_trials, study=journal, observer=observer)
        run.keep_all_before(first)
        if evaluator.samples and first not in models:
            models[first] = exit_model(run, first, own)
            run.expected += run.evaluations
        search = SensitivitySearch(run, [(own, first)], start, models.get(first), run.evaluations + n_trials)
        points.append(search.search())
        start = points[-1].schedule
    return Frontier(tuple(points), journal.full_score, sum(point.evaluations for point in points))


def _wanted(evaluator: SearchEvaluator, budgets: Sequence[Budget | float] | Budget | float, unit: str) -> list[Budget]:
    """All of them as budgets for the evaluator."""
    single = isinstance(budgets, (Budget, Real, str))
    given: list[Any] = [budgets] if single else list(budgets) if isinstance(budgets, Iterable) else []
    if not given:
        raise BadInput(f"budgets is {budgets!r}; give mean keep rates, such as [0.25, 0.5], or budgets")
    found: list[Budget] = []
    for budget in given:
        if unit == "ms" and found and not isinstance(budget, Budget):  # the device is profiled once
            check_budget_value(budget, unit)
            found.append(found[0].limited(float(budget)))
        else:
            found.append(budget_of(evaluator, budget, unit))
    return found


def _reachable(evaluator: SearchEvaluator, budgets: Sequence[Budget]) -> list[tuple[Budget, int]]:
    """Budgets with the first layer that each may reduce."""
    found, reason = [], None
    for budget in budgets:
        try:
            found.append((budget, first_layer_for(budget, evaluator.first_layer)))
        except Unreachable as error:
            reason = error
    if reason is not None and not found:
        raise reason
    return found
