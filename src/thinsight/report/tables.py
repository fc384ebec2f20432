"""The tables of a report that no other object has, each from the rows that hold its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from .. import shown
from ..certificate import Certificate
from ..schedule import Schedule
from ..shown import Column, Table
from . import words

if TYPE_CHECKING:
    from ..evaluation.benchmarks import Measured
    from .data import Changes, DatasetInfo, FrontierRow, Headline, MethodRow, TaskRow


def headline_table(found: Headline, dataset: DatasetInfo | None = None) -> Table:
    """Full, reduced, and their ratio or the drop's interval."""
    full, reduced = ("" if value is None else shown.flops(value) for value in (found.flops_full, found.flops))
    drop = f"drop {words.interval(found.drop)} points"
    rows = [
        ("score", shown.percent(found.full_score), shown.percent(found.score), drop),
        ("mean keep rate", shown.percent(1.0), shown.percent(found.mean_keep_rate), ""),
        ("decoder FLOPs", full, reduced, shown.ratio(found.flops_ratio)),
    ]
    times = (("KV cache of the prompt", found.kv_ratio), ("prefill time", found.prefill_ratio))
    for name, value in (*times, ("whole-answer time", found.answer_ratio)):
        rows += [] if value is None else [(name, "", "", shown.ratio(value))]
    return Table(
        "Full against reduced" + (f" on {shown.count(dataset.test_size)} test questions" if dataset else ""),
        rows,
        Column("", itemgetter(0), text=True),
        *(Column(name, itemgetter(place)) for place, name in enumerate(("full", "reduced", "ratio or drop"), 1)),
    )


def methods_table(methods: Sequence[MethodRow]) -> Table:
    """Every method's score, drop and cost; the search's own stands out."""
    return Table(
        "Methods at the same decoder FLOPs" if words.same_cost(tuple(methods)) else "Methods",
        methods,
        Column("Method", lambda row: row.name, "method", text=True),
        Column("Score", lambda row: shown.percent(row.score), "score"),
        Column("Drop in points [95 %]", lambda row: words.interval(row.drop), "drop [95 %]"),
        Column("Mean keep rate", lambda row: shown.percent(row.mean_keep_rate), "kept"),
        Column("Decoder FLOPs", lambda row: shown.flops(row.flops), "FLOPs"),
        Column("Full / this", lambda row: shown.ratio(row.flops_ratio), "full / this"),
        strong=lambda row: row.kind == "found",
        notes=[words.ranking(tuple(methods))],
    )


def frontier_table(frontier: Sequence[FrontierRow], certificate: Certificate | None = None) -> Table:
    """One schedule for each cost, and what came of it where it was tested; the one that was taken stands out."""
    outcomes = [] if certificate is None else [certificate.outcome(Schedule(row.keep_rates)) for row in frontier]
    found = Table(
        "The frontier, on the calibration set",
        frontier,
        Column("Mean keep rate", lambda row: shown.percent(row.mean_keep_rate), "mean keep rate"),
        Column("FLOPs", lambda row: shown.ratio(row.flops_ratio), "full / this"),
        Column("Calibration score", lambda row: shown.percent(row.score), "score"),
        Column("", lambda row: "taken" if row.chosen else "", text=True),
        strong=lambda row: row.chosen,
    )
    return found.put(4, outcomes, "Certificate") if any(outcomes) else found


def changes_table(changes: Changes) -> Table:
    """Both answers to the questions whose score changed, the worse ones first."""
    rows = changes.rows
    return Table(
        "Questions that score worse, then those that score better",
        rows,
        Column("Question", lambda row: row.question, "question", text=True),
        *([Column("Expected", lambda row: row.expected, text=True)] if any(row.expected for row in rows) else []),
        Column("Full model", lambda row: row.answer_full or words.SILENT, text=True),
        Column("Reduced", lambda row: row.answer_reduced or words.SILENT, text=True),
        Column("Score, full", lambda row: shown.percent(row.full)),
        Column("Score, reduced", lambda row: shown.percent(row.reduced)),
        *([Column("Task", lambda row: row.task, "task", text=True)] if any(row.task for row in rows) else []),
        Column("Example", lambda row: row.id, text=True),
    )


def tasks_table(per_task: Sequence[TaskRow]) -> Table:
    """The scores of each task."""
    return Table(
        "Score by task, full against reduced",
        per_task,
        Column("Task", lambda row: row.task, "task", text=True),
        Column("Questions", lambda row: shown.count(row.n), "questions"),
        Column("Full", lambda row: shown.percent(row.full), "full"),
        Column("Reduced", lambda row: shown.percent(row.reduced), "reduced"),
        Column("Drop in points", lambda row: shown.points(row.full - row.reduced), "drop"),
    )


def measures_table(measures: Sequence[Measured]) -> Table:
    """What each benchmark reports, beside the mean that the search saw."""
    return Table(
        "Benchmarks as the literature reports them, full against reduced",
        measures,
        Column("Benchmark", lambda row: row.benchmark, "benchmark", text=True),
        Column("Measure", lambda row: row.name, "measure", text=True),
        Column("Counted", lambda row: shown.count(row.units), "counted"),
        Column("Full", lambda row: shown.points(row.full), "full"),
        Column("Reduced", lambda row: shown.points(row.reduced), "reduced"),
        Column("Drop in points [95 %]", lambda row: words.interval(row.drop), "drop [95 %]"),
    )
