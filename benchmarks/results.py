"""The results page: every method at equal cost on the embedded models, and what the paper claims, checked.

`python -m benchmarks.results` runs (or continues) the comparisons into out/results and writes
benchmarks/results/: a page, and per model the runs as CSV and the figure. Nothing on the page is typed by
hand: a claim that fails is printed as one that failed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import thinsight as ts
from thinsight.evaluation import Interval
from thinsight.job.compare import compare
from thinsight.job.findings import MedianPrompt, drop_of
from thinsight.job.opening import RunFolder
from thinsight.job.options import BUDGETS, CompareOptions, ModelOptions, method_names
from thinsight.loading import load_demo
from thinsight.report.comparison import OURS, Comparison, MethodAtBudget, markdown, table
from thinsight.report.words import interval
from thinsight.shown import typed

MODELS = ("demo", "demo-internvl")
STEPS = {"demo": 32, "demo-internvl": 8}  # of G-Search's counts: an eighth of the tokens
PAGE = Path(__file__).parent / "results"
SEEDS, N_TRIALS = 3, 16
TRANSFER_BUDGET = 0.25
ADAPTIVE, ADAPTIVE_BUDGETS, ADAPTIVE_MODELS = "search-adaptive", (0.25, 0.125), ("demo-internvl",)
SHOWN = tuple(name for name in method_names() if name != ADAPTIVE)  # that one has a section of its own
ABOUT = f"""Searches choose on the calibration set (384 questions), {N_TRIALS} evaluations each, seeds
0 to {SEEDS - 1}; scores are on the test set (1,152 questions), which has no part in choosing. Intervals:
95 %, of the paired scores by image (`thinsight.drop_interval`), seeds averaged per question. Every method
spends the same mean keep rate, within one token per layer and never more. The sensitivity and the random
search also choose the ranker, from the same four (text attention of the instruction or of the last token;
`staged`: vision attention or CDPruner before layer 0, text attention behind it). P-Sigmoid ranks by text
attention, as in the paper, and by `staged` where layer 0 alone would spend the budget. Methods that drop
before layer 0 have the whole of it from there on. Methods whose layers are numbered for 32 are scaled to the
depth where they cannot reach a budget otherwise. Some cannot reach one at all: with the first layers full
there is nothing left.

The models are small and were trained so that text attention ranks well: what is best here need not be on
yours. `thinsight compare` makes the same tables for your model and data."""

ABOUT_ADAPTIVE = """The adaptive search spends the same budget on average over the calibration set, more on
some prompts than on others; seed 0, as many evaluations. A difference above 0 is a gain."""


@dataclass(frozen=True)
class Scored:
    """A schedule on a model's test set."""

    keep_rates: tuple[float, ...]
    score: float
    full_score: float
    drop: float
    low: float
    high: float
    flops_ratio: float
    mean_keep_rate: float


class Bench:
    """One embedded model with its test set, and a folder that keeps what was measured."""

    def __init__(self, name: str, out: Path) -> None:
        self.name = name
        self.folder = RunFolder(out / f"{name}-extra", resume=True)
        self.model, self.processor = load_demo(name=name)

    @cached_property
    def calibration(self) -> ts.Evaluator:
        return ts.Evaluator(self.model, self.processor, ts.load_examples("demo:calibration"))

    @cached_property
    def test(self) -> ts.Evaluator:
        return ts.Evaluator(self.model, self.processor, ts.load_examples("demo:test"))

    def gsearch(self) -> Scored:
        """G-Search without a drop on the calibration set, scored on the test set."""

        def run() -> Scored:
            journal = self.folder.path / "gsearch.jsonl"
            found = ts.gsearch(self.calibration, 0.0, step=STEPS[self.name], study=journal, resume=True)
            return self._score(found.reduction)

        return self.folder.once(f"gsearch-{STEPS[self.name]}", Scored, run)

    def score(self, what: str, reduction: ts.Reduction) -> Scored:
        """A reduction on the test set, kept under a name."""
        return self.folder.once(what, Scored, lambda: self._score(reduction))

    def _score(self, reduction: ts.Reduction) -> Scored:
        full, reduced = self.test.full, self.test(reduction)
        drop = drop_of(full, reduced, self.test.examples)
        prompt = MedianPrompt.of(self.model.config, self.test.prompt_sizes)
        return Scored(
            reduction.schedule.keep_rates,
            reduced.score,
            full.score,
            drop.mean,
            drop.low,
            drop.high,
            prompt.flops() / prompt.flops(reduction.schedule),
            reduction.schedule.mean_keep_rate,
        )


def comparison_of(name: str, out: Path, budgets: Sequence[float] = BUDGETS) -> Comparison:
    """All methods at these budgets on one model; continues what is there."""
    options = CompareOptions(
        model=ModelOptions(name),
        seeds=tuple(range(SEEDS)),
        n_trials=N_TRIALS,
        budgets=tuple(budgets),
        methods=SHOWN,
        out=out / name,
        resume=True,
    )
    return compare(options).comparison


def adaptive_of(name: str, out: Path) -> Comparison:
    """Our search with and without a schedule per prompt, one seed, from the same folder."""
    options = CompareOptions(
        model=ModelOptions(name),
        seeds=(0,),
        n_trials=N_TRIALS,
        budgets=ADAPTIVE_BUDGETS,
        methods=("search-sensitivity", ADAPTIVE),
        out=out / name,
        resume=True,
    )
    return compare(options).comparison


def adaptive_lines(comparisons: dict[str, Comparison]) -> list[str]:
    """A row for each model and budget."""
    lines = [
        "| model | budget | same schedule for all | per prompt | FLOPs | difference [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for name, comparison in comparisons.items():
        at = {(line.budget, line.method): line for line in table(comparison) if not line.refused}
        for budget in comparison_budgets(comparison):
            plain, own = at.get((budget, OURS)), at.get((budget, "adaptive"))
            if plain is None or own is None or own.behind is None:
                continue
            gap = own.behind
            lines.append(
                f"| {name} | {100 * budget:g} % | {100 * plain.score:.1f} | {100 * own.score:.1f} | "
                f"{plain.flops_ratio:.2f}x, {own.flops_ratio:.2f}x | "
                f"{interval_words(Interval(-gap.mean, -gap.high, -gap.low))} |"
            )
    return lines


def comparison_budgets(comparison: Comparison) -> list[float]:
    """Budgets from large to small."""
    return sorted({run.budget for run in comparison.runs}, reverse=True)


def transfers(benches: dict[str, Bench], comparisons: dict[str, Comparison]) -> list[str]:
    """The paper's Table 4: a schedule found on the other model, resampled to this one's depth."""
    lines = ["| model | schedule | score | drop [95 %] | mean keep rate | FLOPs |", "|---|---|---|---|---|---|"]
    for name, bench in benches.items():
        other = next(each for each in benches if each != name)
        found = {"own": bench.gsearch(), "other": benches[other].gsearch()}
        depth = len(found["own"].keep_rates)
        lines.append(_transfer(name, "G-Search, its own", found["own"]))
        moved = ts.Reduction(ts.Schedule(found["other"].keep_rates).resample(depth))
        scored = bench.score("gsearch-transferred", moved)
        lines.append(_transfer(name, f"G-Search, of {other}", scored))
        own = _best(comparisons[name])
        lines.append(_transfer(name, "sensitivity, its own, 25 %", bench.score("own-25", own)))
        theirs = _best(comparisons[other])
        moved = ts.Reduction(theirs.schedule.resample(depth), theirs.ranker)
        lines.append(_transfer(name, f"sensitivity, of {other}, 25 %", bench.score("moved-25", moved)))
    return lines


def _best(comparison: Comparison) -> ts.Reduction:
    """Our search's first seed at the transfer budget."""
    run = next(run for run in comparison.runs if run.method == OURS and run.budget == TRANSFER_BUDGET and run.seed == 0)
    return ts.Reduction(ts.Schedule(run.keep_rates), run.ranker)


def interval_words(value: Interval) -> str:
    return typed(interval(value))


def _transfer(name: str, what: str, scored: Scored) -> str:
    drop = interval_words(Interval(scored.drop, scored.low, scored.high))
    kept = f"{100 * scored.mean_keep_rate:.1f} %"
    return f"| {name} | {what} | {100 * scored.score:.1f} | {drop} | {kept} | {scored.flops_ratio:.2f}x fewer |"


def claims(name: str, comparison: Comparison, gsearch: Scored) -> list[str]:
    """What is claimed, and whether it holds on this model."""
    lines = table(comparison)
    at = {(line.budget, line.method): line for line in lines if not line.refused}
    said = [_gsearch_claim(gsearch), _sigmoid_claim(at)]
    said += [_ours_claim(budget, [line for line in at.values() if line.budget == budget]) for budget in BUDGETS]
    said.append(_random_claim(at))
    return [f"- {each}" for each in said]


def verdict(holds: bool) -> str:
    return "**Holds.**" if holds else "**Fails.**"


def _gsearch_claim(found: Scored) -> str:
    holds = found.flops_ratio >= 2 and found.drop <= 0.01
    interval = interval_words(Interval(found.drop, found.low, found.high))
    return (
        f"{verdict(holds)} G-Search's own schedule needs at least 2x fewer FLOPs at a drop of at most 1 "
        f"point: {found.flops_ratio:.2f}x, {interval}."
    )


def _sigmoid_claim(at: dict[tuple[float, str], MethodAtBudget]) -> str:
    ours, fastv = at.get((0.125, "psigmoid")), at.get((0.125, "fastv"))
    if ours is None or fastv is None:
        return "**Cannot be said.** P-Sigmoid against FastV at 12.5 %: one of them cannot reach the budget."
    gap = 100 * (ours.score - fastv.score)
    return (
        f"{verdict(gap >= 3)} P-Sigmoid beats FastV at 12.5 % by at least 3 points: {100 * ours.score:.1f} "
        f"against {100 * fastv.score:.1f}."
    )


def _ours_claim(budget: float, lines: Sequence[MethodAtBudget]) -> str:
    ours = next((line for line in lines if line.method == OURS), None)
    if ours is None:
        return f"**Fails.** The sensitivity search found nothing at {100 * budget:g} %."
    above = [line for line in lines if line.behind is not None and line.behind.high < 0]
    better = [line for line in lines if line.behind is not None and line.behind.mean < 0]
    text = (
        f"{verdict(not above)} At {100 * budget:g} % the sensitivity search is at or above every other row "
        f"within its interval: {100 * ours.score:.1f}"
    )
    if above:
        text += "; above it: " + ", ".join(f"{line.title} {100 * line.score:.1f}" for line in above)
    elif better:
        text += "; higher, but not beyond chance: " + ", ".join(
            f"{line.title} {100 * line.score:.1f}" for line in better
        )
    return text + "."


def _random_claim(at: dict[tuple[float, str], MethodAtBudget]) -> str:
    gaps = [
        (budget, at[budget, OURS].score - at[budget, "search-random"].score)
        for budget in BUDGETS
        if (budget, "search-random") in at and (budget, OURS) in at
    ]
    mean = sum(gap for _, gap in gaps) / max(1, len(gaps))
    each = ", ".join(f"{100 * budget:g} %: {100 * gap:+.1f}" for budget, gap in gaps)
    return (
        f"{verdict(mean > 0)} The sensitivity search is above random search of equal evaluations on average "
        f"over seeds: {100 * mean:+.1f} points ({each})."
    )


def write_page(out: Path) -> Path:
    """Everything into benchmarks/results/."""
    PAGE.mkdir(exist_ok=True)
    adaptive = {name: adaptive_of(name, out) for name in ADAPTIVE_MODELS}
    # last, so that the folders' tables and figures are these
    comparisons = {name: comparison_of(name, out) for name in MODELS}
    benches = {name: Bench(name, out) for name in MODELS}
    about = comparisons["demo"].environment
    parts = [
        "# Results on the embedded models",
        "",
        f"Made by `make results` on {datetime.now(timezone.utc):%Y-%m-%d}, thinsight {about['thinsight']}, "
        f"transformers {about['transformers']}, torch {about['torch']}, {about['system']}. {ABOUT}",
    ]
    for name, comparison in comparisons.items():
        parts += ["", f"## {name} (full model {100 * comparison.full_score:.1f} %)", ""]
        parts += [*claims(name, comparison, benches[name].gsearch()), ""]
        parts += [f"![Score against FLOPs]({name}.png)", "", markdown(comparison)]
        for kind in ("csv", "png"):
            shutil.copy(out / name / f"comparison.{kind}", PAGE / f"{name}.{kind}")
    parts += ["## Schedules transfer", "", "The paper's Table 4: a schedule of the other model, resampled to"]
    parts += ["this one's depth.", "", *transfers(benches, comparisons), ""]
    parts += ["## A schedule per prompt", "", ABOUT_ADAPTIVE, "", *adaptive_lines(adaptive), ""]
    page = PAGE / "README.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/results"))
    parser.add_argument("--only", choices=MODELS, help="run this model's comparison and write no page")
    parser.add_argument("--budgets", type=float, nargs="+", help="of --only: a part of them, to run beside others")
    arguments = parser.parse_args()
    if arguments.only:
        comparison_of(arguments.only, arguments.out, arguments.budgets or BUDGETS)
        if not arguments.budgets:
            if arguments.only in ADAPTIVE_MODELS:
                adaptive_of(arguments.only, arguments.out)
            Bench(arguments.only, arguments.out).gsearch()
        return
    print(f"Written: {write_page(arguments.out)}")


if __name__ == "__main__":
    main()
