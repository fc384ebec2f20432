"""P-Sigmoid (Scenario II): the best score inside a budget, a sigmoid over the layers, its steepness searched.

Knows nothing about models: it sees an evaluator and a budget. Proposals come from Optuna's Gaussian process.
"""

from __future__ import annotations

import math
import os
from typing import Any

from ..budget import Budget
from ..errors import whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..schedule import Schedule
from .run import Run, SearchResult, Trial, budget_of
from .shapes import first_layer_for, fit_sigmoid, propose, sigmoid

# The paper's best steepness is .36 to .93 for 32 layers; wide around it, and per depth, as the shape is.
_STEEPNESS = (0.03, 20.0)
_REFERENCE_DEPTH = 32
_LEAST_AMPLITUDE, _MOST_FLOOR = 0.3, 0.3
_STARTUP, _SEEDS = 4, 10_007  # random proposals at first; more than the trials of any search
_TIE_BREAK = 1e-3  # of an agreement of 1, in score units: less than one example in 1,000


def psigmoid(
    evaluator: SearchEvaluator,
    budget: Budget | float,
    *,
    budget_unit: str = "keep",
    n_trials: int = 16,
    seed: int = 0,
    amplitude: bool = False,
    floor: bool = False,
    first_layer: int | None = None,
    warm_start: Schedule | None = None,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search the sigmoid that scores best inside a budget (P-Sigmoid, arXiv 2412.00556 section 3).

    ``r(i) = 1 / (1 + exp(k (i - alpha)))``: alpha is solved by bisection so that the budget is spent exactly,
    and Bayesian optimisation searches the steepness k, on a logarithmic scale that is centred on the paper's
    values for this depth. The Gaussian process takes scores as noisy. The objective is the score, ties broken
    by the agreement with the full model. A seed decides every proposal, and a resumed search makes the same.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`.
        budget: a mean keep rate, such as 0.25, or a budget of `thinsight.budget`.
        budget_unit: of a number: "keep", "flops" or "ms", see `thinsight.budget.make_budget`. A journal in
            "ms" is continued with a budget object, for a device is not measured twice alike.
        n_trials: proposals; one that leads to a schedule seen before costs no evaluation.
        seed: of the proposals.
        amplitude: search the highest rate too.
        floor: search the lowest rate too.
        first_layer: the first layer that may get fewer tokens; None: see `shapes.first_layer_for`.
        warm_start: a schedule, such as G-Search's, whose closest sigmoid is tried first.
        study, resume, observer: as of `gsearch`.

    Raises:
        ThinsightError: bad arguments, or a budget that the layers before the first reduction overrun.
    """
    n_trials, seed = whole(n_trials, "n_trials", 1), whole(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    budget = budget_of(evaluator, budget, budget_unit)
    first = first_layer_for(budget, evaluator.first_layer, first_layer)
    space = _space(budget.num_layers, amplitude, floor)
    start = None if warm_start is None else _inside(fit_sigmoid(warm_start, first), space)
    settings = {
        "method": "psigmoid",
        "n_trials": n_trials,
        "seed": seed,
        "first_layer": first,
        "space": {name: list(limits) for name, limits in space.items()},
        "start": start,
    }
    run = Run(evaluator, settings, budget=budget, expected=n_trials, study=study, resume=resume, observer=observer)
    run.keep_all_before(first)

    def proposed(seen: list[tuple[dict[str, float], float]]) -> dict[str, Any]:
        if start is not None and not seen:
            return start
        return propose(seen, space, seed * _SEEDS + len(seen), _STARTUP)

    drawn: list[tuple[dict[str, float], float]] = []
    while len(drawn) < min(_STARTUP, n_trials):  # these do not depend on scores
        drawn.append((proposed(drawn), 0.0))
    run.ahead([sigmoid(budget, **parameters, first_layer=first) for parameters, _ in drawn])
    seen: list[tuple[dict[str, float], float]] = []
    tried: list[Trial] = []
    for _ in range(n_trials):
        parameters = proposed(seen)
        schedule = sigmoid(budget, **parameters, first_layer=first)
        trial = run.run(schedule, " ".join(f"{name}={value:.4g}" for name, value in parameters.items()))
        tried.append(trial)
        seen.append((parameters, trial.score + _TIE_BREAK * (trial.agreement or 0.0)))
    return run.finish_with(max(tried, key=lambda trial: trial.merit))


def _space(depth: int, amplitude: bool, floor: bool) -> dict[str, tuple[float, float, bool]]:
    """Limits of each parameter, and whether its scale is logarithmic."""
    scale = _REFERENCE_DEPTH / depth
    space: dict[str, tuple[float, float, bool]] = {"k": (_STEEPNESS[0] * scale, _STEEPNESS[1] * scale, True)}
    if amplitude:
        space["amplitude"] = (_LEAST_AMPLITUDE, 1.0, False)
    if floor:
        space["floor"] = (0.0, _MOST_FLOOR, False)
    return space


def _inside(parameters: dict[str, float], space: dict[str, tuple[float, float, bool]]) -> dict[str, Any]:
    """The parameters that are searched, within their limits."""
    return {
        name: min(max(parameters[name], low), high)
        for name, (low, high, _) in space.items()
        if math.isfinite(parameters[name])
    }
