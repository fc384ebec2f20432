"""A comparison of methods at equal cost, as numbers: rows, intervals, tables, a figure.

Knows nothing about models, nor how the scores came about.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import shown, texts
from ..certificate import Certificate, in_points, shown_p
from ..errors import MissingPackage
from ..evaluation.base import SearchEvaluator
from ..evaluation.examples import Example
from ..evaluation.result import Evaluation, Interval, drop_interval
from ..records import write_atomically
from ..schedule import Schedule
from ..searches.certify import certify
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
    figures: dict[str, float] = field(default_factory=dict)  # what benchmarks report of it, see `benchmarks.headlines`

    def __repr__(self) -> str:
        said = f"refused: {self.refused}" if self.refused else f"score {self.score:.4g}"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return texts.brief(f"Run({self.method!r} at {self.budget:g}{seed}: {said})")


@dataclass(frozen=True)
class CertifiedCost:
    """What a method costs at a promised drop: its own budgets, from costly to cheap, are the path that is tested.

    ``flops_ratio`` is the full model's FLOPs over those of its cheapest certified run, at ``budget``; 1 and None where
    none is certified.
    """

    method: str
    title: str
    seed: int | None
    budget: float | None
    flops_ratio: float
    certificate: Certificate


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
    certified: tuple[CertifiedCost, ...] = ()  # where a drop was to be promised
    full_figures: dict[str, float] = field(default_factory=dict)  # as `Run.figures`, of the full model

    def __repr__(self) -> str:
        methods, budgets = ({getattr(run, name) for run in self.runs} for name in ("method", "budget"))
        return texts.brief(
            f"Comparison({self.model}: {len(methods)} methods at {len(budgets)} budgets, "
            f"{len(self.full_per_example)} examples of {self.test_name}, full model {self.full_score:.4g})"
        )

    def _sentences(self) -> Iterable[str]:
        return [f"Warning: {self.doubt}"] if self.doubt else []

    def __rich__(self) -> Any:
        from rich.console import Group

        parts: list[Any] = [shown.line(f"Warning: {self.doubt}", "bold red")] if self.doubt else []
        return Group(*shown.spaced([*parts, *self._tables()]), "")

    def _tables(self) -> Iterable[shown.Table]:
        """One for each budget, best score first, our search standing out; and what each method costs for certain."""
        own = (f"{name} {shown.points(value)}" for name, value in self.full_figures.items())
        full = "; ".join([shown.percent(self.full_score), *own])
        for budget, lines in by_budget(self):
            refused = [f"{line.title}: {line.refused}" for line in lines if line.refused]
            title = f"{budget_title(budget, self.unit)}; full model {full}"
            yield _drawn(title, [line for line in lines if not line.refused], [*self.full_figures], refused)
        if self.certified:
            yield certified_table(self)


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
    figures: dict[str, float] = field(default_factory=dict)


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
        figures={
            name: float(np.mean([run.figures[name] for run in done if name in run.figures])) for name in first.figures
        },
    )


class _Stored(SearchEvaluator):
    """An evaluator that has run everything before: it tells the scores that are stored."""

    num_vision_tokens = 1  # no count is told to it

    def __init__(self, comparison: Comparison, examples: Sequence[Example], runs: Sequence[Run], metric: str) -> None:
        self.num_layers, self.examples, self.metric_names = len(runs[0].keep_rates), examples, metric
        self.full = Evaluation(comparison.full_score, np.array(comparison.full_per_example))
        self.found = {Schedule(run.keep_rates): np.array(run.per_example) for run in runs}

    def __call__(self, candidate: Any, /) -> Evaluation:
        scores = self.found[candidate]
        return Evaluation(float(scores.mean()), scores)


def certified_costs(
    comparison: Comparison, examples: Sequence[Example], max_drop: float, confidence: float = 0.95, metric: str = ""
) -> tuple[CertifiedCost, ...]:
    """What each method costs at a promised drop, cheapest first; a method of several seeds once for each.

    Its budgets, which were given before the test set was looked at, are the path; the scores are those of the
    comparison, so that nothing is run again. Methods that were refused everywhere are left out.

    Args:
        comparison: with all of its runs.
        examples: the test set, in the order of the scores.
        max_drop, confidence: see `thinsight.certify`.
        metric: the names of what the scores are of.

    Raises:
        ThinsightError: what cannot be promised.
    """
    ladders: dict[tuple[str, int | None], list[Run]] = {}
    for run in sorted(comparison.runs, key=lambda run: -run.flops):
        ladder = ladders.setdefault((run.method, run.seed), [])
        if not run.refused and (not ladder or _cheaper(run, ladder[-1])):
            ladder.append(run)
    found = []
    for (method, seed), ladder in ladders.items():
        if not ladder:
            continue
        path = [Schedule(run.keep_rates) for run in ladder]
        certificate = certify(path, _Stored(comparison, examples, ladder, metric), max_drop, confidence)
        best = None if certificate.place is None else ladder[certificate.place]
        budget, ratio = (None, 1.0) if best is None else (best.budget, comparison.full_flops / best.flops)
        found.append(CertifiedCost(method, ladder[0].title, seed, budget, ratio, certificate))
    return tuple(sorted(found, key=lambda each: -each.flops_ratio))


def _cheaper(run: Run, last: Run) -> bool:
    """Whether a run goes on where a path has come to; of two that cost the same, whatever their budgets, the first
    stands for both."""
    rates = zip(run.keep_rates, last.keep_rates, strict=True)
    return run.flops < last.flops and any(cheap < costly for cheap, costly in rates)


def certified_table(comparison: Comparison) -> shown.Table:
    """What each method costs at the promised drop, and where its path ended."""

    def tested(line: CertifiedCost) -> str:
        certificate = line.certificate
        return "" if certificate.schedule is None else f"{certificate.losses} / {certificate.wins}"

    def ended(line: CertifiedCost) -> str:
        return line.certificate.reason or "all of its budgets are certified"

    first = comparison.certified[0].certificate
    sure = f"{100 * first.confidence:g} % confidence"
    budget = "mean keep rate" if comparison.unit == "keep" else comparison.unit
    notes = [
        f"Each method's budgets, from costly to cheap, were tested until one failed; 1.00{shown.TIMES} is the full "
        f"model. Several methods on one test set are several promises: each one holds with {sure}, all of them "
        "together with less, and so does the best one, picked by looking at this table."
    ]
    return shown.Table(
        f"What each method costs at {in_points(first.max_drop)}, certified with {sure}",
        comparison.certified,
        shown.Column("method", _named, text=True),
        shown.Column("FLOPs", lambda line: shown.ratio(line.flops_ratio), "full / this"),
        shown.Column("budget", lambda line: "" if line.budget is None else f"{line.budget:g}", budget),
        shown.Column("losses / wins", tested),
        shown.Column("p", lambda line: "" if line.certificate.p_value is None else shown_p(line.certificate.p_value)),
        shown.Column("then", ended, text=True),
        strong=lambda line: line.method == OURS,
        notes=notes,
    )


def _named(line: CertifiedCost) -> str:
    return line.title if not line.seed else f"{line.title}, seed {line.seed}"


def to_csv(comparison: Comparison) -> str:
    """Every run, one line each; where a drop was to be promised, with what came of it."""
    paths = {(each.method, each.seed): each.certificate for each in comparison.certified}

    def promised(run: Run) -> dict[str, Any]:
        if not comparison.certified:
            return {}
        certificate = paths.get((run.method, run.seed))
        return {"certified": certificate.outcome(Schedule(run.keep_rates)) if certificate and not run.refused else None}

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
            **{name: run.figures.get(name) for name in comparison.full_figures},
            **promised(run),
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
        parts += [f"### {title}", "", _drawn(title, lines, [*comparison.full_figures]).markdown(), ""]
    if comparison.certified:
        found = certified_table(comparison)
        parts += [f"### {found.title}", "", found.markdown(), "", *found.notes, ""]
    return "\n".join(parts)


def by_budget(comparison: Comparison) -> list[tuple[float, list[MethodAtBudget]]]:
    """The lines of `table`, apart for each budget."""
    return [(budget, list(lines)) for budget, lines in itertools.groupby(table(comparison), lambda line: line.budget)]


def _drawn(
    title: str, lines: Sequence[MethodAtBudget], figures: Sequence[str], notes: Sequence[str] = ()
) -> shown.Table:
    def known(show: Callable[[MethodAtBudget], str]) -> Callable[[MethodAtBudget], str]:
        return lambda line: "" if line.refused else show(line)

    def score(line: MethodAtBudget) -> str:
        spread = f" ± {shown.points(line.spread)}" if line.seeds > 1 else ""
        return f"refused: {line.refused}" if line.refused else f"{shown.points(line.score)}{spread}"

    def figure(name: str) -> Callable[[MethodAtBudget], str]:
        return known(lambda line: shown.points(line.figures[name]))

    def evaluations(line: MethodAtBudget) -> str:
        return f"{line.evaluations:.1f}" if line.evaluations else ""

    return shown.Table(
        title,
        lines,
        shown.Column("method", lambda line: line.title, text=True),
        shown.Column("score", score, "score (%)"),
        *(shown.Column(name, figure(name)) for name in figures),
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
