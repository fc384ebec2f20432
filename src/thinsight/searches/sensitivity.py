"""Sensitivity search: the best score inside a budget, from a model of what each layer's tokens are worth.

Three stages on the same evaluations that another search would spend on whole candidates: steps on few
examples say what each band of tokens is worth at each layer (`ExitModel`); the schedules that follow from it
stand against sigmoids, steps and random staircases on more and more examples (successive halving); the best
is bent a little and mixed with others, again and again. A frontier is a family of such schedules from cheap to full,
in one run, from which a tolerance or a budget picks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from .. import shown
from ..budget import Budget, check_budget_value, fill, fit, fit_rate
from ..errors import BadInput, Unreachable, whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import SearchObserver
from ..reduction import Reduction
from ..schedule import Schedule, drawn, solve
from .certify import certify
from .run import Run, SearchResult, Trial, budget_of, first_layers
from .shapes import blend, deform, random_staircase, sigmoid
from .study import Study

_PRICES = 1e-9, 1e6  # between which the right one lies
STEPS = (0.5, 0.25, 0.125, 0.03, 0.0)  # rates of the steps to measure


def grid(num_layers: int, first_layer: int, layers: int = 5) -> list[int]:
    """Layers of the steps to measure, evenly spread."""
    depth = np.linspace(first_layer, num_layers - 1, min(layers, num_layers - first_layer))
    return sorted({round(float(each)) for each in depth})


@dataclass(frozen=True)
class ExitModel:
    """Losses of steps, in any unit that adds up.

    Attributes:
        num_layers: L.
        first_layer: layers before it keep all.
        layers: the layers that were measured, rising.
        rates: the rates that were measured, falling, each below 1.
        losses: (layers, rates), the loss of the step at that layer to that rate.
    """

    num_layers: int
    first_layer: int
    layers: tuple[int, ...]
    rates: tuple[float, ...]
    losses: NDArray[np.float64]

    def band_losses(self) -> NDArray[np.float64]:
        """(bands, exits): what taking each band out at each layer loses, best-ranked band last.

        Exits are the layers from the first one on, and at last L: never. Made monotone: a later exit never
        loses more, and no band's loss is below 0.
        """
        steps = np.maximum.accumulate(np.clip(self.losses, 0.0, None), axis=1)  # fewer tokens, more loss
        steps = np.maximum.accumulate(steps[::-1], axis=0)[::-1]  # earlier, more loss
        exits = np.arange(self.first_layer, self.num_layers + 1)
        known = [*self.layers, self.num_layers]
        everywhere = np.stack([np.interp(exits, known, [*column, 0.0]) for column in steps.T])  # (rates, exits)
        bands = np.diff(everywhere, axis=0, prepend=0.0)
        return np.maximum.accumulate(np.clip(bands, 0.0, None)[:, ::-1], axis=1)[:, ::-1]

    def schedule(self, budget: Budget) -> Schedule:
        """The schedule that loses least within a budget, which is spent to the last token."""
        light, heavy = solve(
            lambda price: not budget.holds(self._best(price)), *_PRICES, lambda low, high: math.sqrt(low * high)
        )
        cheap, dear = self._best(heavy).keep_rates, self._best(light).keep_rates

        def between(share: float) -> Schedule:
            return Schedule([(1 - share) * low + share * high for low, high in zip(cheap, dear, strict=True)])

        return fill(budget, fit(budget, between, 0.0, 1.0, "the exit model"), self.first_layer)

    def _best(self, price: float) -> Schedule:
        """Least ``loss + price x tokens kept``, by dynamic programming from the worst band to the best."""
        losses, exits = self.band_losses(), np.arange(self.first_layer, self.num_layers + 1)
        widths = -np.diff([1.0, *self.rates])  # of each band, in shares of the tokens
        least: NDArray[np.float64] = np.zeros(len(exits))
        came: list[NDArray[np.intp]] = []
        # bands in the order in which they leave: the lowest-ranked, which the highest rate lacks, first
        for band, width in zip(losses, widths, strict=True):
            before = np.minimum.accumulate(least)  # of bands that left at this exit or earlier
            came.append(_first_least(least))
            least = before + band + price * width * exits
        place = int(np.argmin(least))
        places = [place]
        for before in reversed(came[1:]):
            place = int(before[place])
            places.append(place)
        rates = np.ones(self.num_layers)
        for place, rate in zip(reversed(places), self.rates, strict=True):
            rates[self.first_layer + place :] = rate
        return Schedule([float(rate) for rate in rates])


def _first_least(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each place, where the least value up to it is first."""
    falls = np.concatenate([[True], values[1:] < np.minimum.accumulate(values)[:-1]])
    places: NDArray[np.intp] = np.maximum.accumulate(np.where(falls, np.arange(len(values)), 0))
    return places


LEAST_TRIALS = 8  # the sensitivities alone take about three
_FEW, _SOME = 1 / 8, 1 / 4  # shares of the examples
_STEEPNESS = (2.0, 6.0, 16.0, 60.0)  # k x depth of the sigmoids that take part
_RANDOM = 4  # random staircases that take part
_SURVIVORS = 8
_SECOND = 4  # candidates that also take part under the second-best ranker
_MUTANTS = 4  # in each round of changes
_PARENTS = 4  # candidates of the halving that the best one is mixed with
_MOST_ROUNDS = 10  # per evaluation to spend: an end where changes lead to nothing new
_STRENGTHS = (1.0, 0.5)  # of the first changes and of the last, in logits


def worth(trial: Trial) -> float:
    """What is searched for: the score and, where it is known, the agreement with the full model, which is
    smooth where scores of few examples are not."""
    return trial.score + (trial.agreement or 0.0)


def sensitivity_search(
    evaluator: SearchEvaluator,
    budget: Budget | float,
    *,
    budget_unit: str = "keep",
    n_trials: int = 16,
    seed: int = 0,
    first_layer: int | None = None,
    warm_start: Schedule | None = None,
    rankers: Sequence[dict[str, Any]] = (),
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search the schedule that scores best inside a budget, of any shape.

    Args:
        evaluator, budget, budget_unit, first_layer: as of `psigmoid`. A sample of examples is used where there is one.
        n_trials: evaluations to spend; one on a share of the examples counts as that share.
        seed: of everything random.
        warm_start: a schedule that takes part, brought to the budget.
        rankers: rankers to choose from, as dicts; the evaluator's own if empty. Choosing costs evaluations.
        study, resume, observer: as of `gsearch`.

    Raises:
        ThinsightError: bad arguments, or a budget that the layers before the first reduction overrun.
    """
    n_trials, seed = whole(n_trials, "n_trials", LEAST_TRIALS), whole(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    budget = budget_of(evaluator, budget, budget_unit)
    choices = first_layers(evaluator, budget, rankers, first_layer)
    first = min(first for _, first in choices)
    settings = {
        "method": "sensitivity",
        "n_trials": n_trials,
        "seed": seed,
        "first_layer": first,
        "rankers": [dict(ranker) for ranker in rankers],
        "start": None if warm_start is None else list(warm_start.keep_rates),
    }
    run = Run(evaluator, settings, budget=budget, expected=n_trials, study=study, resume=resume, observer=observer)
    run.keep_all_before(first)
    return SensitivitySearch(run, choices, warm_start).search()


@dataclass(frozen=True)
class _Entrant:
    """A candidate that takes part."""

    reduction: Reduction
    why: str
    first: int  # the first layer at which its ranker may drop tokens


class SensitivitySearch:
    """The stages of one search."""

    def __init__(
        self,
        run: Run,
        rankers: Sequence[tuple[Mapping[str, Any], int]],
        warm_start: Schedule | None,
        model: ExitModel | None = None,
        n_trials: float | None = None,
    ) -> None:
        self.run, self.warm_start, self.model, self.budget = run, warm_start, model, run.budget
        self.rankers = list(rankers)  # each with its first layer; best first, once they are measured
        self.n_trials: float = run.settings["n_trials"] if n_trials is None else n_trials
        self.rng = np.random.default_rng(run.settings["seed"])
        self.samples = run.evaluator.samples
        self.whole: list[tuple[Trial, _Entrant]] = []  # run on all examples
        self.elite: list[_Entrant] = []  # best of the halving, in its order

    def search(self) -> SearchResult:
        """The result whose schedule is the best one found."""
        return self.run.finish_with(self.best())

    def best(self) -> Trial:
        """The best trial, after all evaluations are spent."""
        self._order_rankers()
        self.elite = self._pool()
        for share in (_FEW, _SOME) if self.samples else ():
            # half of what is left without the one evaluation that the winner needs
            room = max(1, int((self._left() - 1) / 2 / share))
            self.elite = self._ranked(self.elite[:room], share)[:_SURVIVORS]
        for entrant in self.elite[: max(1, int(self.n_trials) // 8)] if self.samples else self.elite:
            if not self.whole or self._left() >= 1:
                self._run_whole(entrant)
        for _ in range(_MOST_ROUNDS * int(self.n_trials)):
            if self._left() < 1 or not self._change():
                break
        return self._leader()[0]

    def _left(self) -> float:
        return self.n_trials - self.run.evaluations

    def _leader(self) -> tuple[Trial, _Entrant]:
        return max(self.whole, key=lambda each: worth(each[0]))

    def _run(self, entrant: _Entrant, share: float = 1.0) -> Trial:
        return self.run.run(entrant.reduction, entrant.why, share=share)

    def _run_whole(self, entrant: _Entrant) -> None:
        self.whole.append((self._run(entrant), entrant))

    def _ranked(self, pool: Sequence[_Entrant], share: float) -> list[_Entrant]:
        """A pool, best first on a share of the examples."""
        self.run.ahead([entrant.reduction for entrant in pool], share=share)
        found = [(worth(self._run(entrant, share)), entrant) for entrant in pool]
        return [entrant for _, entrant in sorted(found, key=lambda each: -each[0])]

    def _order_rankers(self) -> None:
        """Put first the ranker under which a gentle and a steep sigmoid do best, each from the first layer it
        can."""
        if len(self.rankers) > 1:
            share = _FEW if self.samples else 1.0
            ends = (_STEEPNESS[0], _STEEPNESS[-1])
            shapes = [
                [_Entrant(self._sigmoid(k, ranker, first), "ranker", first) for k in ends]
                for ranker, first in self.rankers
            ]
            self.run.ahead([shape.reduction for each in shapes for shape in each], share=share)
            worths = [sum(worth(self._run(shape, share)) for shape in each) for each in shapes]
            found = list(zip(worths, self.rankers, strict=True))
            self.rankers = [each for _, each in sorted(found, key=lambda each: -each[0])]
        self.run.keep_all_before(self.rankers[0][1])

    def _pool(self) -> list[_Entrant]:
        """Candidates that take part."""
        ranker, first = self.rankers[0]

        def entrant(schedule: Schedule, why: str) -> _Entrant:
            return _Entrant(self.run.under(ranker, schedule), why, first)

        pool = [_Entrant(self._sigmoid(k, ranker, first), f"sigmoid {k:g}", first) for k in _STEEPNESS]
        if self.samples:
            self.model = self.model or exit_model(self.run, first, ranker)
            pool.insert(0, entrant(self.model.schedule(self.budget), "exit model"))
        if self.warm_start is not None:
            # its shape, at this budget
            pool.insert(0, entrant(deform(self.budget, self.warm_start, self.rng, 0.0, first), "start"))
        pool += self._under_the_second(pool)
        pool += [entrant(step, "step") for step in self._steps(first)]
        pool += [entrant(random_staircase(self.budget, self.rng, first), "random") for _ in range(_RANDOM)]
        unique = {each.reduction: each for each in reversed(pool)}
        ordered = list(reversed(unique.values()))
        return ordered if self.samples else ordered[: max(1, int(self.n_trials) // 2)]

    def _under_the_second(self, pool: Sequence[_Entrant]) -> list[_Entrant]:
        """Some of a pool under the second-best ranker: few examples cannot tell close ones apart."""
        if len(self.rankers) == 1 or not self.samples:
            return []
        ranker, first = self.rankers[1]
        fitting = [entrant for entrant in pool if entrant.first == first]
        if not fitting:
            fitting = [_Entrant(self._sigmoid(k, ranker, first), f"sigmoid {k:g}", first) for k in _STEEPNESS]
        return [replace(each, reduction=replace(each.reduction, ranker=ranker)) for each in fitting[:_SECOND]]

    def _sigmoid(self, steepness: float, ranker: Mapping[str, Any], first: int) -> Reduction:
        k = steepness / self.budget.num_layers
        return self.run.under(ranker, fill(self.budget, sigmoid(self.budget, k, first_layer=first), first))

    def _steps(self, first: int) -> list[Schedule]:
        """One step each, at the first layers where the budget allows one."""
        steps = []
        for layer in range(first, self.budget.num_layers):
            try:
                rate = fit_rate(self.budget, partial(Schedule.step, self.budget.num_layers, layer))
            except Unreachable:  # what comes before this layer costs more than there is
                break
            steps.append(fill(self.budget, Schedule.step(self.budget.num_layers, layer, rate), first))
        return steps[:3]

    def _change(self) -> bool:
        """A round of changes to the best candidate; False when there is no room for another."""
        _, best = self._leader()
        changed = self._changed(best)
        if not self.samples:
            self._run_whole(changed[0])
            return True
        if self._left() < 1 + _MUTANTS * _SOME:
            return False
        pool = [entrant for entrant in changed if entrant.reduction != best.reduction]
        if pool:
            first = self._ranked(pool, _SOME)[0]
            if worth(self._run(first, _SOME)) > worth(self._run(best, _SOME)):
                self._run_whole(first)
        return True

    def _changed(self, best: _Entrant) -> list[_Entrant]:
        """New candidates: the best one bent, and mixed with others that did well."""
        progress = self.run.evaluations / self.n_trials
        strength = _STRENGTHS[0] + (_STRENGTHS[1] - _STRENGTHS[0]) * progress
        schedule, ranker = best.reduction.schedule, best.reduction.ranker
        others = [each.reduction.schedule for each in self.elite if each.reduction.schedule != schedule][:_PARENTS]
        found = []
        for number in range(_MUTANTS):
            if others and number % 2:
                other = others[int(self.rng.integers(len(others)))]
                share = float(self.rng.uniform(0.25, 0.75))
                changed, why = blend(self.budget, schedule, other, share, best.first), "mixed"
            else:
                changed, why = deform(self.budget, schedule, self.rng, strength, best.first), "bent"
            found.append(_Entrant(self.run.under(ranker, changed), why, best.first))
        return found


def exit_model(
    run: Run, first_layer: int, ranker: Mapping[str, Any], layers: int = 5, rates: Sequence[float] = STEPS
) -> ExitModel:
    """Measured on few examples; the loss is what the full model's answers lose in probability."""
    num_layers = int(run.evaluator.num_layers)
    places = grid(num_layers, first_layer, layers)
    whole = run.measure(run.under(ranker, Schedule.full(num_layers)), "sensitivity", share=_FEW)
    full = 1.0 if whole.agreement is None else whole.agreement

    def loss(layer: int, rate: float) -> float:
        step = Schedule.step(num_layers, layer, rate)
        trial = run.measure(run.under(ranker, step), "sensitivity", share=_FEW)
        if trial.agreement is None:
            return run.study.full_score - trial.score
        return full - trial.agreement

    def losses_at(layer: int) -> list[float]:
        run.keep_all_before(layer)
        run.ahead([run.under(ranker, Schedule.step(num_layers, layer, rate)) for rate in rates], share=_FEW)
        return [loss(layer, rate) for rate in rates]

    losses = np.array([losses_at(layer) for layer in places])
    run.keep_all_before(first_layer)
    return ExitModel(num_layers, first_layer, tuple(places), tuple(rates), losses)


SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Points of a frontier, as shares of the full cost; the full model itself is always one."""

LEAST_OF_FRONTIER = 4  # per point
_SLACK = 1e-9  # as in gsearch: a drop of exactly the tolerance is within it


@dataclass(frozen=True)
class Frontier(shown.Shown):
    """Points in the order of their cost, cheapest first; the full model is not among them.

    ``evaluations`` counts all that were spent, the sensitivities included.
    """

    points: tuple[SearchResult, ...]
    full_score: float
    evaluations: float

    def __repr__(self) -> str:
        ends = [self.points[0], self.points[-1]] if self.points else []
        range_ = " to ".join(f"{point.spent:.4g}" for point in ends if point.spent is not None)
        return f"Frontier({len(self.points)} points, cost {range_}, {self.evaluations:g} evaluations)"

    def _tables(self) -> Iterable[shown.Table]:
        columns = (
            shown.Column("mean keep rate", lambda point: shown.percent(point.schedule.mean_keep_rate)),
            shown.Column("spent", lambda point: shown.NOTHING if point.spent is None else f"{point.spent:.4g}"),
            shown.Column("calibration score", lambda point: shown.percent(point.score)),
            shown.Column("drop in points", lambda point: shown.points(point.drop)),
        )
        return [shown.Table("Points of the frontier, cheapest first", self.points, *columns)]

    def _drawings(self) -> Iterable[Markup]:
        if not self.points:
            return []
        *others, first = ((f"point {place}", point.schedule) for place, point in enumerate(self.points))
        return [drawn(first[1], others)]

    def within(self, limit: float) -> SearchResult:
        """The best-scoring point that costs at most ``limit``, in the budgets' unit.

        Raises:
            ThinsightError: no point is that cheap.
        """
        fitting = [p for p in self.points if p.spent is not None and p.spent <= limit * (1 + _SLACK)]
        if not fitting:
            raise BadInput(f"the cheapest point costs {self.points[0].spent}, more than {limit}")
        return max(fitting, key=lambda p: (p.score, p.agreement or 0.0))

    def at_drop(self, max_drop: float) -> SearchResult | None:
        """The cheapest point whose calibration score falls by at most ``max_drop``; None: only the full
        model."""
        fitting = [p for p in self.points if p.drop <= max_drop + _SLACK]
        return min(fitting, key=lambda p: p.spent or 0.0) if fitting else None

    def certified(self, evaluator: Any, max_drop: float, confidence: float = 0.95, **options: Any) -> Reduction:
        """The cheapest reduction of the frontier whose drop is certified, holding its certificate; the full model where
        none is. The points, from costly to cheap, are the path.

        Args:
            evaluator: on examples that the frontier was not found on.
            max_drop, confidence, options: see `thinsight.certify`.

        Raises:
            ThinsightError: as of `thinsight.certify`.
        """
        path: list[Reduction] = []
        for point in reversed(self.points):
            pairs = zip(point.schedule.keep_rates, path[-1].schedule.keep_rates if path else (2.0,), strict=False)
            if any(cheap < costly for cheap, costly in pairs):
                path.append(point.reduction)
        certificate = certify(path, evaluator, max_drop, confidence, **options)
        if certificate.place is None:
            full = Schedule.full(path[0].schedule.num_layers)
            return replace(path[0], schedule=full, adaptive=None, search=None, certificate=certificate)
        return replace(path[certificate.place], certificate=certificate)


def frontier(
    evaluator: SearchEvaluator,
    budgets: Sequence[Budget | float] | Budget | float = SHARES,
    *,
    budget_unit: str = "keep",
    n_trials: int = 4,
    seed: int = 0,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> Frontier:
    """One schedule per budget, the sensitivities measured once and each point starting from the last.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`.
        budgets: mean keep rates, or budgets of one unit; those that the ranker cannot reach are left out.
        budget_unit: of numbers, see `psigmoid`.
        n_trials: evaluations per point.
        seed: of everything random.
        study, resume: as of `gsearch`.
        observer: told of each point as a search of its own.

    Raises:
        ThinsightError: bad arguments, budgets of several units, or none that can be reached.
    """
    n_trials, seed = whole(n_trials, "n_trials", LEAST_OF_FRONTIER), whole(seed, "seed", 0)
    evaluator = as_evaluator(evaluator)
    wanted = _wanted(evaluator, budgets, budget_unit)
    if len({budget.unit for budget in wanted}) > 1:
        raise BadInput("budgets are of several units; give budgets of one unit")
    reachable: list[tuple[Budget, Mapping[str, Any], int]] = []
    for budget in sorted(wanted, key=lambda budget: budget.limit):
        try:
            reachable += [(budget, *each) for each in first_layers(evaluator, budget, ())]
        except Unreachable as error:
            reason = error
    if not reachable:
        raise reason
    settings = {
        "method": "frontier",
        "n_trials": n_trials,
        "seed": seed,
        "budgets": [budget.to_dict() for budget, *_ in reachable],
    }
    journal = Study(evaluator, settings, study, resume=resume)
    points: list[SearchResult] = []
    start: Schedule | None = None
    models = {}
    for budget, own, first in reachable:
        facts = {**settings, "first_layer": first, "budgets": None, "rankers": []}
        run = Run(evaluator, facts, budget=budget, expected=n_trials, study=journal, observer=observer)
        run.keep_all_before(first)
        if evaluator.samples and first not in models:
            models[first] = exit_model(run, first, own)
            run.expected += run.evaluations
        search = SensitivitySearch(run, [(own, first)], start, models.get(first), run.evaluations + n_trials)
        points.append(search.search())
        start = points[-1].schedule
    return Frontier(tuple(points), journal.full_score, sum(point.evaluations for point in points))


def _wanted(evaluator: SearchEvaluator, budgets: Sequence[Budget | float] | Budget | float, unit: str) -> list[Budget]:
    """All of them as budgets for the evaluator."""
    single = isinstance(budgets, (Budget, Real, str))
    given: list[Any] = [budgets] if single else list(budgets) if isinstance(budgets, Iterable) else []
    if not given:
        raise BadInput(f"budgets is {budgets!r}; give mean keep rates, such as [0.25, 0.5], or budgets")
    found: list[Budget] = []
    for budget in given:
        if unit == "ms" and found and not isinstance(budget, Budget):  # the device is profiled once
            check_budget_value(budget, unit)
            found.append(found[0].limited(float(budget)))
        else:
            found.append(budget_of(evaluator, budget, unit))
    return found
