"""The main job, end to end: search a reduction on calibration data, prove it on test data, write the report.

Puts the stages in order and keeps the result of each, so that an interruption loses nothing. Knows nothing
about terminals, nor about how one search works.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import baselines, notebook, shown
from ..budget import KeepBudget
from ..certificate import ESTIMATED, Certificate, Step, outlook
from ..errors import BadInput, StorageError, Unreachable
from ..evaluation.benchmarks import Measured
from ..evaluation.consistency import rank_consistency
from ..evaluation.evaluator import Evaluator
from ..evaluation.result import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Evaluation, Measurement, RankConsistency
from ..loading import base_name, checkpoint_hash
from ..progress import Watcher
from ..records import user_path, write_atomically
from ..reduction import CONFIG_NAME, Reduction, public_name
from ..report.data import Changes, DatasetInfo, FrontierRow, Picture, ReportData, SearchInfo, save_report_data
from ..report.html import write_report
from ..runtime import apply, weights_of
from ..schedule import Schedule
from ..searches import SearchResult, certify, frontier
from ..searches.certify import fingerprint_of, path_for
from ..searches.run import Trial
from ..searches.search import AUTO, along, certified_reduction, rankers_for, shared_layers
from ..searches.sensitivity import SHARES
from ..timing import measure
from .findings import (
    MedianPrompt,
    changed_answers,
    drop_of,
    headline_of,
    measures_of,
    method_row,
    metric_words,
    pictures_of,
    ranker_words,
    task_rows,
)
from .opening import Limits, Prepared, content_hash, environment, limits_of
from .options import SearchOptions
from .workers import prepared_run


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
    path: tuple[tuple[float, ...], ...] = ()  # to certify along, laid before the test set is looked at
    agreement: float | None = None  # share of the calibration set's scores that the reduction leaves as they are


@dataclass(frozen=True)
class _Used:
    """Sets of examples that served the certificate of the reduction which this run replaces in its folder."""

    fingerprints: tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    """A certificate as the run folder keeps it."""

    certificate: dict[str, Any]


@dataclass(frozen=True)
class _KeptBudget(Limits):
    """A budget as the run folder keeps it."""

    value: float
    unit: str


def _search(options: SearchOptions, prepared: Prepared) -> SearchRecord:
    """Search, and save the reduction with what its model is told by where it is looked for again.

    Raises:
        ThinsightError: what is asked cannot be reached.
    """
    prepared.fix_batch_size("calibration")
    points: tuple[FrontierRow, ...] = ()
    told: dict[str, Any] = {
        "seed": options.seed,
        "study": prepared.folder.path / "study.jsonl",
        "resume": options.resume,
        "observer": prepared.watcher,
    }
    if options.n_trials is not None:
        told["n_trials"] = options.n_trials
    if options.frontier:
        result, points = _along_frontier(options, prepared, told)
    else:
        result = _by_name(options, prepared, told)
    name, reduction = options.model.model, result.reduction
    checkpoint = checkpoint_hash(name)
    found = {**(reduction.search or {}), **({} if checkpoint is None else {"checkpoint": checkpoint})}
    weights = weights_of(prepared.opened.model)
    reduction = replace(reduction, base_model_name_or_path=base_name(name), search=found, weights=weights)
    reduction.save_pretrained(prepared.folder.path)
    path: tuple[Schedule, ...] = ()
    agreement = None
    if options.certified:
        path = path_for(prepared.calibration, result, through=[Schedule(point.keep_rates) for point in points])
        agreement = _unchanged(prepared.calibration, reduction)
    else:
        why = "--no-certify was given" if options.budget is None else "a budget says nothing of the score"
        prepared.watcher.on_note(f"  What is lost is {ESTIMATED}: {why}")
    if result.schedule.is_full and options.budget is None and not options.certified:
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
        tuple(each.keep_rates for each in path),
        agreement,
    )


def _unchanged(evaluator: Evaluator, reduction: Reduction) -> float:
    """The share of examples whose score a reduction leaves as it is."""
    full, reduced = evaluator.full.per_example, evaluator(reduction).per_example
    assert full is not None
    assert reduced is not None
    return float((full == reduced).mean())


def _by_name(options: SearchOptions, prepared: Prepared, told: dict[str, Any]) -> SearchResult:
    """What the search that was asked for finds, told the options that were given."""
    evaluator = prepared.calibration
    # the solver by name: the evaluator says how many counts are tried at once
    given = {name: getattr(options, name) for name in ("first_layer", "solver", "step", "trade_off")}
    given["confidence"] = options.early_stop
    told |= {name: value for name, value in given.items() if value is not None}
    if options.chooses_ranker:
        told["rankers"] = rankers_for(evaluator)
    if options.start is not None:
        told["warm_start"] = options.start_schedule(evaluator.num_layers)
    if options.budget is None:
        return options.search(evaluator, options.tolerance, **told)
    value, unit = options.budget, options.unit

    def count() -> _KeptBudget:
        limits = limits_of(evaluator, value, unit)
        return _KeptBudget(limits.n_vision, limits.n_text, limits.latency, value, unit)

    kept = prepared.folder.once("budget", _KeptBudget, count)  # the same one in a resumed search
    return options.search(evaluator, kept.budget(prepared.opened.model.config, kept.value, kept.unit), **told)


def _along_frontier(
    options: SearchOptions, prepared: Prepared, told: dict[str, Any]
) -> tuple[SearchResult, tuple[FrontierRow, ...]]:
    """The result that the tolerance or the budget picks, and a row for each cost."""
    evaluator = prepared.calibration
    layers, n_vision = evaluator.num_layers, evaluator.num_vision_tokens
    found = frontier(evaluator, [KeepBudget(layers, n_vision, share) for share in SHARES], **told)
    taken = found.at_drop(options.tolerance) if options.budget is None else found.within(options.budget)
    if taken is None:
        raise BadInput(
            f"no point of the frontier stays within a drop of {options.tolerance}: the best one loses "
            f"{min(point.drop for point in found.points):.4f}; allow more with --max-drop"
        )
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


@dataclass(frozen=True)
class Tested:
    """One method on the test set."""

    name: str
    kind: str
    reduction: Reduction
    evaluation: Evaluation
    note: str
    doubt: str = ""


def report_of(
    options: SearchOptions,
    prepared: Prepared,
    search: SearchRecord,
    tested: Sequence[Tested],
    measurement: Measurement,
    consistency: RankConsistency,
    changes: Changes,
    pictures: tuple[Picture, ...],
) -> ReportData:
    """Everything that the report shows; of ``tested`` the full model comes first, then the reduction found."""
    sets, prompt, (full, found) = prepared.sets, prepared.prompt, tested[:2]
    rows = []
    for each in tested:
        drop = None if each is full else drop_of(full.evaluation, each.evaluation, sets.test)
        rows.append(method_row(each.name, each.kind, each.reduction.schedule, each.evaluation, drop, prompt, each.note))
    dataset = DatasetInfo(
        test_name=sets.test_name,
        test_size=len(sets.test),
        calibration_name=sets.calibration_name,
        calibration_size=len(sets.calibration),
        metric=options.metric or metric_words(sets.test),
        test_hash=content_hash(sets.test),
        calibration_hash=content_hash(sets.calibration),
        fingerprint=fingerprint_of(sets.test),
    )
    headline = replace(
        headline_of(rows[0], rows[1], prompt),
        kv_ratio=measurement.kv_ratio,
        prefill_ratio=measurement.timing(PREFILL).ratio,
        answer_ratio=measurement.timing(ANSWER).ratio,
    )
    info = SearchInfo(
        method=options.search.title,
        max_drop=options.tolerance if options.budget is None else None,
        budget=_budget_words(options),
        solver=options.solver_name if options.searches_layers else "",
        ranker=ranker_words(found.reduction.ranker),
        seed=options.seed,
        evaluations=round(math.fsum(trial.share for trial in search.trials)),
        full_forwards=search.full_forwards,
        seconds=search.seconds,
        calibration_full_score=search.full_score,
        calibration_score=search.score,
    )
    doubts = (("calibration", search.doubt), ("test", full.doubt))
    certificate = found.reduction.certificate
    return ReportData(
        title=f"Fewer vision tokens for {options.model.model}",
        model=replace(prepared.opened.info, num_vision_tokens=prompt.n_vision),
        dataset=dataset,
        headline=headline,
        search=info,
        keep_rates=found.reduction.schedule.keep_rates,
        methods=tuple(rows),
        per_task=task_rows(full.evaluation, found.evaluation, sets.test),
        measures=() if options.metric else measures_of(full.evaluation, found.evaluation, sets.test),
        timing=measurement.named,
        trials=search.trials,
        frontier=search.frontier,
        consistency=consistency,
        changes=changes,
        pictures=pictures,
        environment=environment(prepared.opened),
        commands=(options.command,) if options.command else (),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        doubts=tuple(f"on the {name} set {doubt}" for name, doubt in doubts if doubt),
        certificate=certificate,
        path_ratios=tuple(prompt.flops() / prompt.flops(each) for each in certificate.path) if certificate else (),
    )


def measured_of(data: ReportData, measurement: Measurement) -> dict[str, Any]:
    """What the saved reduction says it was measured to do, as JSON values."""
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
        **({"benchmarks": [_benchmark_of(each) for each in data.measures]} if data.measures else {}),
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


def _benchmark_of(found: Measured) -> dict[str, Any]:
    interval = [found.drop.low, found.drop.high]
    told = {"benchmark": found.benchmark, "measure": found.name, "units": found.units}
    return {**told, "full": found.full, "reduced": found.reduced, "drop_interval_95": interval}


def _budget_words(options: SearchOptions) -> str:
    if options.budget is None:
        return ""
    if options.unit == "ms":
        return f"{options.budget:g} ms of prefill"
    if options.unit == "flops" and options.budget > 1:
        return f"{options.budget:.4g} decoder FLOPs"
    of = "of the decoder's FLOPs" if options.unit == "flops" else "mean keep rate"
    return f"{100 * options.budget:g} % {of}"


def _replaced(prepared: Prepared) -> _Used:
    """What the folder's earlier reduction was certified on, read before it is replaced."""

    def read() -> _Used:
        if not (prepared.folder.path / CONFIG_NAME).is_file():
            return _Used(())
        try:
            earlier = Reduction.from_pretrained(prepared.folder.path)
        except (BadInput, StorageError) as error:
            prepared.watcher.on_note(f"warning: an earlier reduction's certificate is not read: {error}")
            return _Used(())
        return _Used(() if earlier.certificate is None else (earlier.certificate.fingerprint,))

    return prepared.folder.once("used", _Used, read)


def _step_name(place: int) -> str:
    return f"certify-{place:03}"


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

    Raises:
        ThinsightError: bad input, or a folder of another run.
    """
    with prepared_run(options, options.first_ranker, watcher or notebook.watcher()) as prepared:
        return _search_and_report(options, prepared)


def _search_and_report(options: SearchOptions, prepared: Prepared) -> SearchOutcome:
    if options.warning:
        prepared.watcher.on_note(f"warning: {options.warning}")
    # what the loaded model or the ranker cannot do at the first layer that may be reduced is refused now
    schedule = Schedule.step(prepared.calibration.num_layers, _first_layer(options, prepared), 0.5)
    apply(prepared.opened.model, prepared.calibration.reduction(schedule)).remove()
    prepared.check_full_score(prepared.calibration)
    prepared.folder.bind(_settings(options, prepared))
    if options.certified:
        _replaced(prepared)
    return _Run(options, prepared).run()


@dataclass(frozen=True)
class _Run:
    """One main job after everything is checked: a method per stage."""

    options: SearchOptions
    prepared: Prepared

    def run(self) -> SearchOutcome:
        folder, stage = self.prepared.folder.path, self.prepared.watcher.on_stage
        stage("Searching on the calibration set")
        search = self.prepared.folder.once("search", SearchRecord, lambda: _search(self.options, self.prepared))
        reduction = Reduction.from_dict(search.reduction, "the run's search")
        if self.options.certified:
            reduction = self._certified(search, reduction)
            reduction.save_pretrained(folder)
        tested = self._test(reduction)
        changes = self._changes(reduction, tested)
        stage("Timing full against reduced")
        measurement = self._measure(reduction)
        stage("Measuring rank consistency")
        consistency = self._consistency()
        stage("Looking at kept tokens")
        pictures = self._pictures(reduction, tested)
        stage("Writing the report")
        data = report_of(self.options, self.prepared, search, tested, measurement, consistency, changes, pictures)
        reduction = replace(reduction, measured=measured_of(data, measurement))
        reduction.save_pretrained(folder)
        save_report_data(folder, data)
        return SearchOutcome(folder, reduction, data, write_report(folder / "report.html", data))

    def _certified(self, search: SearchRecord, found: Reduction) -> Reduction:
        """The cheapest reduction of the path that the test set certifies, or the full model; with the certificate."""
        prepared, path = self.prepared, along(found, [Schedule(rates) for rates in search.path])
        stage, note = prepared.watcher.on_stage, prepared.watcher.on_note
        stage("Certifying on the test set")
        note(f"  {self._outlook(search)}")

        def run() -> _Kept:
            return _Kept(self._certify(path).to_dict())

        kept = prepared.folder.once("certificate", _Kept, run)
        certificate = Certificate.from_dict(kept.certificate, "the run's certificate")
        note(f"  {certificate.promise} {certificate.evidence}")
        for caveat in certificate.caveats:
            note(f"  {caveat}")
        if certificate.reason:
            note(f"  The next cheaper schedule is {certificate.reason}")
        if certificate.schedule is None:
            instead = "give more test examples, allow more with --max-drop, or only estimate with --no-certify"
            note(f"  The full model stays. {self._outlook(search)}: {instead}")
        return certified_reduction(found, path, certificate)

    def _outlook(self, search: SearchRecord) -> str:
        options = self.options
        assert search.agreement is not None
        count = len(self.prepared.sets.test)
        return outlook(options.tolerance, search.agreement, count, confidence=options.certainty)

    def _certify(self, path: Sequence[Reduction]) -> Certificate:
        """Along the path, from the first schedule that is not yet tested."""
        options, prepared, folder = self.options, self.prepared, self.prepared.folder
        steps: list[Step] = []
        while len(steps) < len(path) and (step := folder.find(_step_name(len(steps)), Step)) is not None:
            steps.append(step)
        prepared.fix_batch_size("test")
        evaluator = prepared.test
        evaluator.share(Schedule.full(evaluator.num_layers), shared_layers(path))

        def keep(step: Step, place: int, schedules: int) -> None:
            folder.keep(_step_name(place), step)
            ratio = shown.ratio(prepared.prompt.flops() / prepared.prompt.flops(path[place].schedule))
            prepared.watcher.on_note(f"  {place + 1} of {schedules}, {ratio} fewer FLOPs: {step.told}")

        used = self._used_before(path)
        certificate = certify(
            path, evaluator, options.tolerance, options.certainty, used=used, known=steps, on_step=keep
        )
        evaluator.share(Schedule.full(evaluator.num_layers), 0)
        return certificate

    def _used_before(self, path: Sequence[Reduction]) -> list[str]:
        """Sets that have served another certificate, as far as the folder and ``--cache-dir`` remember, which now
        remembers this one too."""
        kept, options = self.options.cache_dir, self.options
        used = list(_replaced(self.prepared).fingerprints)
        if kept is None:
            return used
        told = [[each.schedule.keep_rates for each in path], options.tolerance, options.certainty]
        promise = hashlib.sha256(json.dumps([*told, dict(path[0].ranker)], default=repr).encode()).hexdigest()[:16]
        fingerprint = fingerprint_of(self.prepared.test)
        mark = user_path(kept, "cache_dir") / f"certified-{fingerprint}-{promise}"
        others = [each for each in mark.parent.glob(f"certified-{fingerprint}-*") if each.name != mark.name]
        write_atomically(mark, "")
        return [*used, *([fingerprint] if others else [])]

    def _test(self, reduction: Reduction) -> list[Tested]:
        """Full, found, and its rivals at the same cost, all on the test set."""
        full = Reduction(Schedule.full(reduction.schedule.num_layers))
        methods = [
            ("full", "Full model", "full", full, ""),
            ("found", self.options.search.title, "found", reduction, self._how_found),
            *self._rivals(reduction),
        ]
        reduced = {f"test-{key}": method for key, _, kind, method, _ in methods if kind != "full"}
        self.prepared.test_scores_ahead(reduced, "Testing")
        tested = []
        for key, name, kind, method, note in methods:
            self.prepared.watcher.on_stage(f"Testing {name}")
            scores = self.prepared.test_scores(f"test-{key}", None if kind == "full" else method)
            tested.append(Tested(name, kind, method, scores.evaluation(), note, scores.doubt))
        return tested

    @property
    def _how_found(self) -> str:
        return "certified on these questions" if self.options.certified else "found on the calibration set"

    def _rivals(self, reduction: Reduction) -> list[tuple[str, str, str, Reduction, str]]:
        """(key, name, kind, reduction, note) of what the search has to be compared with at its own cost."""
        schedule, seed = reduction.schedule, self.options.seed
        budget = self.prepared.prompt.budget(schedule)
        layer = min(2, schedule.num_layers - 1)
        try:
            fastv = baselines.fastv(budget=budget, layer=layer, ranker=reduction.ranker)
        except Unreachable:  # the search may begin above layer 2 and go where a step at 2 cannot follow
            layer = next(i for i, rate in enumerate(schedule.keep_rates) if rate < 1)
            fastv = baselines.fastv(budget=budget, layer=layer, ranker=reduction.ranker)
        name, same = f"FastV-like (one step at layer {layer})", "the found schedule, tokens"
        return [
            ("fastv", name, "baseline", fastv, "the found ranker, one step"),
            ("uniform", "Uniform", "baseline", baselines.uniform(schedule), f"{same} evenly spread"),
            ("random", "Random", "baseline", baselines.random(schedule, seed=seed), f"{same} at random"),
        ]

    def _measure(self, reduction: Reduction) -> Measurement:
        prepared = self.prepared

        def run() -> Measurement:
            batch_size = prepared.fix_batch_size("test")
            return measure(
                prepared.opened.model,
                prepared.test.reader.typical_batch(prepared.sets.test, batch_size),
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

    def _changes(self, reduction: Reduction, tested: Sequence[Tested]) -> Changes:
        prepared, (full, found) = self.prepared, tested[:2]

        def run() -> Changes:
            prepared.fix_batch_size("test")
            return changed_answers(prepared.test, reduction, full.evaluation, found.evaluation)

        return prepared.folder.once("changes", Changes, run)

    def _pictures(self, reduction: Reduction, tested: Sequence[Tested]) -> tuple[Picture, ...]:
        full, found = (each.evaluation for each in tested[:2])
        most, note = self.options.pictures, self.prepared.watcher.on_note
        return pictures_of(self.prepared.test, reduction, full, found, most, note)


def _first_layer(options: SearchOptions, prepared: Prepared) -> int:
    """The first layer that G-Search reduces: the one asked for, or from its own on the first at which one can rank."""
    if options.first_layer is not None:
        return options.first_layer
    calibration = prepared.calibration
    return min(max(options.gsearch_layer, calibration.first_layer), calibration.num_layers - 1)


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
        "early_stop": options.early_stop,
        "confidence": options.certainty if options.certified else None,
        "first_layer": _first_layer(options, prepared) if options.budget is None else options.first_layer,
        "seed": options.seed,
        "calibration fingerprint": prepared.calibration.fingerprint,
        "test fingerprint": prepared.test.fingerprint,
    }
