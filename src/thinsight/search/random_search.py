"""Random search over schedules that spend a budget: what any other search has to beat.

Knows nothing about models.
"""

from __future__ import annotations

import os

import numpy as np

from ..budget import Budget
from .budgeted import BudgetedRun, check_count, earliest_layer, merit
from .progress import SearchObserver
from .result import SearchResult
from .shapes import first_layer_for, random_staircase
from .study import SearchEvaluator

__all__ = ["random_search"]


def random_search(
    evaluator: SearchEvaluator,
    budget: Budget,
    *,
    n_trials: int = 20,
    seed: int = 0,
    first_layer: int | None = None,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """The best of ``n_trials`` random schedules that fall in any steps and spend the budget exactly.

    Best-of-160 of these beats G-Search in VisPCO (arXiv 2604.15188): the honest yardstick. Arguments and
    errors as of `psigmoid`.
    """
    check_count(n_trials, "n_trials", 1)
    check_count(seed, "seed", 0)
    first = first_layer_for(budget, earliest_layer(evaluator), first_layer)
    settings = {"method": "random", "n_trials": n_trials, "seed": seed, "first_layer": first}
    run = BudgetedRun(
        evaluator, budget, settings, expected=n_trials, study=study, resume=resume, observer=observer
    )
    rng = np.random.default_rng(seed)
    drawn = [random_staircase(budget, rng, first) for _ in range(n_trials)]
    tried = [run.run(schedule, f"random {number}") for number, schedule in enumerate(drawn)]
    return run.finish(max(tried, key=merit))
