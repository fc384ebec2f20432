"""The main job's search: finds a reduction on the calibration set and saves it, with a record of how.

Knows nothing about the test set, nor about what is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..budget import Budget, KeepBudget
from ..errors import BadInput
from ..loading import base_name, checkpoint_hash
from ..reduction import Reduction
from ..report.data import FrontierRow, TrialRow
from ..searches import SearchResult, frontier, gsearch
from ..searches.frontier import SHARES, Frontier
from ..searches.search import METHODS, rankers_for
from .limits import Limits, limits_of
from .prepared import Prepared
from .results import MedianPrompt, trial_rows
from .search_options import SearchOptions

__all__ = ["SearchRecord", "search_once"]


@dataclass(frozen=True)
class SearchRecord:
    """The search as the run folder keeps it; the two scores are the calibration set's.

    ``reduction`` is what `Reduction.to_dict` gives. A resumed run takes it from here, where a checksum tells
    a change, and not from the reduction's own file, which is the user's to edit.
    """

    method: str
    reduction: dict[str, Any]
    full_score: float
    score: float
    seconds: float
    trials: tuple[TrialRow, ...]
    frontier: tuple[FrontierRow, ...] = ()
    full_forwards: float | None = None
    doubt: str = ""


@dataclass(frozen=True)
class _KeptBudget(Limits):
    """A budget as the run folder keeps it."""

    value: float
    unit: str


def search_once(options: SearchOptions, prepared: Prepared) -> tuple[SearchRecord, Reduction]:
    """The search's record and the reduction, which is in the run folder from here on.

    A search that is done is read, one that was interrupted continues inside its journal.

    Raises:
        ThinsightError: what is asked cannot be reached.
    """
    folder = prepared.folder
    record = folder.once("search", SearchRecord, lambda: _search(options, prepared))
    return record, Reduction.from_dict(record.reduction, "the run's search")


def _search(options: SearchOptions, prepared: Prepared) -> SearchRecord:
    """Search, and save the reduction."""
    prepared.fix_batch_size("calibration")
    points: tuple[FrontierRow, ...] = ()
    if options.frontier:
        result, points = _along_frontier(options, prepared)
    elif options.budget is None:
        result = _layer_by_layer(options, prepared)
    else:
        result = _under_budget(options, prepared)
    reduction = _of_model(result.reduction, options.model.model)
    reduction.save_pretrained(prepared.folder.path)
    if result.schedule.is_full and options.budget is None:
        prepared.watcher.on_note(
            f"No vision token can go within a drop of {options.tolerance}: allow more with --max-drop, "
            "or calibrate on more examples"
        )
    return SearchRecord(
        result.method,
        reduction.to_dict(),
        result.full_score,
        result.score,
        result.seconds,
        trial_rows(result.trials),
        points,
        result.full_forwards,
        prepared.calibration.doubt,
    )


def _of_model(reduction: Reduction, name: str) -> Reduction:
    """The reduction with what its model is told by where it is looked for again."""
    checkpoint = checkpoint_hash(name)
    known = {} if checkpoint is None else {"checkpoint": checkpoint}
    record = {**(reduction.search or {}), **known}
    return replace(reduction, base_model_name_or_path=base_name(name), search=record)


def _journal(options: SearchOptions, prepared: Prepared) -> dict[str, Any]:
    """What every search is told."""
    told = {
        "seed": options.seed,
        "study": prepared.folder.path / "study.jsonl",
        "resume": options.resume,
        "observer": prepared.watcher,
    }
    return told if options.n_trials is None else {**told, "n_trials": options.n_trials}


def _layer_by_layer(options: SearchOptions, prepared: Prepared) -> SearchResult:
    return gsearch(
        prepared.calibration,
        options.tolerance,
        first_layer=options.gsearch_layer,
        solver=options.solver_name,  # by name: the evaluator says how many counts are tried at once
        step=options.step,
        trade_off=options.trade_off,
        confidence=options.confidence,
        **_journal(options, prepared),
    )


def _under_budget(options: SearchOptions, prepared: Prepared) -> SearchResult:
    evaluator = prepared.calibration
    budget = _budget(options, prepared)
    arguments = _journal(options, prepared)
    if options.chooses_ranker:
        arguments["rankers"] = rankers_for(evaluator)
    if options.start is not None:
        arguments["warm_start"] = options.start_schedule(evaluator.num_layers)
    found: SearchResult = METHODS[options.chosen](
        evaluator, budget, first_layer=options.first_layer, **arguments
    )
    return found


def _budget(options: SearchOptions, prepared: Prepared) -> Budget:
    """The budget in numbers, the same one in a resumed search."""
    assert options.budget is not None
    value, unit = options.budget, options.unit

    def count() -> _KeptBudget:
        limits = limits_of(prepared.calibration, value, unit)
        return _KeptBudget(limits.n_vision, limits.n_text, limits.latency, value, unit)

    kept = prepared.folder.once("budget", _KeptBudget, count)
    return kept.budget(prepared.opened.model.config, kept.value, kept.unit)


def _along_frontier(
    options: SearchOptions, prepared: Prepared
) -> tuple[SearchResult, tuple[FrontierRow, ...]]:
    """The result that the tolerance or the budget picks, and a row for each cost."""
    evaluator = prepared.calibration
    layers, n_vision = evaluator.num_layers, evaluator.num_vision_tokens
    budgets = [KeepBudget(layers, n_vision, share) for share in SHARES]
    found = frontier(evaluator, budgets, **_journal(options, prepared))
    taken = _taken(options, found)
    prompt = MedianPrompt.of(prepared.opened.model.config, evaluator.prompt_sizes)
    rows = tuple(
        FrontierRow(
            point.schedule.keep_rates,
            point.schedule.mean_keep_rate,
            prompt.flops() / prompt.flops(point.schedule),
            point.score,
            point is taken,
        )
        for point in found.points
    )
    trials = tuple(trial for point in found.points for trial in point.trials)
    forwards = math.fsum(point.full_forwards or 0.0 for point in found.points)
    return replace(taken, trials=trials, method="frontier", full_forwards=forwards), rows


def _taken(options: SearchOptions, found: Frontier) -> SearchResult:
    """The frontier's point that the tolerance or the budget picks."""
    if options.budget is not None:
        return found.within(options.budget)
    taken = found.at_drop(options.tolerance)
    if taken is None:
        raise BadInput(
            f"no point of the frontier stays within a drop of {options.tolerance}: the best one loses "
            f"{min(point.drop for point in found.points):.4f}; allow more with --max-drop"
        )
    return taken
