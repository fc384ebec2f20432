"""The main job, end to end: search a reduction on calibration data, prove it on test data, write the report.

Puts the stages in order and keeps the result of each, so that an interruption loses nothing. Knows nothing
about terminals, nor about how one search works.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import baselines
from ..budget import Budget, KeepBudget
from ..errors import BadInput, Unreachable, Unsupported
from ..evaluation.consistency import rank_consistency
from ..evaluation.prompts import typical_batch
from ..evaluation.result import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Evaluation, Measurement, RankConsistency
from ..loading import base_name, checkpoint_hash
from ..progress import Watcher
from ..reduction import Reduction, public_name
from ..report import save_report_data, write_report
from ..report.data import DatasetInfo, FrontierRow, Headline, MethodRow, Picture, ReportData, SearchInfo
from ..runtime import apply
from ..schedule import Schedule
from ..searches import SearchResult, frontier
from ..searches.frontier import SHARES, Frontier
from ..searches.run import Trial
from ..searches.search import AUTO, rankers_for
from ..timing import measure
from .opening import Limits, Prepared, content_hash, environment, limits_of, prepare
from .pictures import picture_of, varied
from .results import MedianPrompt, drop_of, method_row, metric_words, ranker_words, task_rows
from .search_options import SearchOptions


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
    trials: tuple[Trial, ...]
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
    else:
        result = _by_name(options, prepared)
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
        result.trials,
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


def _by_name(options: SearchOptions, prepared: Prepared) -> SearchResult:
    """What the search that was asked for finds, told the options that were given."""
    evaluator, told = prepared.calibration, _journal(options, prepared)
    # the solver by name: the evaluator says how many counts are tried at once
    given = {name: getattr(options, name) for name in ("confidence", "first_layer", "solver", "step", "trade_off")}
    told |= {name: value for name, value in given.items() if value is not None}
    if options.chooses_ranker:
        told["rankers"] = rankers_for(evaluator)
    if options.start is not None:
        told["warm_start"] = options.start_schedule(evaluator.num_layers)
    goal = options.tolerance if options.budget is None else _budget(options, prepared)
    return options.search(evaluator, goal, **told)


def _budget(options: SearchOptions, prepared: Prepared) -> Budget:
    """The budget in numbers, the same one in a resumed search."""
    assert options.budget is not None
    value, unit = options.budget, options.unit

    def count() -> _KeptBudget:
        limits = limits_of(prepared.calibration, value, unit)
        return _KeptBudget(limits.n_vision, limits.n_text, limits.latency, value, unit)

    kept = prepared.folder.once("budget", _KeptBudget, count)
    return kept.budget(prepared.opened.model.config, kept.value, kept.unit)


def _along_frontier(options: SearchOptions, prepared: Prepared) -> tuple[SearchResult, tuple[FrontierRow, ...]]:
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
    consistency: RankConsistency
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
        timing=findings.measurement.named,
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
        "test": {"name": public_name(dataset.test_name), "examples": dataset.test_size, "hash": dataset.test_hash},
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
    return method_row(method.name, method.kind, schedule, method.evaluation, drop, prepared.prompt, method.note)


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
        method=options.search.title,
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


def _headline(full: MethodRow, found: MethodRow, measurement: Measurement, vision_flops: float | None) -> Headline:
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
            ("found", self.options.search.title, "found", reduction, "found on the calibration set"),
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
            ("random", "Random", baselines.random(schedule, seed=seed), "the found schedule, tokens at random"),
        ]

    def _measure(self, reduction: Reduction) -> Measurement:
        prepared = self.prepared

        def run() -> Measurement:
            batch_size = prepared.fix_batch_size("test")
            return measure(
                prepared.opened.model,
                typical_batch(prepared.opened.processor, prepared.sets.test, batch_size, prepared.test.reader),
                reduction,
                runs=self.options.timing_runs,
                warmup=1,
                new_tokens=self.options.new_tokens,
                progress=functools.partial(prepared.watcher.on_progress, "timing"),
            )

        return prepared.folder.once("timing", Measurement, run)

    def _consistency(self) -> RankConsistency:
        prepared = self.prepared

        def run() -> RankConsistency:
            examples = prepared.sets.calibration[:CONSISTENCY_EXAMPLES]
            return rank_consistency(
                prepared.opened.model,
                prepared.opened.processor,
                examples,
                progress=prepared.watcher.on_progress,
                reader=prepared.calibration.reader,
            )

        return prepared.folder.once("consistency", RankConsistency, run)

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
        "method": options.search.name,
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
