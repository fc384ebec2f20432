"""G-Search (Scenario I): the fewest vision tokens, layer by layer, that keep the score.

Knows nothing about models: it sees an evaluator, and a solver that answers one layer's question at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from ..errors import BadInput, whole
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..evaluation.bounds import check_confidence
from ..progress import SearchObserver
from ..registry import Registry
from ..schedule import Schedule
from .run import Run, SearchResult, Trial
from .shapes import propose

_STARTUP = 3  # random proposals of *bayes* at first, the known point included


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

    With ``at_once`` = k above 1, each round tries k counts that cut what is left into k + 1 parts, and goes on below
    the least accepted one, above its refused neighbour: about ``log(upper) / log(k + 1)`` rounds. Where the score is
    monotone the count found is the same for every k; where it is not, it may be another one that was accepted.

    Args:
        step: counts are multiples of this; 1 is exact, larger ones save ``log2(step)`` evaluations a layer.
        at_once: counts tried per round. None of the ``settings``: a journal may be resumed with another number.
    """

    step: int = 1
    at_once: int = 1

    def __post_init__(self) -> None:
        whole(self.step, "step", 1)
        whole(self.at_once, "at_once", 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "bisect", "step": self.step}

    @property
    def exact(self) -> bool:
        return False

    def most_evaluations(self, upper: int) -> int:
        width, most = -(-upper // self.step) + 1, 0  # from what fails to what passes
        while width > 1:
            most += min(self.at_once, width - 1)
            width = -(-width // (self.at_once + 1))
        return most

    def solve(self, problem: LayerProblem) -> int:
        fails, passes = -1, -(-problem.upper // self.step)  # in steps; the top one stands for ``upper`` itself
        while passes - fails > 1:
            width = passes - fails  # cut into parts of like width
            parts = min(self.at_once + 1, width)
            between = [fails + width * part // parts for part in range(1, parts)]
            trials = problem.try_all([each * self.step for each in between])
            for each, trial in zip(between, trials, strict=True):
                if trial.accepted:
                    passes = each
                    break
                fails = each
        return min(passes * self.step, problem.upper)


@dataclass(frozen=True)
class Bayes:
    """The paper's solver (arXiv 2412.00556, G-Search): Bayesian optimisation of ``score - trade_off * cost``.

    Cost is the mean keep rate over all layers. The paper gives neither lambda nor the number of trials.
    Among the counts tried (and the one of the layer above) the best by this objective *that was accepted*
    is returned, so the tolerance holds whatever the weight. A resumed search proposes the same counts.

    Args:
        trade_off: the weight lambda, in score units for the whole model's vision tokens; at least 0.
        n_trials: proposals per layer; repeated ones cost no evaluation.
    """

    trade_off: float = 0.1
    n_trials: int = 8

    def __post_init__(self) -> None:
        whole(self.n_trials, "n_trials", 1)
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
        accepted = [(problem.upper, self._objective(problem, problem.upper, problem.upper_score))]
        seen = [({"count": problem.upper}, accepted[0][1])]
        scores = {problem.upper: problem.upper_score}
        for number in range(self.n_trials):
            space = {"count": (0, problem.upper)}
            count = int(propose(seen, space, problem.seed + number, _STARTUP)["count"])
            if count not in scores:
                trial = problem.probe(count, exact=True)
                scores[count] = trial.score
                if trial.accepted:
                    accepted.append((count, self._objective(problem, count, trial.score)))
            seen.append(({"count": count}, self._objective(problem, count, scores[count])))
        # equal objectives: the smaller count
        return max(accepted, key=lambda pair: (pair[1], -pair[0]))[0]

    def _objective(self, problem: LayerProblem, count: int, score: float) -> float:
        return score - self.trade_off * problem.mean_keep_rate(count)


SOLVERS: Registry[Callable[..., Solver]] = Registry("solver")
SOLVERS.register(Bisect, "bisect")
SOLVERS.register(Bayes, "bayes")


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
    kind = SOLVERS[solver] if isinstance(solver, str) and solver in SOLVERS else None
    if kind is None and not isinstance(solver, Solver):
        raise BadInput(
            f"solver is {solver!r}; choose {' or '.join(map(repr, SOLVERS))}, or pass an object with all members of "
            "Solver"
        )
    settings: dict[str, Any] = {"step": step, "trade_off": trade_off, "n_trials": n_trials}
    given = {name: value for name, value in settings.items() if value is not None}
    taken = () if kind is None else signature(kind).parameters
    for name, value in given.items():
        if name not in taken:
            others = [repr(other) for other in SOLVERS if name in signature(SOLVERS[other]).parameters]
            raise BadInput(
                f"{name} is {value!r}, which solver {solver!r} does not take: leave it out, or choose "
                f"{' or '.join(others)}"
            )
    if kind is None:
        assert not isinstance(solver, str)
        return solver
    return kind(**given, **({"at_once": at_once} if "at_once" in taken else {}))


def check_early_stop(solver: Solver, confidence: float | None, name: str = "confidence") -> None:
    """Check that a confidence of early stops (None: there is none) is one, and that the solver has them.

    Raises:
        ThinsightError: it is not between 0 and 1, or the solver asks for exact scores only.
    """
    if confidence is None:
        return
    check_confidence(confidence, name)
    if solver.exact:
        title = solver.settings.get("name")
        raise BadInput(
            f"{name} is {confidence!r}, but solver {title!r} scores every candidate on all examples: "
            "leave it out, or choose 'bisect'"
        )


_SLACK = 1e-9  # a score of 0.99 is within 0.01 of 1.0, whatever the last bit of the mean says


def gsearch(
    evaluator: SearchEvaluator,
    max_drop: float = 0.01,
    *,
    first_layer: int | None = None,
    solver: str | Solver = "bisect",
    step: int | None = None,
    trade_off: float | None = None,
    n_trials: int | None = None,
    seed: int = 0,
    confidence: float | None = None,
    study: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search the fewest tokens per layer that keep the score (G-Search, arXiv 2412.00556 section 3).

    Shallow to deep: with the counts of the layers above settled, each layer gets the least count at which the
    score stays within ``max_drop`` of the full model's, deeper layers following it. Once a layer needs no
    token the deeper ones need none either, and the search ends.

    What is guaranteed, with the *bisect* solver at ``step=1``:

    * If the score never falls when a count rises, the result is the lexicographically least of all schedules
      within the tolerance: no other has fewer tokens at the first layer where the two differ.
    * Under the paper's assumption (the ranking is alike in all layers, and what a deep layer needs is a
      subset of what a shallow one needs) and ``max_drop=0``, every layer's count is the least of any
      schedule within the tolerance at once, so the result is the optimum for any cost that rises with the
      counts.
    * For ``max_drop > 0`` the same holds when the examples have a common order of need: one that needs more
      tokens than another at some layer needs no fewer at any other. Without it, which examples to give up
      is settled by the first layers, and another choice may cost less.

    Whatever the solver, the schedule returned was evaluated on all examples and lies within ``max_drop`` (or is the
    full one). With a `thinsight.Pool` of k workers whose evaluators score a candidate at a time, *bisect* tries k
    counts in place of one: fewer rounds, more evaluations, all of which count as cost. If the score never falls when a
    count rises, the schedule is the same. Workers that share an evaluation by batches try what one device tries.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`; `thinsight.Evaluator` is one.
        max_drop: largest drop of the calibration score, in the metric's own unit (0.01 is one point), at
            least 0.
        first_layer: the shallowest layer that may receive fewer tokens, numbered from 0. None: layer 2, or the first
            at which the evaluator's ranker can rank where that is deeper.
        solver: ``"bisect"``, ``"bayes"``, or an object with `Solver`'s members, which is used as it is:
            ``Bisect(at_once=k)`` tries k counts per round on any evaluator.
        step: *bisect*: counts are multiples of this; None: 1, exact.
        trade_off: *bayes*: the paper's weight lambda; None: 0.1.
        n_trials: *bayes*: proposals per layer; None: 8.
        seed: of everything random (*bisect* has nothing random unless ``confidence`` is given).
        confidence: *bisect*: also drop a candidate once the examples run so far show with this confidence
            that its score over all of them is out of tolerance, such as 0.99. A candidate within the
            tolerance is then dropped wrongly with a probability of at most 1 - confidence, each, which can
            cost tokens but not score. None: dropped only when it is certain.
        study: journal file; every evaluation is on disk before the next begins.
        resume: continue that journal, to the schedule of an uninterrupted run, also on another number of devices.
            (Where an evaluator learns in which order to run examples, the costs of early stops may differ.)
        observer: told what happens, for progress and ETA.

    Returns:
        SearchResult: schedule, reduction and all trials.

    Raises:
        ThinsightError: bad arguments, or a journal that cannot be used; before the first evaluation.
    """
    evaluator = as_evaluator(evaluator)
    check_max_drop(max_drop)  # all before the full score, which may take a run to obtain
    n = whole(evaluator.num_vision_tokens, "evaluator.num_vision_tokens", 1)
    num_layers = whole(evaluator.num_layers, "evaluator.num_layers", 1)
    at_once = whole(evaluator.at_once, "evaluator.at_once", 1)
    settings: dict[str, Any] = {
        "method": "gsearch",
        "max_drop": float(max_drop),
        "first_layer": whole(
            max(2, evaluator.first_layer) if first_layer is None else first_layer, "first_layer", 0, num_layers - 1
        ),
    }
    seed = whole(seed, "seed", 0)
    chosen = get_solver(solver, step=step, trade_off=trade_off, n_trials=n_trials, at_once=at_once)
    check_early_stop(chosen, confidence)
    settings |= {"solver": chosen.settings, "seed": seed}
    if confidence is not None:
        settings["confidence"] = float(confidence)
    run = Run(
        evaluator,
        settings,
        expected=(num_layers - settings["first_layer"]) * chosen.most_evaluations(n),
        study=study,
        resume=resume,
        confidence=confidence,
        observer=observer,
    )
    return _LayerByLayer(run, chosen, num_layers).search()


class _LayerByLayer:
    """One search: the schedule accepted so far, and how each layer's count is found."""

    def __init__(self, run: Run, solver: Solver, num_layers: int) -> None:
        self.run, self.solver, self.num_layers = run, solver, num_layers
        self.floor = run.study.full_score - run.settings["max_drop"] - _SLACK
        self.schedule = Schedule.full(num_layers)
        self.score, self.count = run.study.full_score, run.n
        self.settled = 0  # evaluations of the layers that are done

    def search(self) -> SearchResult:
        for layer in range(self.run.settings["first_layer"], self.num_layers):
            if self.count == 0:
                break
            self._settle(layer)
        at_once = self.solver.at_once if isinstance(self.solver, Bisect) else 1
        # where the score is not monotone, the schedule depends on it
        more = {"at_once": at_once} if at_once > 1 else {}
        return self.run.finish(self.run.evaluator.reduction(self.schedule), self.score, more=more)

    def _settle(self, layer: int) -> None:
        """Find this layer's count and adopt it."""
        self.run.evaluator.share(self.schedule, layer)
        tried: dict[int, Trial] = {}

        def probe_all(counts: Sequence[int], exact: bool = False) -> list[Trial]:
            trials = self._try(layer, counts, exact)
            for trial in trials:
                tried[trial.count] = trial
                self.run.add(trial, self._expected(layer))
            return trials

        # a seed of its own for every layer, far more apart than there are trials in one
        seed = (self.run.settings["seed"] * self.num_layers + layer) * 10_007
        count = self.solver.solve(
            LayerProblem(
                upper=self.count,
                upper_score=self.score,
                probe=lambda count, *, exact=False: probe_all([count], exact)[0],
                mean_keep_rate=lambda count: self._candidate(layer, count).mean_keep_rate,
                seed=seed,
                probe_all=probe_all,
            )
        )
        if count != self.count:
            best = tried.get(count)
            if best is None or not best.accepted:
                raise BadInput(f"solver chose count {count} at layer {layer}, which no probe accepted")
            self.schedule, self.score, self.count = best.schedule, best.score, count
        self.settled = len(self.run.trials)
        self.run.observer.on_layer(layer, count, self.run.progress(layer + 1, self._expected(layer + 1)))

    def _try(self, layer: int, counts: Sequence[int], exact: bool) -> list[Trial]:
        candidates = [self.run.evaluator.reduction(self._candidate(layer, count)) for count in counts]
        records = self.run.study.evaluate_all(candidates, None if exact else self.floor)
        return [
            Trial(
                layer=layer,
                keep_rate=count / self.run.n,
                count=count,
                accepted=record.complete and record.score >= self.floor,
                schedule=candidate.schedule,
                reduction=candidate,
                **vars(record),
            )
            for count, candidate, record in zip(counts, candidates, records, strict=True)
        ]

    def _candidate(self, layer: int, count: int) -> Schedule:
        return self.schedule.with_tail(layer, count / self.run.n)

    def _expected(self, layer: int) -> int:
        """Evaluations in all if every layer from ``layer`` on needs the most, its count being at most today's."""
        return self.settled + (self.num_layers - layer) * self.solver.most_evaluations(self.count)


def check_max_drop(max_drop: float) -> None:
    """Refuse a tolerance that is none.

    Raises:
        ThinsightError: not a finite number of at least 0.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not 0 <= max_drop < math.inf:
        raise BadInput(f"max_drop is {max_drop!r}; it must be a finite number of at least 0, such as 0.01")
