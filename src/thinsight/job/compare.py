"""Methods side by side at equal cost: every baseline and every search, chosen on calibration, scored on test.

Keeps the result of every run, so that an interruption loses nothing. Knows nothing about terminals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..baselines import BASELINES
from ..budget import Budget, check_budget_value
from ..errors import BadInput, MissingPackage, Unreachable, Unsupported
from ..evaluation.consistency import attention_statistics
from ..evaluation.evaluator import Evaluator
from ..progress import Watcher
from ..ranking import get_ranker
from ..records import write_atomically
from ..reduction import Reduction
from ..report.comparison import Comparison, Run, draw, markdown, to_csv
from ..schedule import Adaptive, Schedule
from ..searches.search import SEARCHES, choosing, rankers_for, under_budget
from .opening import Limits, Prepared, RunOptions, Scores, content_hash, environment, limits_of, prepare

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
STATISTICS_EXAMPLES = 64
TRIALS = 16
SEARCH_PREFIX = "search-"  # "random" is a baseline and a search


def method_names() -> list[str]:
    """All methods that can be compared: baselines, and searches as "search-..."."""
    return [*(SEARCH_PREFIX + name for name in under_budget()), *BASELINES]


@dataclass(frozen=True)
class CompareOptions(RunOptions):
    """What `thinsight compare` is told."""

    budgets: tuple[float, ...] = BUDGETS
    budget_unit: str = "keep"
    methods: tuple[str, ...] = ("all",)
    seeds: tuple[int, ...] = (0,)
    n_trials: int | None = None
    ranker: str | dict[str, Any] | None = None
    out: Path = Path("thinsight-compare")

    @property
    def trials(self) -> int:
        """Evaluations of each search."""
        return TRIALS if self.n_trials is None else self.n_trials

    @property
    def own_ranker(self) -> str | dict[str, Any]:
        """Of the searches that do not choose theirs."""
        return "text-attention" if self.ranker is None else self.ranker

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
                raise BadInput(f"{name} is {values!r}: give at least one, and none twice")
        for method in self.methods:
            if method not in ("all", *method_names()):
                raise BadInput(f"method is {method!r}; choose all, or some of {', '.join(method_names())}")
        self._check_taken()
        get_ranker(self.own_ranker)
        super().check()
        self.model.check()

    def _check_taken(self) -> None:
        """Some of the methods take every option that was given."""
        if self.budget_unit == "ms" and self.budgets == BUDGETS:
            raise BadInput("budget_unit is 'ms', and the default budgets are shares: give budgets in ms too")
        searches = [name.removeprefix(SEARCH_PREFIX) for name in self.chosen if name.startswith(SEARCH_PREFIX)]
        if self.n_trials is not None and not searches:
            raise BadInput(f"n_trials is {self.n_trials}, which only searches take: leave it out, or compare one")
        for name in searches:
            if self.trials < SEARCHES[name].least_trials:
                title, least = SEARCHES[name].title, SEARCHES[name].least_trials
                raise BadInput(f"n_trials is {self.trials}: {title} needs at least {least}")
        if self.ranker is not None and not set(searches) - set(choosing()):
            takers = [SEARCH_PREFIX + name for name in under_budget() if name not in choosing()]
            raise BadInput(
                f"ranker is {self.ranker!r}, which only {', '.join(takers)} takes, as other methods have or "
                "choose their own: leave it out, or compare that one"
            )
        if len(self.seeds) > 1 and not any(map(_seeded, self.chosen)):
            raise BadInput(f"seeds are {self.seeds}, but nothing random is compared: leave them out")


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


def compare(options: CompareOptions, watcher: Watcher | None = None) -> CompareOutcome:
    """Run every method at every budget, and write JSON, CSV, Markdown and a figure into ``options.out``.

    Args:
        options: which methods at which budgets, on what.
        watcher: told what is being done.

    Returns:
        The comparison, and the files that hold it.

    Raises:
        ThinsightError: bad input, before long work starts, or a folder of another comparison.
    """
    prepared = prepare(options, options.own_ranker, watcher or Watcher())
    searches = any(name.startswith(SEARCH_PREFIX) for name in options.chosen)
    prepared.check_full_score(prepared.test, *([prepared.calibration] if searches else []))
    prepared.folder.bind(
        {
            "what": "compare",
            "unit": options.budget_unit,
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
    _statistics: Any = None

    def run(self) -> CompareOutcome:
        full = self.prepared.test_scores("full", None)
        limits = self.prepared.folder.once("limits", Limits, self._limits)
        config, unit = self.prepared.opened.model.config, self.options.budget_unit
        runs = [
            self._one(limits.budget(config, value, unit), value, name, seed)
            for value in self.options.budgets
            for name in self.options.chosen
            for seed in (self.options.seeds if _seeded(name) else (None,))
        ]
        return self._write(self._comparison(full, runs))

    def _comparison(self, full: Scores, runs: list[Run]) -> Comparison:
        test = self.prepared.sets.test
        return Comparison(
            model=self.options.model.model,
            test_name=self.prepared.sets.test_name,
            test_hash=content_hash(test),
            unit=self.options.budget_unit,
            n_trials=self.options.trials,
            seeds=self.options.seeds,
            full_score=full.score,
            full_flops=self.prepared.prompt.flops(),
            full_per_example=full.per_example,
            groups=tuple(str(example.group) for example in test),
            runs=tuple(runs),
            environment=environment(self.prepared.opened),
            doubt=full.doubt,
        )

    def _limits(self) -> Limits:
        if self.options.budget_unit == "ms":
            self.prepared.watcher.on_stage("Profiling the device")
            self.prepared.fix_batch_size("calibration")
        return limits_of(self.prepared.calibration, self.options.budgets[0], self.options.budget_unit)

    def _one(self, budget: Budget, value: float, name: str, seed: int | None) -> Run:
        """One method at one budget: found without the test set, then scored on it."""
        key = f"{self.options.budget_unit}-{value:g}-{name}" + ("" if seed is None else f"-seed{seed}")
        title = _title(name)
        label = f"{title}, budget {value:g}" + ("" if seed is None else f", seed {seed}")
        self.prepared.watcher.on_stage(label)
        found = self.prepared.folder.once(f"found-{key}", _Found, lambda: self._find(budget, name, seed, key))
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
        )

    def _find(self, budget: Budget, name: str, seed: int | None, key: str) -> _Found:
        if name.startswith(SEARCH_PREFIX):
            self.prepared.fix_batch_size("calibration")
        try:
            if name.startswith(SEARCH_PREFIX):
                return self._search(budget, name.removeprefix(SEARCH_PREFIX), seed or 0, key)
            reduction = self._baseline(budget, name, seed)
        except (Unreachable, Unsupported) as error:
            return _Found((), {}, 0.0, 0.0, None, str(error))
        return _Found.of(reduction, 0.0, 0.0, None)

    def _baseline(self, budget: Budget, name: str, seed: int | None) -> Reduction:
        baseline = BASELINES[name]
        statistics = self._attention() if baseline.needs_statistics else None
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        try:
            return baseline.make(budget, statistics=statistics, **options)
        except (BadInput, Unreachable):
            # layers numbered for 32 may be too deep for a shallow model
            return baseline.make(budget, statistics=statistics, scale_layers=True, **options)

    def _attention(self) -> Any:
        if self._statistics is None:
            opened, examples = self.prepared.opened, self.prepared.sets.calibration[:STATISTICS_EXAMPLES]
            reader = self.prepared.calibration.reader
            self._statistics = attention_statistics(opened.model, opened.processor, examples, reader=reader)
        return self._statistics

    def _search(self, budget: Budget, name: str, seed: int, key: str) -> _Found:
        study = self.prepared.folder.path / "studies" / f"{key}.jsonl"
        arguments: dict[str, Any] = {
            "n_trials": self.options.trials,
            "seed": seed,
            "study": study,
            "resume": True,
            "observer": self.prepared.watcher,
        }
        evaluator = self.prepared.calibration
        if SEARCHES[name].chooses_ranker:
            arguments["rankers"] = rankers_for(evaluator)
        else:
            evaluator = self._reaching(budget)
        result = SEARCHES[name](evaluator, budget, **arguments)
        return _Found.of(result.reduction, float(result.evaluations), result.seconds, result.score)

    def _reaching(self, budget: Budget) -> Evaluator:
        """The calibration evaluator with the ranker asked for, or, where the budget is spent before that one
        can rank, with `staged`."""
        first = Schedule((1.0, *[0.0] * (budget.num_layers - 1)))
        evaluator = self.prepared.calibration
        if budget.holds(first) or evaluator.first_layer == 0:
            return evaluator
        return evaluator.with_ranker("staged")

    def _write(self, comparison: Comparison) -> CompareOutcome:
        self.prepared.watcher.on_stage("Writing the comparison")
        folder = self.prepared.folder
        texts = {"comparison.csv": to_csv(comparison), "comparison.md": markdown(comparison)}
        paths = [folder.save_json("comparison.json", comparison)]
        for name, text in texts.items():
            write_atomically(folder.path / name, text)
            paths.append(folder.path / name)
        note = ""
        try:
            for name in ("comparison.pdf", "comparison.png"):
                draw(comparison, folder.path / name)
                paths.append(folder.path / name)
        except MissingPackage as error:
            note = str(error)
        return CompareOutcome(comparison, tuple(paths), note)


def _seeded(name: str) -> bool:
    return name.startswith(SEARCH_PREFIX) or name == "random"


def _title(name: str) -> str:
    if name.startswith(SEARCH_PREFIX):
        return SEARCHES[name.removeprefix(SEARCH_PREFIX)].title
    return BASELINES[name].title
