"""A search under a tolerance that spends it where it buys most: where a dropped token costs least score per FLOP.

G-Search settles the shallow layers first, so what they take of the tolerance is gone before a deep layer is asked. Here
every layer is asked first, on few examples (`ExitModel`); for each cost there is then one schedule that should lose
least, and along these, from costly to cheap, the cheapest within the tolerance is bisected.
"""

from __future__ import annotations

import math
import os

from ..errors import Unreachable, whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..schedule import Schedule
from .certify import ON_THE_PATH
from .gsearch import check_max_drop
from .run import Run, SearchResult, Trial
from .sensitivity import ExitModel, exit_model

LAYERS = 7  # at which steps are measured
RATES = (0.75, 0.5, 0.25, 0.125, 0.03, 0.0)  # to which they go
SLACK = 1e-9  # a drop of exactly the tolerance is within it
FINE, CHEAPEST = 0.01, 0.01  # of the path: its steps, and where it ends as a share of the full cost


def priced_search(
    evaluator: SearchEvaluator,
    max_drop: float = 0.01,
    *,
    first_layer: int = 2,
    seed: int = 0,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search the cheapest schedule within a tolerance, dropping first what loses least per FLOP.

    42 steps at 7 layers, on an eighth of the examples, say what each band of ranked tokens is worth at each layer: 5 to
    6 evaluations. The path of schedules that follows, each 1 % cheaper than the one before, is bisected for the
    cheapest one whose score is within ``max_drop`` of the full model's: about 8 more, of which those that fail end
    early. Unlike `gsearch` it can keep more in shallow layers than the tolerance would force them to, and save more in
    deep ones.

    Whatever the model's sensitivities say, the schedule returned was evaluated on all examples and lies within
    ``max_drop`` (or is the full one).

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`. A sample of examples is used where there is one.
        max_drop: largest drop of the calibration score, in the metric's own unit (0.01 is one point), at least 0.
        first_layer: the shallowest layer that may receive fewer tokens, numbered from 0.
        seed: of what an evaluator draws; the search draws nothing.
        study, resume, observer: as of `gsearch`.

    Returns:
        SearchResult: schedule, reduction and all trials, those of whole schedules with ``why`` "path".

    Raises:
        ThinsightError: bad arguments, or a journal that cannot be used; before the first evaluation.
    """
    evaluator = as_evaluator(evaluator)
    check_max_drop(max_drop)
    num_layers = whole(evaluator.num_layers, "evaluator.num_layers", 1)
    first = whole(first_layer, "first_layer", 0, num_layers - 1)
    settings = {"method": "priced", "max_drop": float(max_drop), "first_layer": first, "seed": whole(seed, "seed", 0)}
    run = Run(evaluator, settings, expected=14, study=study, resume=resume, observer=observer)
    ranker = evaluator.reduction(Schedule.full(num_layers)).ranker
    model = exit_model(run, first, ranker, LAYERS, RATES)
    floor = run.study.full_score - float(max_drop) - SLACK
    passes, fails = 0, math.ceil(math.log(CHEAPEST) / math.log(1 - FINE))  # in steps along the path
    best: Trial | None = None
    while fails - passes > 1:
        middle = (passes + fails) // 2
        schedule = cheapest_at(evaluator, model, (1 - FINE) ** middle)
        if schedule is not None and (trial := _try(run, schedule, floor)).accepted:
            passes, best = middle, trial
        else:
            fails = middle
    if best is None:
        return run.finish(evaluator.reduction(Schedule.full(num_layers)), run.study.full_score)
    return run.finish(evaluator.bind(best.schedule), best.score, best.agreement)


def cheapest_at(evaluator: SearchEvaluator, model: ExitModel, share: float) -> Schedule | None:
    """The schedule that should lose least at a share of the full cost: of decoder FLOPs of the median prompt, or the
    mean keep rate where there is no model. None where the layers that keep all cost more."""
    try:
        return model.schedule(evaluator.budget(share, "keep" if evaluator.model is None else "flops"))
    except Unreachable:
        return None


def _try(run: Run, schedule: Schedule, floor: float) -> Trial:
    candidate = run.evaluator.reduction(schedule)
    record = run.study.evaluate(candidate, floor)
    trial = Trial(
        layer=None,
        keep_rate=schedule.mean_keep_rate,
        count=sum(schedule.counts(run.n)),
        accepted=record.complete and record.score >= floor,
        schedule=schedule,
        why=ON_THE_PATH,
        reduction=candidate,
        **vars(record),
    )
    run.add(trial)
    return trial
