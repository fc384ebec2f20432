"""Adaptive search: the budget is spent per prompt, more where the text's attention is flat, less where it is
peaked (or the other way round, where that scores better), and holds on average.

Starts from what the sensitivity search finds. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adaptive import Adaptive
from ..budget import Budget
from ..errors import BadInput, Unreachable
from ..progress import SearchObserver
from ..reduction import Reduction
from ..schedule import Schedule
from .budgeted import BudgetedRun, budget_of, check_count, first_layers
from .result import SearchResult, Trial
from .sensitivity import LEAST_TRIALS as LEAST_OF_SENSITIVITY
from .sensitivity import SensitivitySearch, worth
from .shapes import bend
from .study import SearchEvaluator

STATISTIC = "concentration"
LEVELS = 3  # schedules, each for as many calibration prompts as the others
# how much more of the budget behind the decision the flattest third gets, and the most peaked third less
SPREADS = (0.25, 0.5, 0.75, -0.25, -0.5)
_SHARE = 1 / 4  # of the examples, on which the spreads stand against each other
_ADAPTING = 1 + (len(SPREADS) + 1) * _SHARE + 1  # evaluations: the statistics, the spreads, the winner
LEAST_TRIALS = LEAST_OF_SENSITIVITY + round(_ADAPTING + 0.5)


def adaptive_search(
    evaluator: SearchEvaluator,
    budget: Budget | float,
    *,
    budget_unit: str = "keep",
    n_trials: int = 16,
    seed: int = 0,
    first_layer: int | None = None,
    warm_start: Schedule | None = None,
    rankers: Sequence[dict[str, Any]] = (),
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search a schedule as `sensitivity_search` does, then how far prompts should differ from it.

    Calibration prompts are cut into thirds by the concentration of their text's attention, in the layer
    before the schedule's first reduction behind layer 0. From there on each third gets the schedule's rates
    moved (in logits) to a budget of its own, the mean of the three being the budget given. What the spread
    should be is searched; the schedule alone stays the result where no spread scores better. The idea of
    spending by prompt is AutoPrune's (arXiv 2509.23931).

    Arguments and errors as of `sensitivity_search`, and:

    Raises:
        ThinsightError: an evaluator without ``statistics``, or too few trials for both parts.
    """
    check_count(n_trials, "n_trials", LEAST_TRIALS)
    check_count(seed, "seed", 0)
    budget = budget_of(evaluator, budget, budget_unit)
    if not hasattr(evaluator, "statistics"):
        raise BadInput("evaluator has no statistics; pass a thinsight.Evaluator, or search without them")
    choices = first_layers(evaluator, budget, rankers, first_layer)
    first = min(first for _, first in choices)
    settings = {
        "method": "adaptive",
        "n_trials": n_trials,
        "seed": seed,
        "first_layer": first,
        "rankers": [dict(ranker) for ranker in rankers],
        "start": None if warm_start is None else list(warm_start.keep_rates),
        "statistic": STATISTIC,
    }
    run = BudgetedRun(evaluator, budget, settings, expected=n_trials, study=study, resume=resume, observer=observer)
    search = SensitivitySearch(
        run, first, warm_start, rankers=choices if rankers else (), n_trials=n_trials - _ADAPTING
    )
    best = search.best()
    found = _adapted(run, best)
    return run.finish(best if found is None else max(best, found, key=worth))


def _adapted(run: BudgetedRun, best: Trial) -> Trial | None:
    """The best spread on a share of the examples, run on all; None where nothing can be spread."""
    falls = [layer for layer in best.schedule.reductions(run.budget.n_vision) if layer]
    if not falls:
        return None
    layer = falls[0]
    values = _statistics(run, best, layer)
    tried = []
    for family, spread in _families(run.budget, best.schedule, layer, values):
        why = f"spread {spread:+g}"
        tried.append((run.measure(family.mean(), why, share=_SHARE, ranker=best.ranker, adaptive=family), why))
    plain = run.run(best.schedule, "no spread", share=_SHARE, ranker=best.ranker)
    if not tried:
        return None
    first, why = max(tried, key=lambda each: worth(each[0]))
    if worth(first) <= worth(plain):
        return None
    return run.measure(first.schedule, why, ranker=best.ranker, adaptive=first.adaptive)


def _statistics(run: BudgetedRun, best: Trial, layer: int) -> NDArray[np.float64]:
    """The statistic of every calibration prompt, under the best schedule; counted as an evaluation."""
    family = Adaptive(STATISTIC, layer, (), (best.schedule,), (1.0,))
    evaluator: Any = run.evaluator  # one that has statistics
    bound: Reduction = evaluator.reduction(best.schedule)
    reduction = Reduction(best.schedule, best.ranker or bound.ranker, model_type=bound.model_type, adaptive=family)
    values: NDArray[np.float64] = evaluator.statistics(reduction)
    run.count(best, "statistics")
    return values


def _families(
    budget: Budget, schedule: Schedule, layer: int, values: NDArray[np.float64]
) -> Iterator[tuple[Adaptive, float]]:
    """Families that cost the budget on average, each with its spread; those that cannot are left out."""
    inner = np.quantile(values, np.arange(1, LEVELS) / LEVELS)
    edges = tuple(sorted({float(edge) for edge in inner if edge > values.min()}))
    levels = np.searchsorted(edges, values, side="right")
    shares = np.bincount(levels, minlength=len(edges) + 1) / len(values)
    if len(edges) + 1 < LEVELS:
        return  # statistics so alike that they tell nothing
    head = budget.spent(Schedule([*schedule.keep_rates[:layer], *[0.0] * (budget.num_layers - layer)]))
    for spread in SPREADS:
        factors = np.linspace(1 + spread, 1 - spread, LEVELS)
        factors /= float(shares @ factors)
        limits = [head + (budget.limit - head) * float(factor) for factor in factors]
        try:
            schedules = tuple(bend(budget.limited(limit), schedule, layer) for limit in limits)
        except (BadInput, Unreachable):  # rounding of the head left less than nothing
            continue
        yield Adaptive(STATISTIC, layer, edges, schedules, tuple(map(float, shares))), spread
