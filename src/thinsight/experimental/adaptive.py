"""Adaptive search: the budget is spent per prompt, more where the text's attention is flat, less where it is
peaked (or the other way round, where that scores better), and holds on average.

Starts from what the sensitivity search finds. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..budget import Budget
from ..errors import BadInput, Unreachable, whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..reduction import Reduction
from ..schedule import Adaptive, Schedule
from ..searches.run import Run, SearchResult, Trial, budget_of, first_layers
from ..searches.search import SEARCHES, Search
from ..searches.sensitivity import LEAST_TRIALS as LEAST_OF_SENSITIVITY
from ..searches.sensitivity import SensitivitySearch, worth
from ..searches.shapes import bend

STATISTIC = "concentration"
LEVELS = 3  # schedules, each for as many calibration prompts as the others
# how much more of the budget behind the decision the flattest third gets, and the most peaked third less
SPREADS = (0.25, 0.5, 0.75, -0.25, -0.5)
_SHARE = 1 / 4  # of the examples, on which the spreads stand against each other
_ADAPTING = 1 + (len(SPREADS) + 1) * _SHARE + 1  # evaluations: the statistics, the spreads, the winner
LEAST_TRIALS = LEAST_OF_SENSITIVITY + round(_ADAPTING + 0.5)


@runtime_checkable
class TellsStatistics(Protocol):
    """An evaluator that reads a statistic of each prompt."""

    def statistics(self, reduction: Reduction) -> NDArray[np.float64]:
        """(examples,) under an adaptive reduction, see `thinsight.Evaluator.statistics`."""


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
    n_trials, seed = whole(n_trials, "n_trials", LEAST_TRIALS), whole(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    budget = budget_of(evaluator, budget, budget_unit)
    if not isinstance(evaluator, TellsStatistics):
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
    run = Run(evaluator, settings, budget=budget, expected=n_trials, study=study, resume=resume, observer=observer)
    run.keep_all_before(first)
    best = SensitivitySearch(run, choices, warm_start, n_trials=n_trials - _ADAPTING).best()
    found = _adapted(run, evaluator, best)
    return run.finish_with(best if found is None else max(best, found, key=worth))


def _adapted(run: Run, evaluator: TellsStatistics, best: Trial) -> Trial | None:
    """The best spread on a share of the examples, run on all; None where nothing can be spread."""
    falls = [layer for layer in best.schedule.reductions(run.n) if layer]
    if not falls:
        return None
    plain = run.evaluator.bind(best.reduction or best.schedule)
    alone = Adaptive(STATISTIC, falls[0], (), (best.schedule,), (1.0,))
    values = evaluator.statistics(replace(plain, adaptive=alone))
    run.trials.append(replace(best, why="statistics", seconds=0.0))  # counted as an evaluation
    tried = []
    for family, spread in _families(run.budget, best.schedule, falls[0], values):
        why, reduction = f"spread {spread:+g}", replace(plain, schedule=family.mean(), adaptive=family)
        tried.append((run.measure(reduction, why, share=_SHARE), why, reduction))
    unspread = run.run(plain, "no spread", share=_SHARE)
    if not tried:
        return None
    first, why, reduction = max(tried, key=lambda each: worth(each[0]))
    return run.measure(reduction, why) if worth(first) > worth(unspread) else None


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


SEARCHES.register(Search("adaptive", adaptive_search, "Sensitivity search, adaptive", least_trials=LEAST_TRIALS))
