"""Solvers: how the count of one layer is found when the layers above are settled.

Knows nothing about the layers' order, about journals, or about how a candidate is scored: a solver sees one
`LayerProblem`. To add a solver, write a class with the members of `Solver` and pass an object of it to
`gsearch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

from ..errors import BadInput
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
        probe_all: tries several counts, at the same time where the evaluator can; the trials come in the
            order of the counts. None: `try_all` probes one after another.
    """

    upper: int
    upper_score: float
    probe: Callable[..., Trial]  # (count: int, *, exact: bool = False) -> Trial
    mean_keep_rate: Callable[[int], float]
    seed: int
    probe_all: Callable[[Sequence[int]], list[Trial]] | None = None

    def try_all(self, counts: Sequence[int]) -> list[Trial]:
        """The trials of several counts, whether or not they can be tried at the same time."""
        return [self.probe(count) for count in counts] if self.probe_all is None else self.probe_all(counts)


@runtime_checkable
class Solver(Protocol):
    """Finds one layer's count."""

    @property
    def settings(self) -> dict[str, Any]:
        """``{"name": ..., **settings}`` as JSON values: what a resumed search compares."""

    @property
    def exact(self) -> bool:
        """Whether it reads complete scores only, so that no evaluation of its may stop early."""
        return False

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

    With ``at_once`` = k above 1, each round tries k counts that cut what is left into k + 1 parts, and goes
    on below the least accepted one, above its refused neighbour: about ``log(upper) / log(k + 1)`` rounds of
    k evaluations, most of which turn out not to be needed. Where the score is monotone the count found is the
    same for every k. Where it is not, several counts may pass whose lower neighbours fail, and which of them
    is found depends on k; each of them was accepted.

    Nothing that was evaluated for the layers above settles a count here (those candidates differ above this
    layer), and ``upper`` itself is the schedule already accepted, so no evaluation is a repeat.

    Args:
        step: counts are multiples of this; 1 is exact, larger ones save ``log2(step)`` evaluations a layer.
        at_once: counts tried per round. It is none of the ``settings``: an evaluation is the same whatever
            it stood beside, so a journal may be resumed with another number.
    """

    step: int = 1
    at_once: int = 1

    def __post_init__(self) -> None:
        _positive(self.step, "step")
        _positive(self.at_once, "at_once")

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "bisect", "step": self.step}

    @property
    def exact(self) -> bool:
        return False

    def most_evaluations(self, upper: int) -> int:
        width, most = self._steps(upper) + 1, 0  # from what fails to what passes
        while width > 1:
            most += min(self.at_once, width - 1)
            width = -(-width // (self.at_once + 1))
        return most

    def solve(self, problem: LayerProblem) -> int:
        fails, passes = -1, self._steps(problem.upper)  # in steps; the top one stands for ``upper`` itself
        while passes - fails > 1:
            between = self._between(fails, passes)
            trials = problem.try_all([each * self.step for each in between])
            for each, trial in zip(between, trials, strict=True):
                if trial.accepted:
                    passes = each
                    break
                fails = each
        return min(passes * self.step, problem.upper)

    def _between(self, fails: int, passes: int) -> list[int]:
        """Up to ``at_once`` numbers that cut an interval into parts of like width, in rising order."""
        width = passes - fails
        parts = min(self.at_once + 1, width)
        return [fails + width * part // parts for part in range(1, parts)]

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
            raise BadInput(f"trade_off is {weight!r}; it must be a finite number of at least 0")

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "bayes", "trade_off": float(self.trade_off), "n_trials": int(self.n_trials)}

    @property
    def exact(self) -> bool:
        return True

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


SOLVERS: dict[str, type[Bisect] | type[Bayes]] = {"bisect": Bisect, "bayes": Bayes}


def get_solver(
    solver: str | Solver,
    *,
    step: int | None = None,
    trade_off: float | None = None,
    n_trials: int | None = None,
    at_once: int = 1,
) -> Solver:
    """The solver of that name with the settings that are not None; a solver object is returned as it is.

    Raises:
        ThinsightError: an unknown name, a bad setting, or one that the solver does not take.
    """
    kind = SOLVERS.get(solver) if isinstance(solver, str) else None
    if kind is None and not isinstance(solver, Solver):
        raise BadInput(
            f"solver is {solver!r}; choose 'bisect' or 'bayes', or pass an object with all members of Solver"
        )
    settings: dict[str, Any] = {"step": step, "trade_off": trade_off, "n_trials": n_trials}
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if kind is None or name not in kind.__dataclass_fields__:
            others = [repr(other) for other, each in SOLVERS.items() if name in each.__dataclass_fields__]
            raise BadInput(
                f"{name} is {value!r}, which solver {solver!r} does not take: leave it out, or choose "
                f"{' or '.join(others)}"
            )
    if kind is None:
        assert not isinstance(solver, str)
        return solver
    return Bisect(**given, at_once=at_once) if kind is Bisect else kind(**given)


def check_early_stop(solver: Solver, confidence: float | None) -> None:
    """Check that a confidence of early stops (None: there is none) is one, and that the solver has them.

    Raises:
        ThinsightError: it is not between 0 and 1, or the solver asks for exact scores only.
    """
    if confidence is None:
        return
    check_confidence(confidence)
    if solver.exact:
        name = solver.settings.get("name")
        raise BadInput(
            f"confidence is {confidence!r}, but solver {name!r} scores every candidate on all examples: "
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
        raise BadInput(f"{field} is {value!r}; it must be a whole number of at least 1")
