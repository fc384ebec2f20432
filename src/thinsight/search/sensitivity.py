"""Sensitivity search: the best score inside a budget, from a model of what each layer's tokens are worth.

Three stages on the same evaluations that another search would spend on whole candidates: steps on few
examples say what each band of tokens is worth at each layer (exits.py); the schedules that follow from it
stand against sigmoids, steps and random staircases on more and more examples (successive halving); the best
is changed a little, again and again. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..budget import Budget, fill, fit_rate
from ..errors import ThinsightError
from ..schedule import Schedule
from .budgeted import BudgetedRun, check_count, first_layers
from .exits import ExitModel, grid
from .progress import SearchObserver
from .result import SearchResult, Trial
from .shapes import deform, random_staircase, sigmoid
from .study import SearchEvaluator, share_prefix

__all__ = ["exit_model", "sensitivity_search", "worth"]

LEAST_TRIALS = 8  # the sensitivities alone take about three
_FEW, _SOME = 1 / 8, 1 / 4  # shares of the examples
_STEEPNESS = (2.0, 6.0, 16.0, 60.0)  # k x depth of the sigmoids that take part
_RANDOM = 4  # random staircases that take part
_SURVIVORS = 8
_MUTANTS = 4  # in each round of changes
_MOST_ROUNDS = 10  # per evaluation to spend: an end where changes lead to nothing new
_STRENGTHS = (1.0, 0.5)  # of the first changes and of the last, in logits


def worth(trial: Trial) -> float:
    """What is searched for: the score and, where it is known, the agreement with the full model, which is
    smooth where scores of few examples are not."""
    return trial.score + (trial.agreement or 0.0)


def sensitivity_search(
    evaluator: SearchEvaluator,
    budget: Budget,
    *,
    n_trials: int = 20,
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
        evaluator: see `thinsight.search.SearchEvaluator`. One that can run a sample of its examples is used
            so.
        budget: see `thinsight.budget`.
        n_trials: evaluations to spend; one on a share of the examples counts as that share.
        seed: of everything random.
        first_layer: the first layer that may get fewer tokens; None: see `shapes.first_layer_for`.
        warm_start: a schedule that takes part, brought to the budget.
        rankers: rankers to choose from, as dicts; the evaluator's own if empty. Choosing costs evaluations
            like everything else.
        study: journal file.
        resume: continue that journal.
        observer: told what happens.

    Raises:
        ThinsightError: bad arguments, or a budget that the layers before the first reduction overrun.
    """
    check_count(n_trials, "n_trials", LEAST_TRIALS)
    check_count(seed, "seed", 0)
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
    run = BudgetedRun(
        evaluator, budget, settings, expected=n_trials, study=study, resume=resume, observer=observer
    )
    return SensitivitySearch(run, first, warm_start, rankers=choices if rankers else ()).search()


class SensitivitySearch:
    """The stages of one search."""

    def __init__(
        self,
        run: BudgetedRun,
        first: int,
        warm_start: Schedule | None,
        model: ExitModel | None = None,
        rankers: Sequence[tuple[dict[str, Any] | None, int]] = (),
        n_trials: float | None = None,
    ) -> None:
        self.run, self.first, self.warm_start, self.model = run, first, warm_start, model
        self.budget, self.settings, self.rankers = run.budget, run.settings, rankers
        self.n_trials: float = run.settings["n_trials"] if n_trials is None else n_trials
        self.rng = np.random.default_rng(run.settings["seed"])
        self.samples = hasattr(run.evaluator, "sample")
        self.ranker: dict[str, Any] | None = None
        self.whole: list[Trial] = []  # run on all examples

    def search(self) -> SearchResult:
        """The result whose schedule is the best one found."""
        return self.run.finish(self.best())

    def best(self) -> Trial:
        """The best trial, after all evaluations are spent."""
        self._choose_ranker()
        pool = self._pool()
        for share in (_FEW, _SOME) if self.samples else ():
            # half of what is left without the one evaluation that the winner needs
            room = max(1, int((self._left() - 1) / 2 / share))
            pool = self._best(pool[:room], share, _SURVIVORS)
        for schedule, why in pool[: max(1, int(self.n_trials) // 8)] if self.samples else pool:
            if not self.whole or self._left() >= 1:
                self.whole.append(self.run.run(schedule, why, ranker=self.ranker))
        for _ in range(_MOST_ROUNDS * int(self.n_trials)):
            if self._left() < 1 or not self._change():
                break
        return max(self.whole, key=worth)

    def _left(self) -> float:
        return self.n_trials - self.run.evaluations

    def _best(self, pool: list[tuple[Schedule, str]], share: float, survivors: int) -> list[Any]:
        """The survivors of a pool, best first, on a share of the examples."""
        trials = [
            (self.run.run(schedule, why, share=share, ranker=self.ranker), schedule, why)
            for schedule, why in pool
        ]
        ordered = sorted(trials, key=lambda each: -worth(each[0]))
        return [(schedule, why) for _, schedule, why in ordered[:survivors]]

    def _choose_ranker(self) -> None:
        """The ranker under which a gentle and a steep sigmoid do best, each from the first layer it can."""
        share = _FEW if self.samples else 1.0
        found: list[tuple[float, int, dict[str, Any] | None]] = []
        for ranker, first in self.rankers:
            self.first = first
            shapes = [self._sigmoid(_STEEPNESS[0]), self._sigmoid(_STEEPNESS[-1])]
            trials = [self.run.run(shape, "ranker", share=share, ranker=ranker) for shape in shapes]
            found.append((sum(map(worth, trials)), first, ranker))
        if found:
            _, self.first, self.ranker = max(found, key=lambda each: each[0])
            if self.first:
                share_prefix(self.run.evaluator, Schedule.full(self.budget.num_layers), self.first)

    def _pool(self) -> list[tuple[Schedule, str]]:
        """Schedules that take part, each named."""
        pool = [(self._sigmoid(k), f"sigmoid {k:g}") for k in _STEEPNESS]
        if self.samples:
            self.model = self.model or exit_model(self.run, self.first, self.ranker)
            pool.insert(0, (self.model.schedule(self.budget), "exit model"))
        if self.warm_start is not None:
            pool.insert(0, (self._spent(self.warm_start), "start"))
        pool += [(step, "step") for step in self._steps()]
        draws = [random_staircase(self.budget, self.rng, self.first) for _ in range(_RANDOM)]
        pool += [(schedule, "random") for schedule in draws]
        unique = {schedule: (schedule, why) for schedule, why in reversed(pool)}
        ordered = list(reversed(unique.values()))
        return ordered if self.samples else ordered[: max(1, int(self.n_trials) // 2)]

    def _sigmoid(self, steepness: float) -> Schedule:
        k = steepness / self.budget.num_layers
        return fill(self.budget, sigmoid(self.budget, k, first_layer=self.first), self.first)

    def _steps(self) -> list[Schedule]:
        """One step each, at the first layers where the budget allows one."""
        steps = []
        for layer in range(self.first, self.budget.num_layers):
            try:
                rate = fit_rate(self.budget, lambda r, at=layer: self._step(at, r))  # type: ignore[misc]
            except ThinsightError:  # what comes before this layer costs more than there is
                break
            steps.append(fill(self.budget, self._step(layer, rate), self.first))
        return steps[:3]

    def _step(self, layer: int, rate: float) -> Schedule:
        return Schedule.step(self.budget.num_layers, layer, rate)

    def _spent(self, schedule: Schedule) -> Schedule:
        """A schedule brought to the budget, its shape kept."""
        return deform(self.budget, schedule, self.rng, 0.0, self.first)

    def _change(self) -> bool:
        """A round of changes to the best schedule; False when there is no room for another."""
        best = max(self.whole, key=worth)
        progress = self.run.evaluations / self.n_trials
        strength = _STRENGTHS[0] + (_STRENGTHS[1] - _STRENGTHS[0]) * progress
        changed = [
            deform(self.budget, best.schedule, self.rng, strength, self.first) for _ in range(_MUTANTS)
        ]
        if not self.samples:
            self.whole.append(self.run.run(changed[0], "changed", ranker=self.ranker))
            return True
        if self._left() < 1 + _MUTANTS * _SOME:
            return False
        pool = [(schedule, "changed") for schedule in changed if schedule != best.schedule]
        if pool:
            schedule, why = self._best(pool, _SOME, 1)[0]
            sample = self.run.run(best.schedule, best.why, share=_SOME, ranker=self.ranker)
            if worth(self.run.run(schedule, why, share=_SOME, ranker=self.ranker)) > worth(sample):
                self.whole.append(self.run.run(schedule, why, ranker=self.ranker))
        return True


def exit_model(run: BudgetedRun, first_layer: int, ranker: dict[str, Any] | None = None) -> ExitModel:
    """Measured on few examples; the loss is what the full model's answers lose in probability."""
    num_layers = run.budget.num_layers
    layers, rates = grid(num_layers, first_layer)
    whole = run.measure(Schedule.full(num_layers), "sensitivity", share=_FEW, ranker=ranker)
    full = 1.0 if whole.agreement is None else whole.agreement

    def loss(layer: int, rate: float) -> float:
        step = Schedule.step(num_layers, layer, rate)
        trial = run.measure(step, "sensitivity", share=_FEW, ranker=ranker)
        if trial.agreement is None:
            return run.study.full_score - trial.score
        return full - trial.agreement

    losses = np.array([[loss(layer, rate) for rate in rates] for layer in layers])
    return ExitModel(num_layers, first_layer, tuple(layers), tuple(rates), losses)
