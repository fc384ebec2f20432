"""What a search came to, stage by stage, and the report that is made of it.

Knows nothing about how anything was found, nor about files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from ..evaluation.result import Evaluation
from ..reduction import Reduction, public_name
from ..report.data import (
    Consistency,
    DatasetInfo,
    Headline,
    MethodRow,
    Picture,
    ReportData,
    SearchInfo,
)
from ..timing import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Measurement
from .prepared import Prepared
from .results import drop_of, method_row, metric_words, ranker_words, task_rows, timing_rows
from .search_options import SearchOptions
from .searching import SearchRecord
from .session import environment
from .splits import content_hash

__all__ = ["Findings", "Tested", "measured_of", "report_of"]


@dataclass(frozen=True)
class Tested:
    """One method on the test set."""

    name: str
    kind: str
    reduction: Reduction
    evaluation: Evaluation
    note: str
    doubt: str = ""


@dataclass(frozen=True)
class Findings:
    """The results of all stages; the full model comes first in ``tested``, then the reduction found."""

    search: SearchRecord
    tested: tuple[Tested, ...]
    measurement: Measurement
    consistency: Consistency
    pictures: tuple[Picture, ...]


def report_of(options: SearchOptions, prepared: Prepared, findings: Findings) -> ReportData:
    """Everything that the report shows.

    Args:
        options: what was asked for.
        prepared: what it ran on.
        findings: what came of it.
    """
    full, found = findings.tested[0], findings.tested[1]
    rows = tuple(_row(prepared, method, full) for method in findings.tested)
    return ReportData(
        title=f"Fewer vision tokens for {options.model.model}",
        model=replace(prepared.opened.info, num_vision_tokens=prepared.prompt.n_vision),
        dataset=_dataset(options, prepared),
        headline=_headline(rows[0], rows[1], findings.measurement, prepared.prompt.vision_flops()),
        search=_search_info(options, findings.search, found.reduction),
        keep_rates=found.reduction.schedule.keep_rates,
        methods=rows,
        per_task=task_rows(full.evaluation, found.evaluation, prepared.sets.test),
        timing=timing_rows(findings.measurement),
        trials=findings.search.trials,
        frontier=findings.search.frontier,
        consistency=findings.consistency,
        pictures=findings.pictures,
        environment=environment(prepared.opened),
        commands=(options.command,) if options.command else (),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        doubts=_doubts(findings.search, full),
    )


def _doubts(search: SearchRecord, full: Tested) -> tuple[str, ...]:
    """Of the calibration set and of the test set."""
    sets = (("calibration", search.doubt), ("test", full.doubt))
    return tuple(f"on the {name} set {doubt}" for name, doubt in sets if doubt)


def measured_of(data: ReportData, measurement: Measurement) -> dict[str, Any]:
    """What the saved reduction says it was measured to do, as JSON values.

    Args:
        data: the run's report.
        measurement: full against reduced, on the clock.
    """
    headline, dataset = data.headline, data.dataset
    assert headline is not None
    assert dataset is not None
    return {
        "full_score": headline.full_score,
        "score": headline.score,
        "drop": headline.drop.mean,
        "drop_interval_95": [headline.drop.low, headline.drop.high],
        "metric": dataset.metric,
        "test": {
            "name": public_name(dataset.test_name),
            "examples": dataset.test_size,
            "hash": dataset.test_hash,
        },
        "mean_keep_rate": headline.mean_keep_rate,
        "flops_ratio": headline.flops_ratio,
        "kv_ratio": measurement.kv_ratio,
        "latency": {
            "prefill_ratio": measurement.timing(PREFILL).ratio,
            "prefill_with_images_ratio": measurement.timing(PREFILL_WITH_IMAGES).ratio,
            "answer_ratio": measurement.timing(ANSWER).ratio,
            "new_tokens": measurement.new_tokens,
            "batch_size": measurement.batch,
            "device": measurement.device,
            "dtype": measurement.dtype,
            "cpu_threads": measurement.threads,
        },
    }


def _row(prepared: Prepared, method: Tested, full: Tested) -> MethodRow:
    examples = prepared.sets.test
    drop = None if method.kind == "full" else drop_of(full.evaluation, method.evaluation, examples)
    schedule = method.reduction.schedule
    return method_row(
        method.name, method.kind, schedule, method.evaluation, drop, prepared.prompt, method.note
    )


def _dataset(options: SearchOptions, prepared: Prepared) -> DatasetInfo:
    sets = prepared.sets
    return DatasetInfo(
        test_name=sets.test_name,
        test_size=len(sets.test),
        calibration_name=sets.calibration_name,
        calibration_size=len(sets.calibration),
        metric=options.metric or metric_words(sets.test),
        test_hash=content_hash(sets.test),
        calibration_hash=content_hash(sets.calibration),
    )


def _search_info(options: SearchOptions, search: SearchRecord, reduction: Reduction) -> SearchInfo:
    return SearchInfo(
        method=options.title,
        max_drop=options.tolerance if options.budget is None else None,
        budget=_budget_words(options),
        solver=options.solver_name if options.searches_layers else "",
        ranker=ranker_words(reduction.ranker),
        seed=options.seed,
        evaluations=round(math.fsum(trial.share for trial in search.trials)),
        full_forwards=search.full_forwards,
        seconds=search.seconds,
        calibration_full_score=search.full_score,
        calibration_score=search.score,
    )


def _headline(
    full: MethodRow, found: MethodRow, measurement: Measurement, vision_flops: float | None
) -> Headline:
    assert found.drop is not None
    return Headline(
        full_score=full.score,
        score=found.score,
        drop=found.drop,
        mean_keep_rate=found.mean_keep_rate,
        flops_ratio=found.flops_ratio,
        kv_ratio=measurement.kv_ratio,
        prefill_ratio=measurement.timing(PREFILL).ratio,
        answer_ratio=measurement.timing(ANSWER).ratio,
        flops_full=full.flops,
        flops=found.flops,
        vision_flops=vision_flops,
    )


def _budget_words(options: SearchOptions) -> str:
    if options.budget is None:
        return ""
    if options.unit == "ms":
        return f"{options.budget:g} ms of prefill"
    if options.unit == "flops" and options.budget > 1:
        return f"{options.budget:.4g} decoder FLOPs"
    of = "of the decoder's FLOPs" if options.unit == "flops" else "mean keep rate"
    return f"{100 * options.budget:g} % {of}"
