"""Random search over schedules that spend a budget: what any other search has to beat.

Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..budget import Budget
from ..errors import whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..reduction import Reduction
from .run import Run, SearchResult, Trial, budget_of, first_layers
from .shapes import random_staircase


def random_search(
    evaluator: SearchEvaluator,
    budget: Budget | float,
    *,
    budget_unit: str = "keep",
    n_trials: int = 16,
    seed: int = 0,
    first_layer: int | None = None,
    rankers: Sequence[dict[str, Any]] = (),
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """The best of ``n_trials`` random schedules that fall in any steps and spend the budget exactly.

    Best-of-160 of these beats G-Search in VisPCO (arXiv 2604.15188): the honest yardstick. With ``rankers``,
    each schedule is drawn together with one of those that can reach the budget. A candidate is left as soon
    as it is sure to stay below the best so far, which changes nothing in what is found. Other arguments and
    errors as of `psigmoid`.
    """
    n_trials, seed = whole(n_trials, "n_trials", 1), whole(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    budget = budget_of(evaluator, budget, budget_unit)
    choices = first_layers(evaluator, budget, rankers, first_layer)
    settings = {
        "method": "random",
        "n_trials": n_trials,
        "seed": seed,
        "first_layer": min(first for _, first in choices),
        "rankers": [dict(ranker) for ranker in rankers],
    }
    run = Run(evaluator, settings, budget=budget, expected=n_trials, study=study, resume=resume, observer=observer)
    rng = np.random.default_rng(seed)
    drawn: list[tuple[Reduction, int]] = []
    for _ in range(n_trials):
        ranker, first = choices[int(rng.integers(len(choices)))]
        drawn.append((run.under(ranker, random_staircase(budget, rng, first)), first))
    candidates = [candidate for candidate, _ in drawn]

    def best_before(place: int) -> float | None:
        records = filter(None, map(run.study.find, candidates[:place]))
        return max((record.score for record in records if record.complete), default=None)

    run.keep_all_before(min(first for _, first in drawn))
    run.ahead(candidates, floor=best_before)
    best: Trial | None = None
    for number, (candidate, first) in enumerate(drawn):
        run.keep_all_before(first)
        floor = None if best is None else best.score
        trial = run.run(candidate, f"random {number}", floor=floor)
        if trial.complete and (best is None or trial.merit > best.merit):
            best = trial
    assert best is not None  # the first one has no floor to fall below
    return run.finish_with(best)
