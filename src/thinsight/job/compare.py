"""Methods side by side at equal cost: every baseline and every search, chosen on calibration, scored on test.

Keeps the result of every run, so that an interruption loses nothing. Knows nothing about terminals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import notebook
from ..baselines import BASELINES
from ..budget import Budget
from ..certificate import least_examples
from ..errors import BadInput, MissingPackage, Unreachable, Unsupported
from ..evaluation.benchmarks import headlines
from ..evaluation.consistency import attention_statistics
from ..progress import Watcher
from ..ranking import get_ranker
from ..records import encode, write_atomically
from ..reduction import Reduction
from ..report.comparison import Comparison, Run, certified_costs, draw, markdown, to_csv
from ..schedule import Adaptive, Schedule
from ..searches.search import SEARCHES, rankers_for
from .opening import Limits, Prepared, content_hash, environment, limits_of
from .options import SEARCH_PREFIX, CompareOptions, seeded
from .workers import prepared_run

STATISTICS_EXAMPLES = 64


@dataclass(frozen=True)
class CompareOutcome:
    """The comparison and the files that hold it."""

    comparison: Comparison
    files: tuple[Path, ...]
    note: str = ""


@dataclass(frozen=True)
class _Found:
    """What a method came to on the calibration set, as the run folder keeps it."""

    keep_rates: tuple[float, ...]
    ranker: dict[str, Any]
    evaluations: float
    seconds: float
    score: float | None
    refused: str = ""
    adaptive: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, reduction: Reduction, evaluations: float = 0.0, seconds: float = 0.0, score: float | None = None
    ) -> _Found:
        family = None if reduction.adaptive is None else reduction.adaptive.to_dict()
        rates, ranker = reduction.schedule.keep_rates, dict(reduction.ranker)
        return cls(rates, ranker, evaluations, seconds, score, adaptive=family)

    @property
    def reduction(self) -> Reduction:
        family = None if self.adaptive is None else Adaptive.from_dict(self.adaptive)
        return Reduction(Schedule(self.keep_rates), self.ranker, adaptive=family)


def compare(options: CompareOptions, watcher: Watcher | None = None) -> CompareOutcome:
    """Run every method at every budget, and write JSON, CSV, Markdown and a figure into ``options.out``.

    Raises:
        ThinsightError: bad input, before long work starts, or a folder of another comparison.
    """
    with prepared_run(options, options.own_ranker, watcher or notebook.watcher()) as prepared:
        return _compare(options, prepared)


def _compare(options: CompareOptions, prepared: Prepared) -> CompareOutcome:
    if options.max_drop is not None:
        least, tested = least_examples(options.max_drop, confidence=options.certainty), len(prepared.sets.test)
        if tested < least:
            prepared.watcher.on_note(
                f"warning: {tested} test examples certify no method at max_drop {options.max_drop:g}, were all "
                f"answers the same: give at least {least:,}, or a larger --max-drop"
            )
    searches = any(map(_searches, options.chosen))
    prepared.check_full_score(prepared.test, *([prepared.calibration] if searches else []))
    prepared.folder.bind(
        {
            "what": "compare",
            "unit": options.unit,
            "n_trials": options.trials,
            "ranker": get_ranker(options.own_ranker).to_dict(),
            "calibration fingerprint": prepared.calibration.fingerprint,
            "test fingerprint": prepared.test.fingerprint,
        }
    )
    return _Comparing(options, prepared).run()


@dataclass
class _Comparing:
    """A comparison after everything is checked."""

    options: CompareOptions
    prepared: Prepared

    def run(self) -> CompareOutcome:
        options, prepared = self.options, self.prepared
        full = prepared.test_scores("full", None)
        limits = prepared.folder.once("limits", Limits, self._limits)
        cells = [
            (limits.budget(prepared.opened.model.config, value, options.unit), value, name, seed)
            for value in options.budgets
            for name in options.chosen
            for seed in (options.seeds if seeded(name) else (None,))
        ]
        if prepared.test.workers > 1:
            made = [self._found(*cell) for cell in cells if not _searches(cell[2])]
            prepared.test_scores_ahead(
                {f"test-{key}": found.reduction for key, found in made if not found.refused}, "Scoring all baselines"
            )
        runs = tuple(self._one(*cell) for cell in cells)
        comparison = Comparison(
            model=options.model.model,
            test_name=prepared.sets.test_name,
            test_hash=content_hash(prepared.sets.test),
            unit=options.unit,
            n_trials=options.trials,
            seeds=options.seeds,
            full_score=full.score,
            full_flops=prepared.prompt.flops(),
            full_per_example=full.per_example,
            groups=tuple(str(example.group) for example in prepared.sets.test),
            runs=runs,
            environment=environment(prepared.opened),
            doubt=full.doubt,
            full_figures=self._figures(full.per_example),
        )
        if options.max_drop is not None:
            prepared.watcher.on_stage("Certifying on the scores of the test set")
            names, told = prepared.test.metric_names, (options.max_drop, options.certainty)
            certified = certified_costs(comparison, prepared.sets.test, *told, metric=names)
            comparison = replace(comparison, certified=certified)
        prepared.watcher.on_stage("Writing the comparison")
        return _written(comparison, prepared.folder.path)

    def _limits(self) -> Limits:
        if self.options.unit == "ms":
            self.prepared.watcher.on_stage("Profiling the device")
            self.prepared.fix_batch_size("calibration")
        return limits_of(self.prepared.calibration, self.options.budgets[0], self.options.unit)

    def _one(self, budget: Budget, value: float, name: str, seed: int | None) -> Run:
        """One method at one budget: found without the test set, then scored on it."""
        title = SEARCHES[name.removeprefix(SEARCH_PREFIX)].title if _searches(name) else BASELINES[name].title
        words_of_seed = "" if seed is None else f", seed {seed}"
        self.prepared.watcher.on_stage(f"{title}, budget {value:g}{words_of_seed}")
        key, found = self._found(budget, value, name, seed)
        method = name.removeprefix(SEARCH_PREFIX) if name != SEARCH_PREFIX + "random" else name
        if found.refused:
            empty: tuple[float, ...] = ()
            return Run(value, method, title, seed, empty, {}, 0, 0, 0, empty, refused=found.refused)
        reduction = found.reduction
        scored = self.prepared.test_scores(f"test-{key}", reduction)
        return Run(
            budget=value,
            method=method,
            title=title,
            seed=seed,
            keep_rates=found.keep_rates,
            ranker=dict(found.ranker),
            spent=reduction.average(budget.spent),
            flops=reduction.average(self.prepared.prompt.flops),
            score=scored.score,
            per_example=scored.per_example,
            evaluations=found.evaluations,
            seconds=found.seconds,
            calibration_score=found.score,
            figures=self._figures(scored.per_example),
        )

    def _found(self, budget: Budget, value: float, name: str, seed: int | None) -> tuple[str, _Found]:
        """What a method comes to, and its name in the run folder."""
        key = f"{self.options.unit}-{value:g}-{name}" + ("" if seed is None else f"-seed{seed}")
        return key, self.prepared.folder.once(f"found-{key}", _Found, lambda: self._find(budget, name, seed, key))

    def _figures(self, scores: Sequence[float]) -> dict[str, float]:
        """What the benchmarks of the test set report of them, where these have a measure of their own."""
        return {} if self.options.metric else headlines(self.prepared.sets.test, np.array(scores))

    def _find(self, budget: Budget, name: str, seed: int | None, key: str) -> _Found:
        if _searches(name):
            self.prepared.fix_batch_size("calibration")
        try:
            if _searches(name):
                return self._search(budget, name.removeprefix(SEARCH_PREFIX), seed or 0, key)
            return _Found.of(self._baseline(budget, name, seed))
        except (Unreachable, Unsupported) as error:
            return _Found((), {}, 0.0, 0.0, None, str(error))

    def _baseline(self, budget: Budget, name: str, seed: int | None) -> Reduction:
        baseline = BASELINES[name]
        statistics = self._statistics if baseline.needs_statistics else None
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        try:
            return baseline.make(budget, statistics=statistics, **options)
        except (BadInput, Unreachable):
            # layers numbered for 32 may be too deep for a shallow model
            return baseline.make(budget, statistics=statistics, scale_layers=True, **options)

    @cached_property
    def _statistics(self) -> Any:
        opened, examples = self.prepared.opened, self.prepared.sets.calibration[:STATISTICS_EXAMPLES]
        reader = self.prepared.calibration.reader
        return attention_statistics(opened.model, opened.processor, examples, reader=reader)

    def _search(self, budget: Budget, name: str, seed: int, key: str) -> _Found:
        evaluator = self.prepared.calibration
        first_alone = Schedule((1.0, *[0.0] * (budget.num_layers - 1)))
        arguments: dict[str, Any] = {}
        if SEARCHES[name].chooses_ranker:
            arguments["rankers"] = rankers_for(evaluator)
        elif not budget.holds(first_alone) and evaluator.first_layer > 0:
            evaluator = evaluator.with_ranker("staged")  # the budget is spent before the one asked for can rank
        result = SEARCHES[name](
            evaluator,
            budget,
            n_trials=self.options.trials,
            seed=seed,
            study=self.prepared.folder.path / "studies" / f"{key}.jsonl",
            resume=True,
            observer=self.prepared.watcher,
            **arguments,
        )
        return _Found.of(result.reduction, float(result.evaluations), result.seconds, result.score)


def _searches(name: str) -> bool:
    return name.startswith(SEARCH_PREFIX)


def _written(comparison: Comparison, folder: Path) -> CompareOutcome:
    texts = {
        "comparison.json": json.dumps(encode(comparison), indent=1, allow_nan=False),
        "comparison.csv": to_csv(comparison),
        "comparison.md": markdown(comparison),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text, "free the disk, then resume")
    paths, note = [folder / name for name in texts], ""
    try:
        for name in ("comparison.pdf", "comparison.png"):
            draw(comparison, folder / name)
            paths.append(folder / name)
    except MissingPackage as error:
        note = str(error)
    return CompareOutcome(comparison, tuple(paths), note)
