"""Methods side by side at equal cost: every baseline and every search, chosen on calibration, scored on test.

Keeps the result of every run, so that an interruption loses nothing. Knows nothing about terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from ..adaptive import Adaptive
from ..baselines import BASELINES
from ..budget import Budget, LatencyModel, TimeBudget, check_budget_value, make_budget
from ..errors import ThinsightError
from ..evaluation.attention import attention_statistics
from ..evaluation.disk_store import DiskStore
from ..evaluation.evaluator import Evaluator, check_metric
from ..ranking import get_ranker
from ..reduction import Reduction
from ..report.comparison import Comparison, Run, draw, markdown, to_csv
from ..schedule import Schedule
from ..search.rankers import rankers_for
from ..search.result import SearchResult
from ..search.search import CHOOSE_RANKER, METHODS, budget_of
from .pipeline import TITLES
from .results import MedianPrompt
from .run_folder import RunFolder
from .session import ModelOptions, Opened, Sets, environment, load_sets, open_model
from .splits import content_hash
from .watching import Watcher

__all__ = ["CompareOptions", "CompareOutcome", "compare", "method_names"]

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
STATISTICS_EXAMPLES = 64
_SEARCHES = ("sensitivity", "adaptive", "psigmoid", "random")
SEARCH_PREFIX = "search-"  # "random" is a baseline and a search


def method_names() -> list[str]:
    """All methods that can be compared: baselines, and searches as "search-..."."""
    return [*(SEARCH_PREFIX + name for name in _SEARCHES), *BASELINES]


@dataclass(frozen=True)
class CompareOptions:
    """What `thinsight compare` is told. ``data`` None is the demo's; see `session.load_sets` for the sets."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    test_data: str | None = None
    limit: int | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    budgets: tuple[float, ...] = BUDGETS
    budget_unit: str = "keep"
    methods: tuple[str, ...] = ("all",)
    seeds: tuple[int, ...] = (0,)
    n_trials: int = 16
    ranker: str | dict[str, Any] = "text-attention"
    batch_size: int = 8
    cache_gib: float = 4.0
    cache_dir: Path | None = None
    out: Path = Path("thinsight-compare")
    resume: bool = False

    @property
    def chosen(self) -> list[str]:
        """The methods, in their order."""
        known = method_names()
        return known if "all" in self.methods else [name for name in known if name in self.methods]

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        for budget in self.budgets:
            check_budget_value(budget, self.budget_unit)
        for name, values in (("budgets", self.budgets), ("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ThinsightError(f"{name} is {values!r}: give at least one, and none twice")
        for method in self.methods:
            if method not in ("all", *method_names()):
                raise ThinsightError(
                    f"method is {method!r}; choose all, or some of {', '.join(method_names())}"
                )
        least = {"n_trials": 8, "batch_size": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ThinsightError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        get_ranker(self.ranker)
        if self.cache_dir is not None:
            DiskStore(self.cache_dir)
        self.model.check()


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
    def of(cls, reduction: Reduction, evaluations: float, seconds: float, score: float | None) -> _Found:
        family = None if reduction.adaptive is None else reduction.adaptive.to_dict()
        rates, ranker = reduction.schedule.keep_rates, dict(reduction.ranker)
        return cls(rates, ranker, evaluations, seconds, score, adaptive=family)

    @property
    def reduction(self) -> Reduction:
        family = None if self.adaptive is None else Adaptive.from_dict(self.adaptive)
        return Reduction(Schedule(self.keep_rates), self.ranker, adaptive=family)


@dataclass(frozen=True)
class _Limits:
    """The budgets' prompt, and the device's latency where budgets are in ms."""

    n_vision: int
    n_text: int
    latency: LatencyModel | None


@dataclass(frozen=True)
class _Scored:
    score: float
    per_example: tuple[float, ...]


def compare(options: CompareOptions, watcher: Watcher | None = None) -> CompareOutcome:
    """Run every method at every budget, and write JSON, CSV, Markdown and a figure into ``options.out``.

    Raises:
        ThinsightError: bad input, before long work starts, or a folder of another comparison.
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
    calibration, test = (_evaluator(opened, each, options, watcher) for each in (sets.calibration, sets.test))
    folder.bind(
        {
            "what": "compare",
            "unit": options.budget_unit,
            "n_trials": options.n_trials,
            "ranker": get_ranker(options.ranker).to_dict(),
            "calibration fingerprint": calibration.fingerprint,
            "test fingerprint": test.fingerprint,
        }
    )
    return _Comparing(options, watcher, folder, sets, opened, calibration, test).run()


def _evaluator(
    opened: Opened, examples: Sequence[Any], options: CompareOptions, watcher: Watcher
) -> Evaluator:
    return Evaluator(
        opened.model,
        opened.processor,
        examples,
        metric=options.metric,
        batch_size=options.batch_size,
        ranker=options.ranker,
        max_new_tokens=options.max_new_tokens,
        progress=watcher.on_progress,
        cache_gib=options.cache_gib / 2,  # two sets
        cache_dir=options.cache_dir,
    )


@dataclass
class _Comparing:
    """A comparison after everything is checked."""

    options: CompareOptions
    watcher: Watcher
    folder: RunFolder
    sets: Sets
    opened: Opened
    calibration: Evaluator
    test: Evaluator
    _statistics: Any = None

    def run(self) -> CompareOutcome:
        full = self.folder.once("full", _Scored, lambda: self._scores(None))
        limits = self.folder.once("limits", _Limits, self._limits)
        runs = [
            self._one(make_budget_of(self.opened, limits, value, self.options.budget_unit), value, name, seed)
            for value in self.options.budgets
            for name in self.options.chosen
            for seed in (self.options.seeds if _seeded(name) else (None,))
        ]
        prompt = self._prompt
        comparison = Comparison(
            model=self.options.model.model,
            test_name=self.sets.test_name,
            test_hash=content_hash(self.sets.test),
            unit=self.options.budget_unit,
            n_trials=self.options.n_trials,
            seeds=self.options.seeds,
            full_score=full.score,
            full_flops=prompt.flops(),
            full_per_example=full.per_example,
            groups=tuple(str(example.group) for example in self.sets.test),
            runs=tuple(runs),
            environment=environment(self.opened),
        )
        return self._write(comparison)

    @property
    def _prompt(self) -> MedianPrompt:
        return MedianPrompt.of(self.opened.model.config, self.test.prompt_sizes)

    def _limits(self) -> _Limits:
        latency = None
        if self.options.budget_unit == "ms":
            self.watcher.on_stage("Profiling the device")
            budget = budget_of(self.calibration, self.options.budgets[0], "ms")
            assert isinstance(budget, TimeBudget)
            latency = budget.latency
        n_text = median_low(text for _, text in self.calibration.prompt_sizes)
        return _Limits(self.calibration.num_vision_tokens, n_text, latency)

    def _one(self, budget: Budget, value: float, name: str, seed: int | None) -> Run:
        """One method at one budget: found without the test set, then scored on it."""
        key = f"{self.options.budget_unit}-{value:g}-{name}" + ("" if seed is None else f"-seed{seed}")
        title = _title(name)
        label = f"{title}, budget {value:g}" + ("" if seed is None else f", seed {seed}")
        self.watcher.on_stage(label)
        found = self.folder.once(f"found-{key}", _Found, lambda: self._find(budget, name, seed, key))
        method = name.removeprefix(SEARCH_PREFIX) if name != SEARCH_PREFIX + "random" else name
        if found.refused:
            empty: tuple[float, ...] = ()
            return Run(value, method, title, seed, empty, {}, 0, 0, 0, empty, refused=found.refused)
        reduction = found.reduction
        scored = self.folder.once(f"test-{key}", _Scored, lambda: self._scores(reduction))
        return Run(
            budget=value,
            method=method,
            title=title,
            seed=seed,
            keep_rates=found.keep_rates,
            ranker=dict(found.ranker),
            spent=reduction.average(budget.spent),
            flops=reduction.average(self._prompt.flops),
            score=scored.score,
            per_example=scored.per_example,
            evaluations=found.evaluations,
            seconds=found.seconds,
            calibration_score=found.score,
        )

    def _find(self, budget: Budget, name: str, seed: int | None, key: str) -> _Found:
        try:
            if name.startswith(SEARCH_PREFIX):
                return self._search(budget, name.removeprefix(SEARCH_PREFIX), seed or 0, key)
            reduction = self._baseline(budget, name, seed)
        except ThinsightError as error:
            return _Found((), {}, 0, 0, None, str(error))
        return _Found.of(reduction, 0, 0, None)

    def _baseline(self, budget: Budget, name: str, seed: int | None) -> Reduction:
        baseline = BASELINES[name]
        statistics = self._attention() if baseline.needs_statistics else None
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        try:
            return baseline.make(budget, statistics=statistics, **options)
        except ThinsightError:
            # layers numbered for 32 may be too deep for a shallow model
            return baseline.make(budget, statistics=statistics, scale_layers=True, **options)

    def _attention(self) -> Any:
        if self._statistics is None:
            self._statistics = attention_statistics(
                self.opened.model, self.opened.processor, self.sets.calibration[:STATISTICS_EXAMPLES]
            )
        return self._statistics

    def _search(self, budget: Budget, name: str, seed: int, key: str) -> _Found:
        study = self.folder.path / "studies" / f"{key}.jsonl"
        arguments: dict[str, Any] = {
            "n_trials": self.options.n_trials,
            "seed": seed,
            "study": study,
            "resume": True,
            "observer": self.watcher,
        }
        if name in CHOOSE_RANKER:
            rankers = rankers_for(self.calibration)
            result: SearchResult = METHODS[name](self.calibration, budget, rankers=rankers, **arguments)
        else:
            result = METHODS[name](self._reaching(budget), budget, **arguments)
        return _Found.of(result.reduction, float(result.evaluations), result.seconds, result.score)

    def _reaching(self, budget: Budget) -> Evaluator:
        """The calibration evaluator with the ranker asked for, or, where the budget is spent before that one
        can rank, with `staged`."""
        first = Schedule((1.0, *[0.0] * (budget.num_layers - 1)))
        if budget.holds(first) or self.calibration.first_layer == 0:
            return self.calibration
        return self.calibration.with_ranker("staged")

    def _scores(self, reduction: Reduction | None) -> _Scored:
        evaluation = self.test.full if reduction is None else self.test(reduction)
        assert evaluation.per_example is not None
        return _Scored(evaluation.score, tuple(evaluation.per_example.tolist()))

    def _write(self, comparison: Comparison) -> CompareOutcome:
        self.watcher.on_stage("Writing the comparison")
        texts = {"comparison.csv": to_csv(comparison), "comparison.md": markdown(comparison)}
        paths = [self.folder.save_json("comparison.json", comparison)]
        for name, text in texts.items():
            (self.folder.path / name).write_text(text, encoding="utf-8")
            paths.append(self.folder.path / name)
        note = ""
        try:
            for name in ("comparison.pdf", "comparison.png"):
                draw(comparison, self.folder.path / name)
                paths.append(self.folder.path / name)
        except ThinsightError as error:
            note = str(error)
        return CompareOutcome(comparison, tuple(paths), note)


def make_budget_of(opened: Opened, limits: _Limits, value: float, unit: str) -> Budget:
    """A budget for the calibration set's median prompt."""
    return make_budget(
        value,
        unit,
        config=opened.model.config,
        n_vision=limits.n_vision,
        n_text=limits.n_text,
        latency=limits.latency,
    )


def _seeded(name: str) -> bool:
    return name.startswith(SEARCH_PREFIX) or name == "random"


def _title(name: str) -> str:
    if name.startswith(SEARCH_PREFIX):
        return TITLES[name.removeprefix(SEARCH_PREFIX)]
    return BASELINES[name].title
