"""`SearchResult.report`: the HTML report of a search that ran in Python.

Says what the result knows; with the model and examples at hand, what comes of its reduction on those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import notebook
from ..errors import BadInput
from ..evaluation.evaluator import Evaluator
from ..evaluation.examples import Example, load_examples
from ..loading import base_name
from ..records import user_path
from ..reduction import Reduction
from ..report.data import DatasetInfo, ModelInfo, ReportData, SearchInfo
from ..report.html import write_report
from ..runtime import num_layers
from ..runtime.anatomy import unwrapped
from ..schedule import Schedule
from ..searches.certify import fingerprint_of
from ..searches.run import SearchResult
from ..searches.search import FRONTIER, SEARCHES
from .findings import (
    MedianPrompt,
    changed_answers,
    drop_of,
    headline_of,
    measures_of,
    method_row,
    pictures_of,
    ranker_words,
    task_rows,
)
from .opening import Opened, content_hash, environment

_PICTURES = 6


def report(
    result: SearchResult,
    path: str | Path,
    model: Any = None,
    processor: Any = None,
    examples: Sequence[Example] | str | Path | None = None,
    *,
    title: str | None = None,
    pictures: int = _PICTURES,
    **scoring: Any,
) -> Path:
    """Write what `SearchResult.report` promises; its arguments and errors."""
    given = [each is not None for each in (model, processor, examples)]
    if any(given) and not all(given):
        raise BadInput("report takes model, processor and examples together, or none of them: give all three")
    if not any(given) and scoring:
        raise BadInput(f"report was told {', '.join(scoring)} without a model: give model, processor and examples too")
    path = user_path(path, "report")
    data = _told(result, title)
    if all(given):
        read = load_examples(examples) if isinstance(examples, (str, Path)) else list(examples or ())
        scoring.setdefault("ranker", result.reduction.ranker)
        data = _tested(data, result.reduction, Evaluator(model, processor, read, **scoring), pictures)
    return write_report(path, data)


def _told(result: SearchResult, title: str | None) -> ReportData:
    """What the result knows by itself."""
    reduction, certificate = result.reduction, result.certificate
    searches = {search.name: search.title for search in (*SEARCHES.values(), FRONTIER)}
    method = searches.get(result.method, result.method)
    name, record = reduction.base_model_name_or_path or reduction.model_type or "a model", reduction.search or {}
    budget = "" if result.budget is None else f"{result.budget['limit']:.4g} {result.budget['unit']}"
    known = None if certificate is not None else (result.full_score, result.score)  # else they are the certificate's
    return ReportData(
        title=title or f"Fewer vision tokens for {name}",
        model=ModelInfo(
            name,
            reduction.model_type or "",
            num_layers=result.schedule.num_layers,
            num_vision_tokens=record.get("num_vision_tokens"),
        ),
        search=SearchInfo(
            method=method,
            max_drop=result.max_drop,
            ranker=ranker_words(reduction.ranker),
            seed=result.seed,
            evaluations=round(math.fsum(trial.share for trial in result.trials)),
            full_forwards=result.full_forwards,
            seconds=result.seconds,
            calibration_full_score=record.get("full_score") if known is None else known[0],
            calibration_score=record.get("score") if known is None else known[1],
            budget=budget,
        ),
        keep_rates=result.schedule.keep_rates,
        trials=result.trials,
        certificate=certificate,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _tested(data: ReportData, reduction: Reduction, evaluator: Evaluator, pictures: int) -> ReportData:
    """With what comes of the reduction on an evaluator's examples."""
    examples, watcher = evaluator.examples, notebook.watcher()
    full, reduced = evaluator.full, evaluator(reduction)
    drop, prompt = drop_of(full, reduced, examples), MedianPrompt.of(evaluator.model.config, evaluator.prompt_sizes)
    schedule = reduction.schedule
    name = data.search.method if data.search is not None else "Reduced"
    rows = (
        method_row("Full model", "full", Schedule.full(schedule.num_layers), full, None, prompt),
        method_row(name, "found", schedule, reduced, drop, prompt),
    )
    certificate = data.certificate
    info = _info(evaluator, data.model)
    return replace(
        data,
        model=info,
        dataset=DatasetInfo(
            test_name="the examples given",
            test_size=len(examples),
            metric=evaluator.metric_names,
            test_hash=content_hash(examples),
            fingerprint=fingerprint_of(evaluator),
        ),
        headline=headline_of(*rows, prompt),
        methods=rows,
        per_task=task_rows(full, reduced, examples),
        measures=measures_of(full, reduced, examples),
        changes=changed_answers(evaluator, reduction, full, reduced),
        pictures=pictures_of(evaluator, reduction, full, reduced, pictures, watcher.on_note),
        doubts=(evaluator.doubt,) if evaluator.doubt else (),
        environment=environment(Opened(evaluator.model, evaluator.processor, info)),
        path_ratios=tuple(prompt.flops() / prompt.flops(each) for each in certificate.path) if certificate else (),
    )


def _info(evaluator: Evaluator, told: ModelInfo) -> ModelInfo:
    model = unwrapped(evaluator.model)
    return ModelInfo(
        name=base_name(model.name_or_path) if model.name_or_path else told.name,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=str(model.config._attn_implementation or ""),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=num_layers(model),
        num_vision_tokens=evaluator.num_vision_tokens,
    )
