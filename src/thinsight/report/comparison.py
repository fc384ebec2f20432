"""A comparison of methods at equal cost, as numbers: rows, intervals, tables, a figure.

Knows nothing about models, nor how the scores came about.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import shown, texts
from ..errors import MissingPackage
from ..evaluation.result import Interval, drop_interval
from ..records import write_atomically
from . import words

OURS = "sensitivity"


@dataclass(frozen=True)
class Run:
    """One reduction on the test set; ``refused`` says why there is none."""

    budget: float
    method: str
    title: str
    seed: int | None
    keep_rates: tuple[float, ...]
    ranker: dict[str, Any]
    spent: float  # in the budget's unit
    flops: float  # decoder prefill of the median prompt
    score: float
    per_example: tuple[float, ...]
    evaluations: float = 0.0
    seconds: float = 0.0
    calibration_score: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Comparison(shown.Shown):
    """All runs of one model, with what is needed to judge them."""

    model: str
    test_name: str
    test_hash: str
    unit: str
    n_trials: int
    seeds: tuple[int, ...]
    full_score: float
    full_flops: float
    full_per_example: tuple[float, ...]
    groups: tuple[str, ...]  # the image of each example
    runs: tuple[Run, ...]
    environment: dict[str, str]
    doubt: str = ""  # why the full model's score is too low to tell much

    def __rich__(self) -> Any:
        from rich.console import Group

        parts: list[Any] = [shown.line(f"Warning: {self.doubt}", "bold red")] if self.doubt else []
        return Group(*shown.spaced([*parts, *self._tables()]), "")

    def _tables(self) -> Iterable[shown.Table]:
        """One for each budget, best score first; our search stands out."""
        full = shown.percent(self.full_score)
        for budget, lines in by_budget(self):
            refused = [f"{line.title}: {line.refused}" for line in lines if line.refused]
            title = f"{budget_title(budget, self.unit)}; full model {full}"
            yield _drawn(title, [line for line in lines if not line.refused], refused)


@dataclass(frozen=True)
class MethodAtBudget:
    """A method at a budget, its seeds averaged example by example."""

    budget: float
    method: str
    title: str
    refused: str = ""
    seeds: int = 0
    spent: float = 0.0
    flops_ratio: float = 0.0
    score: float = 0.0
    spread: float = 0.0  # standard deviation over seeds
    drop: Interval | None = None
    behind: Interval | None = None  # our search's score minus this one
    evaluations: float = 0.0


def table(comparison: Comparison) -> list[MethodAtBudget]:
    """One line per budget and method, best score first within a budget, refusals last."""
    lines: list[MethodAtBudget] = []
    for budget in sorted({run.budget for run in comparison.runs}, reverse=True):
        here = [run for run in comparison.runs if run.budget == budget]
        ours = [run.per_example for run in here if run.method == OURS and not run.refused]
        at = [
            _line(comparison, [run for run in here if run.method == method], ours)
            for method in dict.fromkeys(run.method for run in here)
        ]
        lines += sorted(at, key=lambda line: (bool(line.refused), -line.score))
    return lines


def _line(comparison: Comparison, runs: Sequence[Run], ours: Sequence[Sequence[float]]) -> MethodAtBudget:
    first, done = runs[0], [run for run in runs if not run.refused]
    if not done:
        return MethodAtBudget(first.budget, first.method, first.title, first.refused)
    scores = np.mean([run.per_example for run in done], axis=0)  # (examples,)
    against = np.mean(ours, axis=0) if ours and first.method != OURS else None
    return MethodAtBudget(
        budget=first.budget,
        method=first.method,
        title=first.title,
        seeds=len(done),
        spent=max(run.spent for run in done),
        flops_ratio=comparison.full_flops / float(np.mean([run.flops for run in done])),
        score=float(scores.mean()),
        spread=float(np.std([run.score for run in done])),
        drop=drop_interval(comparison.full_per_example, scores, groups=comparison.groups),
        behind=None if against is None else drop_interval(against, scores, groups=comparison.groups),
        evaluations=float(np.mean([run.evaluations for run in done])),
    )


def to_csv(comparison: Comparison) -> str:
    """Every run, one line each."""
    rows: list[dict[str, Any]] = [
        {
            "budget": run.budget,
            "method": run.method,
            "seed": run.seed,  # None is written as nothing
            "score": run.score,
            "drop": None if run.refused else comparison.full_score - run.score,
            "spent": run.spent,
            "flops": run.flops,
            "flops_ratio": None if run.refused else comparison.full_flops / run.flops,
            "evaluations": run.evaluations,
            "seconds": round(run.seconds, 1),
            "calibration_score": run.calibration_score,
            "ranker": json.dumps(run.ranker) if run.ranker else None,
            "keep_rates": " ".join(f"{rate:.6g}" for rate in run.keep_rates),
            "refused": run.refused,
        }
        for run in comparison.runs
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(comparison: Comparison) -> str:
    """The tables under a heading for each budget, with a row for a method that was refused."""
    parts = [f"**Warning:** {texts.markdown(comparison.doubt)}", ""] if comparison.doubt else []
    for budget, lines in by_budget(comparison):
        title = budget_title(budget, comparison.unit)
        parts += [f"### {title}", "", _drawn(title, lines).markdown(), ""]
    return "\n".join(parts)


def by_budget(comparison: Comparison) -> list[tuple[float, list[MethodAtBudget]]]:
    """The lines of `table`, apart for each budget."""
    return [(budget, list(lines)) for budget, lines in itertools.groupby(table(comparison), lambda line: line.budget)]


def _drawn(title: str, lines: Sequence[MethodAtBudget], notes: Sequence[str] = ()) -> shown.Table:
    def known(show: Callable[[MethodAtBudget], str]) -> Callable[[MethodAtBudget], str]:
        return lambda line: "" if line.refused else show(line)

    def score(line: MethodAtBudget) -> str:
        spread = f" ± {shown.points(line.spread)}" if line.seeds > 1 else ""
        return f"refused: {line.refused}" if line.refused else f"{shown.points(line.score)}{spread}"

    def evaluations(line: MethodAtBudget) -> str:
        return f"{line.evaluations:.1f}" if line.evaluations else ""

    return shown.Table(
        title,
        lines,
        shown.Column("method", lambda line: line.title, text=True),
        shown.Column("score", score, "score (%)"),
        shown.Column("drop [95 %]", known(lambda line: words.interval(line.drop))),
        shown.Column("ours minus this [95 %]", known(lambda line: words.interval(line.behind))),
        shown.Column("FLOPs", known(lambda line: shown.ratio(line.flops_ratio)), "full / this"),
        shown.Column("evaluations", evaluations, places=("page", "markdown")),
        strong=lambda line: line.method == OURS and not line.refused,
        notes=notes,
    )


def budget_title(budget: float, unit: str) -> str:
    """A budget in words."""
    if unit == "keep":
        return f"{100 * budget:g} % of the vision tokens, averaged over the layers"
    return f"budget {budget:g} {unit}"


def draw(comparison: Comparison, path: Path, most: int = 8) -> None:
    """Accuracy against decoder GFLOPs, as in the paper's Figure 4: our search, the searches and the best
    baselines; the format is the file's ending.

    Raises:
        ThinsightError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage(
            "a figure needs matplotlib: pip install 'thinsight[figures]'; the tables are written"
        ) from None
    done = [run for run in comparison.runs if not run.refused]
    means = {m: np.mean([r.score for r in done if r.method == m]) for m in {r.method for r in done}}
    shown = sorted(means, key=lambda m: (m != OURS, -means[m]))[:most]
    unit, name = (1e12, "TFLOPs") if comparison.full_flops >= 1e12 else (1e9, "GFLOPs")
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, method in enumerate(shown):
        runs = [run for run in done if run.method == method]
        budgets = sorted({run.budget for run in runs})
        at = [[run for run in runs if run.budget == budget] for budget in budgets]
        flops = [float(np.mean([run.flops for run in each])) / unit for each in at]
        scores = [100 * float(np.mean([run.score for run in each])) for each in at]
        bold = method == OURS
        axes.plot(
            flops, scores, marker="osD^v<>P"[place % 8], linewidth=2.4 if bold else 1.2, markersize=5,
            label=runs[0].title, zorder=3 if bold else 2,
        )  # fmt: skip
    axes.axhline(100 * comparison.full_score, color="0.6", linewidth=1, linestyle="--", zorder=1)
    full = comparison.full_flops / unit, 100 * comparison.full_score
    axes.plot(*full, marker="*", color="0.3", markersize=9, linestyle="", label="full model")
    axes.set_xlabel(f"decoder {name} of a prefill")
    axes.set_xlim(left=0)
    axes.set_ylabel("score on the test set (%)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=200)
    write_atomically(path, buffer.getvalue())
