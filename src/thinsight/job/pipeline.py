"""The main job, end to end: search a reduction on calibration data, prove it on test data, write the report.

Puts the parts together in order and keeps the result of every stage, so that an interruption loses nothing.
Knows nothing about terminals, and computes no number itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from .. import baselines
from ..budget import Budget, KeepBudget, LatencyModel, TimeBudget, check_budget_value, make_budget
from ..errors import ThinsightError
from ..evaluation.batch_size import AUTO as AUTO_SIZE
from ..evaluation.batch_size import check_batch_size
from ..evaluation.consistency import rank_consistency
from ..evaluation.disk_store import DiskStore
from ..evaluation.encoding import typical_batch
from ..evaluation.evaluator import Evaluator, check_metric
from ..evaluation.examples import Example
from ..evaluation.feature_store import DEFAULT_CACHE_GIB, FeatureStore
from ..evaluation.metrics import get_metric
from ..evaluation.result import Evaluation
from ..ranking import Ranker, get_ranker
from ..reduction import Reduction
from ..report import save_report_data, write_report
from ..report.data import (
    Consistency,
    DatasetInfo,
    FrontierRow,
    Headline,
    MethodRow,
    Picture,
    ReportData,
    SearchInfo,
    TrialRow,
)
from ..runtime import apply
from ..schedule import Schedule
from ..search import SearchResult, frontier, gsearch
from ..search.frontier import SHARES
from ..search.rankers import AUTO, FIRST_CHOICE, rankers_for
from ..search.search import (
    CHOOSE_RANKER,
    DEFAULT_MAX_DROP,
    METHODS,
    WARM_START,
    budget_of,
    choose_method,
)
from ..search.solvers import check_early_stop, get_solver
from ..timing import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Measurement, measure
from .kept import picture_of, varied
from .results import (
    MedianPrompt,
    consistency_of,
    drop_of,
    method_row,
    metric_words,
    ranker_words,
    task_rows,
    timing_rows,
    trial_rows,
)
from .run_folder import RunFolder
from .session import (
    DEFAULT_OUT,
    ModelOptions,
    Opened,
    Sets,
    environment,
    layers_of,
    load_sets,
    open_model,
)
from .splits import content_hash
from .watching import Watcher

__all__ = ["SearchOptions", "SearchOutcome", "search_and_report"]

TITLES = {
    "gsearch": "G-Search",
    "adaptive": "Sensitivity search, adaptive",
    "psigmoid": "P-Sigmoid",
    "random": "Random search",
    "sensitivity": "Sensitivity search",
}
CONSISTENCY_EXAMPLES = 64


@dataclass(frozen=True)
class SearchOptions:
    """What `thinsight search` is told. ``data`` None is the demo's; see `session.load_sets` for the sets."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    test_data: str | None = None
    limit: int | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    max_drop: float | None = None
    budget: float | None = None
    budget_unit: str = "keep"
    method: str | None = None
    frontier: bool = False
    ranker: str | dict[str, Any] | None = None
    solver: str = "bisect"
    first_layer: int | None = None
    step: int = 1
    trade_off: float = 0.1
    n_trials: int | None = None
    start: str | None = None
    confidence: float | None = None
    seed: int = 0
    batch_size: int | str = 8
    cache_gib: float = DEFAULT_CACHE_GIB
    cache_dir: Path | None = None
    timing_runs: int = 5
    new_tokens: int = 16
    pictures: int = 6
    out: Path = DEFAULT_OUT
    resume: bool = False
    command: str = ""

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        choose_method(self.method, self.max_drop, self.budget)
        if self.frontier and (self.method is not None or self.budget_unit != "keep"):
            raise ThinsightError(
                "frontier has its own search and counts mean keep rates: leave out method and budget_unit"
            )
        if self.frontier and self.chooses_ranker:
            raise ThinsightError("ranker 'auto' is chosen for one budget: name a ranker for a frontier")
        if self.chooses_ranker and self.chosen not in CHOOSE_RANKER:
            raise ThinsightError(
                f"ranker 'auto' needs a budget and a search that chooses it: {' or '.join(CHOOSE_RANKER)}"
            )
        if self.start is not None and self.chosen not in WARM_START:
            raise ThinsightError(f"start needs a budget and a search that takes it: {', '.join(WARM_START)}")
        if self.budget is not None:
            check_budget_value(self.budget, self.budget_unit)
        if not math.isfinite(self.tolerance) or self.tolerance < 0:
            raise ThinsightError(
                f"max_drop is {self.max_drop}: it must be a number of at least 0, such as 0.01"
            )
        check_batch_size(self.batch_size)
        least = {
            "timing_runs": 1,
            "new_tokens": 1,
            "pictures": 0,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ThinsightError(
                    f"{name} is {getattr(self, name)}: it must be a whole number of at least {low}"
                )
        FeatureStore(self.cache_gib)
        if self.cache_dir is not None:
            DiskStore(self.cache_dir)
        self.start_schedule(layers_of(self.model.check()) if self.start is not None else None)
        solver = get_solver(
            self.solver, step=self.step, trade_off=self.trade_off, n_trials=self.solver_trials
        )
        check_early_stop(solver, self.confidence)
        if self.confidence is not None and not self.searches_layers:
            raise ThinsightError(
                f"confidence is {self.confidence}, which only G-Search takes: leave it out, or search with "
                "max_drop and without a frontier"
            )
        if self.n_trials is not None and self.n_trials < 1:
            raise ThinsightError(f"n_trials is {self.n_trials}: it must be a whole number of at least 1")
        if self.metric is not None:
            get_metric(self.metric)
        if self.first_layer is not None or self.searches_layers:
            _check_first_layer(
                self.gsearch_layer, get_ranker(self.first_ranker), layers_of(self.model.check())
            )

    def start_schedule(self, num_layers: int | None) -> Schedule | None:
        """The schedule that the search starts from, at the model's depth.

        Raises:
            ThinsightError: ``start`` holds no reduction.
        """
        if self.start is None:
            return None
        schedule = Reduction.from_pretrained(self.start).schedule
        return schedule if num_layers is None else schedule.resample(num_layers)

    @property
    def chosen(self) -> str:
        """The method that runs."""
        return choose_method(self.method, self.max_drop, self.budget)

    @property
    def chooses_ranker(self) -> bool:
        """Whether the search is to choose the ranker: where that was asked for, and where it can and none
        was named."""
        if self.ranker is None:
            return self.chosen in CHOOSE_RANKER and not self.frontier
        return (self.ranker if isinstance(self.ranker, str) else self.ranker.get("name")) == AUTO

    @property
    def first_ranker(self) -> str | dict[str, Any]:
        """The ranker that was asked for, or the first of those to choose from."""
        return FIRST_CHOICE if self.ranker is None or self.chooses_ranker else self.ranker

    @property
    def searches_layers(self) -> bool:
        """Whether the search goes layer by layer, under a tolerance."""
        return self.chosen == "gsearch" and not self.frontier

    @property
    def title(self) -> str:
        """The search in words."""
        return "Frontier" if self.frontier else TITLES[self.chosen]

    @property
    def tolerance(self) -> float:
        """The drop that a search without a budget allows."""
        return DEFAULT_MAX_DROP if self.max_drop is None else self.max_drop

    @property
    def gsearch_layer(self) -> int:
        """The first layer that may see fewer tokens; the paper's where none is given."""
        return 2 if self.first_layer is None else self.first_layer

    @property
    def solver_trials(self) -> int:
        """Trials per layer of the bayes solver."""
        return 8 if self.n_trials is None else self.n_trials


@dataclass(frozen=True)
class SearchOutcome:
    """What the main job leaves: the reduction (saved in ``folder``), the report and what it says."""

    folder: Path
    reduction: Reduction
    data: ReportData
    report: Path


@dataclass(frozen=True)
class _Search:
    """The search's record as the run folder keeps it; the two scores are the calibration set's."""

    method: str
    full_score: float
    score: float
    seconds: float
    trials: tuple[TrialRow, ...]
    frontier: tuple[FrontierRow, ...] = ()
    full_forwards: float | None = None


@dataclass(frozen=True)
class _Scores:
    """An evaluation as the run folder keeps it."""

    score: float
    per_example: tuple[float, ...]

    def evaluation(self) -> Evaluation:
        return Evaluation(score=self.score, per_example=np.array(self.per_example))


@dataclass(frozen=True)
class _BatchSize:
    """How many prompts of a set fit into memory at once, as the run folder keeps it."""

    size: int


@dataclass(frozen=True)
class _Limit:
    """A budget as the run folder keeps it."""

    value: float
    unit: str
    n_vision: int
    n_text: int
    latency: LatencyModel | None

    def budget(self, config: Any) -> Budget:
        return make_budget(
            self.value,
            self.unit,
            config=config,
            n_vision=self.n_vision,
            n_text=self.n_text,
            latency=self.latency,
        )


@dataclass(frozen=True)
class _Tested:
    """One method on the test set."""

    name: str
    kind: str
    reduction: Reduction
    evaluation: Evaluation
    note: str


def search_and_report(options: SearchOptions, watcher: Watcher | None = None) -> SearchOutcome:
    """Search, test, time, look, report.

    Everything that can be checked is checked before long work starts: options, output folder, both data sets,
    model, prompts. The results of the stages are kept in ``options.out``; with ``options.resume`` stages that
    are done are read instead of run, and the search continues inside its journal.

    Raises:
        ThinsightError: bad input, or a folder of another run.
    """
    watcher = watcher or Watcher()
    options.check()
    folder = RunFolder(options.out, resume=options.resume)
    watcher.on_stage("Reading the data")
    sets = load_sets(options.data, options.test_data, options.limit)
    if sets.note:
        watcher.on_note(sets.note)
    check_metric([*sets.calibration, *sets.test], options.metric)
    watcher.on_stage("Loading the model")
    opened = open_model(options.model)
    calibration = _evaluator(opened, sets.calibration, options, watcher)
    _check_runs(options.gsearch_layer, opened, calibration)
    test = _evaluator(opened, sets.test, options, watcher)
    folder.bind(_settings(options, opened, sets, calibration, test))
    return _Run(options, watcher, folder, sets, opened, calibration, test).run()


@dataclass(frozen=True)
class _Run:
    """One main job after everything is checked: a method per stage."""

    options: SearchOptions
    watcher: Watcher
    folder: RunFolder
    sets: Sets
    opened: Opened
    calibration: Evaluator
    test: Evaluator

    def run(self) -> SearchOutcome:
        search, reduction = self._search()
        tested = self._test(reduction)
        measurement = self._measure(reduction)
        consistency = self._consistency()
        pictures = self._pictures(reduction)
        self.watcher.on_stage("Writing the report")
        data = self._report(search, tested, measurement, consistency, pictures)
        reduction = replace(reduction, measured=_measured(data, measurement))
        reduction.save_pretrained(self.folder.path)
        save_report_data(self.folder.path, data)
        report = write_report(self.folder.path / "report.html", data)
        return SearchOutcome(self.folder.path, reduction, data, report)

    # -- stages ------------------------------------------------------------------------------------------

    def _search(self) -> tuple[_Search, Reduction]:
        """The search's record and the reduction, which is in the folder and usable from here on."""
        self.watcher.on_stage("Searching on the calibration set")
        search = self.folder.once("search", _Search, self._run_search)
        return search, Reduction.from_pretrained(self.folder.path)

    def _fix_batch_size(self, which: str, evaluator: Evaluator) -> int:
        """The batch size of a set: found or halved once, so that a resumed run has the same batches."""
        asked = self.options.batch_size

        def find() -> _BatchSize:
            found = _BatchSize(evaluator.fix_batch_size())
            if asked == AUTO_SIZE:
                self.watcher.on_note(f"The {which} set runs in batches of {found.size} prompts")
            return found

        kept = self.folder.once(f"batches-{asked}-{which}", _BatchSize, find)
        return evaluator.fix_batch_size(kept.size)

    def _run_search(self) -> _Search:
        options = self.options
        self._fix_batch_size("calibration", self.calibration)
        result, points = self._along_frontier() if options.frontier else (self._result(), ())
        reduction = replace(result.reduction, base_model_name_or_path=options.model.model)
        reduction.save_pretrained(self.folder.path)
        if result.schedule.is_full and options.budget is None:
            self.watcher.on_note(
                f"No vision token can go within a drop of {options.tolerance}: allow more with --max-drop, "
                "or calibrate on more examples"
            )
        return _Search(
            result.method,
            result.full_score,
            result.score,
            result.seconds,
            trial_rows(result.trials),
            points,
            result.full_forwards,
        )

    def _along_frontier(self) -> tuple[SearchResult, tuple[FrontierRow, ...]]:
        """One schedule for each cost, and the one of them that the tolerance or the budget picks."""
        options, evaluator = self.options, self.calibration
        n = evaluator.num_vision_tokens
        found = frontier(
            evaluator,
            [KeepBudget(evaluator.num_layers, n, share) for share in SHARES],
            seed=options.seed,
            study=self.folder.path / "study.jsonl",
            resume=options.resume,
            observer=self.watcher,
        )
        taken = found.at_drop(options.tolerance) if options.budget is None else found.within(options.budget)
        if taken is None:
            raise ThinsightError(
                f"no point of the frontier stays within a drop of {options.tolerance}: the best one loses "
                f"{min(point.drop for point in found.points):.4f}; allow more with --max-drop"
            )
        prompt = MedianPrompt.of(self.opened.model.config, evaluator.prompt_sizes)
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
        trials = [trial for point in found.points for trial in point.trials]
        forwards = math.fsum(point.full_forwards or 0.0 for point in found.points)
        return replace(taken, trials=trials, method="frontier", full_forwards=forwards), rows

    def _result(self) -> SearchResult:
        options = self.options
        journal: dict[str, Any] = {
            "seed": options.seed,
            "study": self.folder.path / "study.jsonl",
            "resume": options.resume,
            "observer": self.watcher,
        }
        if options.budget is None:
            return gsearch(
                self.calibration,
                options.tolerance,
                first_layer=options.gsearch_layer,
                solver=options.solver,
                step=options.step,
                trade_off=options.trade_off,
                n_trials=options.solver_trials,
                confidence=options.confidence,
                **journal,
            )
        budget = self.folder.once("budget", _Limit, self._limit).budget(self.opened.model.config)
        if options.n_trials is not None:
            journal["n_trials"] = options.n_trials
        if options.chooses_ranker:
            journal["rankers"] = rankers_for(self.calibration)
        if options.start is not None:
            journal["warm_start"] = options.start_schedule(self.calibration.num_layers)
        found: SearchResult = METHODS[options.chosen](
            self.calibration, budget, first_layer=options.first_layer, **journal
        )
        return found

    def _limit(self) -> _Limit:
        """The budget in numbers; a latency model is measured once and kept, so that a resumed search has the
        same one."""
        options = self.options
        assert options.budget is not None
        budget = budget_of(self.calibration, options.budget, options.budget_unit)
        latency = budget.latency if isinstance(budget, TimeBudget) else None
        n_text = median_low(text for _, text in self.calibration.prompt_sizes)
        return _Limit(
            options.budget, options.budget_unit, self.calibration.num_vision_tokens, n_text, latency
        )

    def _test(self, reduction: Reduction) -> list[_Tested]:
        """Full, found, and its rivals at the same cost, all on the test set."""
        full = Reduction(Schedule.full(reduction.schedule.num_layers))
        methods = [
            ("full", "Full model", "full", full, ""),
            ("found", self.options.title, "found", reduction, "found on the calibration set"),
            *((key, name, "baseline", rival, note) for key, name, rival, note in self._rivals(reduction)),
        ]
        return [self._tested(*method) for method in methods]

    def _tested(self, key: str, name: str, kind: str, reduction: Reduction, note: str) -> _Tested:
        self.watcher.on_stage(f"Testing {name}")

        def run() -> _Scores:
            self._fix_batch_size("test", self.test)
            evaluation = self.test.full if kind == "full" else self.test(reduction)
            assert evaluation.per_example is not None
            return _Scores(evaluation.score, tuple(evaluation.per_example.tolist()))

        scores = self.folder.once(f"test-{key}", _Scores, run)
        return _Tested(name, kind, reduction, scores.evaluation(), note)

    def _rivals(self, reduction: Reduction) -> list[tuple[str, str, Reduction, str]]:
        """(key, name, reduction, note) of what the search has to be compared with at its own cost."""
        schedule, seed = reduction.schedule, self.options.seed
        budget = self._prompt.budget(schedule)
        layer = min(2, schedule.num_layers - 1)
        try:
            fastv = baselines.fastv(budget=budget, layer=layer, ranker=reduction.ranker)
        except ThinsightError:  # the search may begin above layer 2 and go where a step at 2 cannot follow
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
        self.watcher.on_stage("Timing full against reduced")

        def run() -> Measurement:
            batch_size = self._fix_batch_size("test", self.test)
            return measure(
                self.opened.model,
                typical_batch(self.opened.processor, self.sets.test, batch_size),
                reduction,
                runs=self.options.timing_runs,
                warmup=1,
                new_tokens=self.options.new_tokens,
                progress=functools.partial(self.watcher.on_progress, "timing"),
            )

        return self.folder.once("timing", Measurement, run)

    def _consistency(self) -> Consistency:
        self.watcher.on_stage("Measuring rank consistency")

        def run() -> Consistency:
            examples = self.sets.calibration[:CONSISTENCY_EXAMPLES]
            found = rank_consistency(
                self.opened.model, self.opened.processor, examples, progress=self.watcher.on_progress
            )
            return consistency_of(found)

        return self.folder.once("consistency", Consistency, run)

    def _pictures(self, reduction: Reduction) -> tuple[Picture, ...]:
        self.watcher.on_stage("Looking at kept tokens")
        longest = self.test.rules.max_new_tokens
        pictures = []
        for example in varied(self.sets.test, self.options.pictures):
            try:
                picture = picture_of(
                    self.opened.model, self.opened.processor, example, reduction, max_new_tokens=longest
                )
            except ThinsightError as error:  # the report goes on without it
                self.watcher.on_note(f"No picture of example {example.id!r}: {error}")
            else:
                pictures.append(picture)
        return tuple(pictures)

    # -- the report --------------------------------------------------------------------------------------

    @property
    def _prompt(self) -> MedianPrompt:
        return MedianPrompt.of(self.opened.model.config, self.test.prompt_sizes)

    def _report(
        self,
        search: _Search,
        tested: list[_Tested],
        measurement: Measurement,
        consistency: Consistency,
        pictures: tuple[Picture, ...],
    ) -> ReportData:
        full, found = tested[0], tested[1]
        rows = tuple(self._row(method, full) for method in tested)
        options = self.options
        return ReportData(
            title=f"Fewer vision tokens for {options.model.model}",
            model=replace(self.opened.info, num_vision_tokens=self._prompt.n_vision),
            dataset=self._dataset(),
            headline=self._headline(rows[0], rows[1], measurement),
            search=SearchInfo(
                method=self.options.title,
                max_drop=options.tolerance if options.budget is None else None,
                budget=_budget_words(options),
                solver=options.solver if options.budget is None else "",
                ranker=ranker_words(found.reduction.ranker),
                seed=options.seed,
                evaluations=round(math.fsum(trial.share for trial in search.trials)),
                full_forwards=search.full_forwards,
                seconds=search.seconds,
                calibration_full_score=search.full_score,
                calibration_score=search.score,
            ),
            keep_rates=found.reduction.schedule.keep_rates,
            methods=rows,
            per_task=task_rows(full.evaluation, found.evaluation, self.sets.test),
            timing=timing_rows(measurement),
            trials=search.trials,
            frontier=search.frontier,
            consistency=consistency,
            pictures=pictures,
            environment=environment(self.opened),
            commands=(options.command,) if options.command else (),
            created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def _row(self, method: _Tested, full: _Tested) -> MethodRow:
        drop = None if method.kind == "full" else drop_of(full.evaluation, method.evaluation, self.sets.test)
        schedule = method.reduction.schedule
        return method_row(
            method.name, method.kind, schedule, method.evaluation, drop, self._prompt, method.note
        )

    def _dataset(self) -> DatasetInfo:
        sets = self.sets
        return DatasetInfo(
            test_name=sets.test_name,
            test_size=len(sets.test),
            calibration_name=sets.calibration_name,
            calibration_size=len(sets.calibration),
            metric=self.options.metric or metric_words(sets.test),
            test_hash=content_hash(sets.test),
            calibration_hash=content_hash(sets.calibration),
        )

    def _headline(self, full: MethodRow, found: MethodRow, measurement: Measurement) -> Headline:
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
            vision_flops=self._prompt.vision_flops(),
        )


def _evaluator(
    opened: Opened, examples: Sequence[Example], options: SearchOptions, watcher: Watcher
) -> Evaluator:
    return Evaluator(
        opened.model,
        opened.processor,
        examples,
        metric=options.metric,
        batch_size=options.batch_size,
        ranker=options.first_ranker,
        max_new_tokens=options.max_new_tokens,
        progress=watcher.on_progress,
        cache_gib=options.cache_gib / 2,  # two sets
        cache_dir=options.cache_dir,
    )


def _check_runs(first_layer: int, opened: Opened, evaluator: Evaluator) -> None:
    """Refuse now what the loaded model or the ranker cannot do at the first layer that may be reduced."""
    schedule = Schedule.step(int(opened.info.num_layers or 0), first_layer, 0.5)
    apply(opened.model, evaluator.reduction(schedule)).remove()


def _check_first_layer(first_layer: int, ranker: Ranker, layers: int) -> None:
    """Refuse, before weights are loaded, a first layer that is not there or that the ranker cannot rank."""
    if first_layer >= layers:
        raise ThinsightError(
            f"first_layer is {first_layer} but the model has layers 0 to {layers - 1}: choose one of them"
        )
    if first_layer == 0 and not ranker.ranks_at_layer_0:
        raise ThinsightError(
            f"first_layer is 0, but ranker {ranker.name!r} reads the layer before, which layer 0 has not: "
            "choose 1 or more, or rank by vision-attention, random or uniform"
        )


def _settings(
    options: SearchOptions, opened: Opened, sets: Sets, calibration: Evaluator, test: Evaluator
) -> dict[str, Any]:
    """What a run is made of: a resumed one must agree in all of it."""
    solver = get_solver(
        options.solver, step=options.step, trade_off=options.trade_off, n_trials=options.solver_trials
    )
    return {
        "method": "frontier" if options.frontier else options.chosen,
        "budget": options.budget,
        "budget_unit": options.budget_unit if options.budget is not None else None,
        "n_trials": options.n_trials if options.budget is not None else None,
        "start": options.start,
        "model": options.model.model,
        "dtype": opened.info.dtype,
        "attn": options.model.attn,
        "data": sets.calibration_name,
        "test_data": sets.test_name,
        "limit": options.limit,
        "metric": options.metric,
        "max_drop": options.tolerance if options.budget is None else None,
        "ranker": AUTO if options.chooses_ranker else calibration.ranker.to_dict(),
        "solver": dict(solver.settings),
        "confidence": options.confidence,
        "first_layer": options.gsearch_layer if options.budget is None else options.first_layer,
        "seed": options.seed,
        "calibration fingerprint": calibration.fingerprint,
        "test fingerprint": test.fingerprint,
    }


def _budget_words(options: SearchOptions) -> str:
    if options.budget is None:
        return ""
    if options.budget_unit == "ms":
        return f"{options.budget:g} ms of prefill"
    if options.budget_unit == "flops" and options.budget > 1:
        return f"{options.budget:.4g} decoder FLOPs"
    of = "of the decoder's FLOPs" if options.budget_unit == "flops" else "mean keep rate"
    return f"{100 * options.budget:g} % {of}"


def _measured(data: ReportData, measurement: Measurement) -> dict[str, Any]:
    """What the saved reduction says it was measured to do."""
    headline, dataset = data.headline, data.dataset
    assert headline is not None
    assert dataset is not None
    return {
        "full_score": headline.full_score,
        "score": headline.score,
        "drop": headline.drop.mean,
        "drop_interval_95": [headline.drop.low, headline.drop.high],
        "metric": dataset.metric,
        "test": {"name": dataset.test_name, "examples": dataset.test_size, "hash": dataset.test_hash},
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
