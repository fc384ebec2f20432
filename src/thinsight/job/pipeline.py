"""The main job, end to end: search a reduction on calibration data, prove it on test data, write the report.

Puts the stages in order and keeps the result of each, so that an interruption loses nothing. Knows nothing
about terminals, nor about how one search works (searching.py), and computes no number itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import baselines
from ..errors import Unreachable, Unsupported
from ..evaluation.consistency import rank_consistency
from ..evaluation.prompts import typical_batch
from ..progress import Watcher
from ..reduction import Reduction
from ..report import save_report_data, write_report
from ..report.data import Consistency, Picture, ReportData
from ..runtime import apply
from ..schedule import Schedule
from ..searches.search import AUTO
from ..timing import Measurement, measure
from .findings import Findings, Tested, measured_of, report_of
from .kept import picture_of, varied
from .prepared import Prepared, prepare
from .results import consistency_of
from .search_options import SearchOptions
from .searching import search_once

__all__ = ["SearchOptions", "SearchOutcome", "search_and_report"]

CONSISTENCY_EXAMPLES = 64


@dataclass(frozen=True)
class SearchOutcome:
    """What the main job leaves: the reduction (saved in ``folder``), the report and what it says."""

    folder: Path
    reduction: Reduction
    data: ReportData
    report: Path


def search_and_report(options: SearchOptions, watcher: Watcher | None = None) -> SearchOutcome:
    """Search, test, time, look, report.

    Everything that can be checked is checked before long work starts: options, output folder, both data sets,
    model, prompts. The results of the stages are kept in ``options.out``; with ``options.resume`` stages that
    are done are read instead of run, and the search continues inside its journal.

    Args:
        options: what to search, on what, and where to put it.
        watcher: told what is being done.

    Returns:
        What is in ``options.out`` at the end.

    Raises:
        ThinsightError: bad input, or a folder of another run.
    """
    prepared = prepare(options, options.first_ranker, watcher or Watcher())
    if options.warning:
        prepared.watcher.on_note(f"warning: {options.warning}")
    _check_runs(options.gsearch_layer, prepared)
    prepared.check_full_score(prepared.calibration)
    prepared.folder.bind(_settings(options, prepared))
    return _Run(options, prepared).run()


@dataclass(frozen=True)
class _Run:
    """One main job after everything is checked: a method per stage."""

    options: SearchOptions
    prepared: Prepared

    def run(self) -> SearchOutcome:
        folder, stage = self.prepared.folder.path, self.prepared.watcher.on_stage
        stage("Searching on the calibration set")
        search, reduction = search_once(self.options, self.prepared)
        tested = self._test(reduction)
        stage("Timing full against reduced")
        measurement = self._measure(reduction)
        stage("Measuring rank consistency")
        consistency = self._consistency()
        stage("Looking at kept tokens")
        pictures = self._pictures(reduction)
        stage("Writing the report")
        findings = Findings(search, tested, measurement, consistency, pictures)
        data = report_of(self.options, self.prepared, findings)
        reduction = replace(reduction, measured=measured_of(data, measurement))
        reduction.save_pretrained(folder)
        save_report_data(folder, data)
        return SearchOutcome(folder, reduction, data, write_report(folder / "report.html", data))

    def _test(self, reduction: Reduction) -> tuple[Tested, ...]:
        """Full, found, and its rivals at the same cost, all on the test set."""
        full = Reduction(Schedule.full(reduction.schedule.num_layers))
        methods = [
            ("full", "Full model", "full", full, ""),
            ("found", self.options.title, "found", reduction, "found on the calibration set"),
            *((key, name, "baseline", rival, note) for key, name, rival, note in self._rivals(reduction)),
        ]
        return tuple(self._tested(*method) for method in methods)

    def _tested(self, key: str, name: str, kind: str, reduction: Reduction, note: str) -> Tested:
        self.prepared.watcher.on_stage(f"Testing {name}")
        scores = self.prepared.test_scores(f"test-{key}", None if kind == "full" else reduction)
        return Tested(name, kind, reduction, scores.evaluation(), note, scores.doubt)

    def _rivals(self, reduction: Reduction) -> list[tuple[str, str, Reduction, str]]:
        """(key, name, reduction, note) of what the search has to be compared with at its own cost."""
        schedule, seed = reduction.schedule, self.options.seed
        budget = self.prepared.prompt.budget(schedule)
        layer = min(2, schedule.num_layers - 1)
        try:
            fastv = baselines.fastv(budget=budget, layer=layer, ranker=reduction.ranker)
        except Unreachable:  # the search may begin above layer 2 and go where a step at 2 cannot follow
            layer = next(i for i, rate in enumerate(schedule.keep_rates) if rate < 1)
            fastv = baselines.fastv(budget=budget, layer=layer, ranker=reduction.ranker)
        return [
            ("fastv", f"FastV-like (one step at layer {layer})", fastv, "the found ranker, one step"),
            ("uniform", "Uniform", baselines.uniform(schedule), "the found schedule, tokens evenly spread"),
            (
                "random",
                "Random",
                baselines.random(schedule, seed=seed),
                "the found schedule, tokens at random",
            ),
        ]

    def _measure(self, reduction: Reduction) -> Measurement:
        prepared = self.prepared

        def run() -> Measurement:
            batch_size = prepared.fix_batch_size("test")
            return measure(
                prepared.opened.model,
                typical_batch(
                    prepared.opened.processor, prepared.sets.test, batch_size, prepared.test.reader
                ),
                reduction,
                runs=self.options.timing_runs,
                warmup=1,
                new_tokens=self.options.new_tokens,
                progress=functools.partial(prepared.watcher.on_progress, "timing"),
            )

        return prepared.folder.once("timing", Measurement, run)

    def _consistency(self) -> Consistency:
        prepared = self.prepared

        def run() -> Consistency:
            examples = prepared.sets.calibration[:CONSISTENCY_EXAMPLES]
            found = rank_consistency(
                prepared.opened.model,
                prepared.opened.processor,
                examples,
                progress=prepared.watcher.on_progress,
                reader=prepared.calibration.reader,
            )
            return consistency_of(found)

        return prepared.folder.once("consistency", Consistency, run)

    def _pictures(self, reduction: Reduction) -> tuple[Picture, ...]:
        opened = self.prepared.opened
        longest = self.prepared.test.rules.max_new_tokens
        pictures = []
        for example in varied(self.prepared.sets.test, self.options.pictures):
            try:
                picture = picture_of(
                    opened.model,
                    opened.processor,
                    example,
                    reduction,
                    max_new_tokens=longest,
                    reader=self.prepared.test.reader,
                )
            except Unsupported as error:  # the report goes on without it
                self.prepared.watcher.on_note(f"No picture of example {example.id!r}: {error}")
            else:
                pictures.append(picture)
        return tuple(pictures)


def _check_runs(first_layer: int, prepared: Prepared) -> None:
    """Refuse now what the loaded model or the ranker cannot do at the first layer that may be reduced."""
    evaluator = prepared.calibration
    schedule = Schedule.step(evaluator.num_layers, first_layer, 0.5)
    apply(prepared.opened.model, evaluator.reduction(schedule)).remove()


def _settings(options: SearchOptions, prepared: Prepared) -> dict[str, Any]:
    """What a run is made of: a resumed one must agree in all of it."""
    return {
        "method": "frontier" if options.frontier else options.chosen,
        "budget": options.budget,
        "budget_unit": options.unit if options.budget is not None else None,
        "n_trials": options.n_trials if not options.searches_layers else None,
        "start": options.start,
        "model": options.model.model,
        "dtype": prepared.opened.info.dtype,
        "attn": options.model.attn,
        "data": prepared.sets.calibration_name,
        "test_data": prepared.sets.test_name,
        "limit": options.limit,
        "metric": options.metric,
        "max_drop": options.tolerance if options.budget is None else None,
        "ranker": AUTO if options.chooses_ranker else prepared.calibration.ranker.to_dict(),
        "solver": dict(options.layer_solver.settings),
        "confidence": options.confidence,
        "first_layer": options.gsearch_layer if options.budget is None else options.first_layer,
        "seed": options.seed,
        "calibration fingerprint": prepared.calibration.fingerprint,
        "test fingerprint": prepared.test.fingerprint,
    }
