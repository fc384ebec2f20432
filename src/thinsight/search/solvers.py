"""Solvers: how the count of one layer is found when the layers above are settled.

Knows nothing about the layers' order, about journals, or about how a candidate is scored: a solver sees one
`LayerProblem`. To add a solver, write a class with the members of `Solver` and pass an object of it to
`gsearch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

from ..errors import ThinsightError
from ..evaluation.bounds import check_confidence
from .proposals import quiet
from .result import Trial

__all__ = ["Bayes", "Bisect", "LayerProblem", "Solver", "check_early_stop", "get_solver"]


@dataclass(frozen=True)
class LayerProblem:
    """One layer's question: how many tokens from here on?

    Attributes:
        upper: the count of the layer above; keeping it is known to stay within the tolerance.
        upper_score: the score with that count.
        probe: tries a count below ``upper``. With ``exact`` the score is complete; without it an evaluation
            that cannot pass may stop early. The trial says whether the count was accepted.
        mean_keep_rate: the mean keep rate over all layers of the candidate with a given count.
        seed: for the solver's random numbers, of its own for every layer.
    """

    upper: int
    upper_score: float
    probe: Callable[..., Trial]  # (count: int, *, exact: bool = False) -> Trial
    mean_keep_rate: Callable[[int], float]
    seed: int


class Solver(Protocol):
    """Finds one layer's count."""

    @property
    def settings(self) -> dict[str, Any]:
        """``{"name": ..., **settings}`` as JSON values: what a resumed search compares."""

    def most_evaluations(self, upper: int) -> int:
        """Upper bound of the evaluations one layer takes below ``upper``; must not fall when ``upper``
        rises."""

    def solve(self, problem: LayerProblem) -> int:
        """The chosen count: ``problem.upper``, or one whose probe was accepted.

        Must depend on nothing but the problem, so that a resumed search proposes the same counts.
        """


@dataclass(frozen=True)
class Bisect:
    """Least accepted count by bisection: ``ceil(log2(upper + 1))`` evaluations, exact when the score is
    monotone.

    Nothing that was evaluated for the layers above settles a count here (those candidates differ above this
    layer), and ``upper`` itself is the schedule already accepted, so no evaluation is a repeat.

    Args:
        step: counts are multiples of this; 1 is exact, larger ones save ``log2(step)`` evaluations a layer.
    """

    step: int = 1

    def __post_init__(self) -> None:
        _positive(self.step, "step")

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "bisect", "step": self.step}

    def most_evaluations(self, upper: int) -> int:
        return self._steps(upper).bit_length()

    def solve(self, problem: LayerProblem) -> int:
        fails, passes = -1, self._steps(problem.upper)  # in steps; the top one stands for ``upper`` itself
        while passes - fails > 1:
            middle = (fails + passes) // 2
            if problem.probe(middle * self.step).accepted:
                passes = middle
            else:
                fails = middle
        return min(passes * self.step, problem.upper)

    def _steps(self, upper: int) -> int:
        return -(-upper // self.step)


@dataclass(frozen=True)
class Bayes:
    """The paper's solver (arXiv 2412.00556, G-Search): Bayesian optimisation of ``score - trade_off * cost``.

    Cost is the mean keep rate over all layers. The paper gives neither lambda nor the number of trials.
    Among the counts tried (and the one of the layer above) the best by this objective *that was accepted*
    is returned, so the tolerance holds whatever the weight. Proposals come from Optuna's Gaussian-process
    sampler, seeded before each ask, so that a resumed search proposes the same counts.

    Args:
        trade_off: the weight lambda, in score units for the whole model's vision tokens; at least 0.
        n_trials: proposals per layer; repeated ones cost no evaluation.
    """

    trade_off: float = 0.1
    n_trials: int = 8

    def __post_init__(self) -> None:
        _positive(self.n_trials, "n_trials")
        weight = self.trade_off
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ThinsightError(f"trade_off is {weight!r}; it must be a finite number of at least 0")

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "bayes", "trade_off": float(self.trade_off), "n_trials": int(self.n_trials)}

    def most_evaluations(self, upper: int) -> int:
        return min(self.n_trials, upper)

    def solve(self, problem: LayerProblem) -> int:
        seen = [(problem.upper, self._objective(problem, problem.upper, problem.upper_score))]
        accepted = list(seen)
        scores = {problem.upper: problem.upper_score}
        for number in range(self.n_trials):
            count = _propose(seen, problem.upper, problem.seed + number)
            if count not in scores:
                trial = problem.probe(count, exact=True)
                scores[count] = trial.score
                if trial.accepted:
                    accepted.append((count, self._objective(problem, count, trial.score)))
            seen.append((count, self._objective(problem, count, scores[count])))
        # equal objectives: the smaller count
        return max(accepted, key=lambda pair: (pair[1], -pair[0]))[0]

    def _objective(self, problem: LayerProblem, count: int, score: float) -> float:
        return score - self.trade_off * problem.mean_keep_rate(count)


def get_solver(solver: str | Solver, *, step: int, trade_off: float, n_trials: int) -> Solver:
    """The solver of that name with its settings; a solver object is returned as it is.

    Raises:
        ThinsightError: an unknown name or bad settings.
    """
    if solver == "bisect":
        return Bisect(step)
    if solver == "bayes":
        return Bayes(trade_off, n_trials)
    if isinstance(solver, str) or not callable(getattr(solver, "solve", None)):
        raise ThinsightError(f"solver is {solver!r}; choose 'bisect' or 'bayes', or pass a Solver object")
    return solver


def check_early_stop(solver: Solver, confidence: float | None) -> None:
    """Check that a confidence of early stops (None: there is none) is one, and that the solver has them.

    Raises:
        ThinsightError: it is not between 0 and 1, or the solver asks for exact scores only.
    """
    if confidence is None:
        return
    check_confidence(confidence)
    if isinstance(solver, Bayes):
        raise ThinsightError(
            f"confidence is {confidence!r}, but solver 'bayes' scores every candidate on all examples: "
            "leave it out, or choose 'bisect'"
        )


_STARTUP = 3  # random proposals before the Gaussian process takes over, the known point included


def _propose(seen: list[tuple[int, float]], upper: int, seed: int) -> int:
    """The next count in [0, upper] to try, a pure function of what was seen: ``(count, objective)`` pairs."""
    import optuna

    with quiet(optuna):
        sampler = optuna.samplers.GPSampler(seed=seed % 2**32, n_startup_trials=_STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        space = {"count": optuna.distributions.IntDistribution(0, upper)}
        for count, value in seen:
            study.add_trial(
                optuna.trial.create_trial(params={"count": count}, distributions=dict(space), value=value)
            )
        return int(study.ask(dict(space)).params["count"])


def _positive(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ThinsightError(f"{field} is {value!r}; it must be a whole number of at least 1")
