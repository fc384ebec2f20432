"""A search as it goes, and what it gives: every trial, and at last a result.

The same for all searches; knows nothing about how candidates are proposed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .. import notebook, shown
from ..budget import Budget
from ..certificate import ESTIMATED, Certificate, steps_table
from ..errors import BadInput, Unreachable
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..progress import Progress, SearchObserver, SearchPlan
from ..reduction import Reduction, read_only
from ..schedule import Adaptive, Schedule
from ..texts import brief
from .shapes import first_layer_for
from .study import Study

if TYPE_CHECKING:
    from ..evaluation.example import Example


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        layer: the layer that was being searched; None where a whole schedule was.
        keep_rate: the rate tried from that layer on, a fraction of the original tokens; a whole schedule's mean.
        count: the same as a number of the reference N tokens.
        score: calibration score; only an upper bound when ``complete`` is False.
        complete: False when the evaluation was stopped early because it could not pass.
        accepted: whether the score stays within the tolerance.
        schedule: the whole candidate; of an adaptive one, the mean.
        cost: decoder FLOPs that the evaluation took, if the evaluator tells.
        seconds: wall time of the evaluation.
        agreement: see `thinsight.Evaluation`.
        share: of the examples, how many were run.
        why: how the candidate came about.
        reduction: the candidate as it was run, its ranker included; None where only the schedule is known.
    """

    layer: int | None
    keep_rate: float
    count: int
    score: float
    complete: bool
    accepted: bool
    schedule: Schedule
    cost: float | None = None
    seconds: float = field(default=0.0, compare=False)
    agreement: float | None = None
    share: float = 1.0
    why: str = ""
    reduction: Reduction | None = None

    def __repr__(self) -> str:
        what = self.why if self.layer is None else f"layer {self.layer}, {self.count} tokens"
        score = f"{'' if self.complete else '<= '}{self.score:.4g}"
        return brief(f"Trial({what}: score {score}, mean keep rate {self.schedule.mean_keep_rate:.4g})")

    @property
    def ranker(self) -> Mapping[str, Any] | None:
        """Which tokens it kept."""
        return None if self.reduction is None else self.reduction.ranker

    @property
    def adaptive(self) -> Adaptive | None:
        """Schedules of which each prompt got its own."""
        return None if self.reduction is None else self.reduction.adaptive

    @property
    def merit(self) -> tuple[float, float]:
        """What decides between two on the same examples: the score, then the agreement with the full model."""
        return self.score, -math.inf if self.agreement is None else self.agreement


@dataclass(frozen=True)
class SearchResult(shown.Shown):
    """The outcome of a search. ``score`` and ``full_score`` are on the calibration set; of a certified search they and
    the schedule are the ``certificate``'s. Without one, what is lost is estimated.

    ``evaluations`` counts the schedules that were run, one on a share of the examples as that share (the full
    model's own run is not among them); ``cost`` is their decoder FLOPs in all, None when the evaluator does
    not tell; ``seconds`` is their wall time, that of interrupted runs included. ``max_drop`` is what was
    allowed, or None; ``budget`` what was to be spent (`Budget.to_dict`), or None, and ``spent`` what is.
    ``full_forwards`` is ``cost`` in full-set forward equivalents, if known.
    """

    schedule: Schedule
    reduction: Reduction
    trials: tuple[Trial, ...]
    method: str
    max_drop: float | None
    full_score: float
    score: float
    seed: int
    cost: float | None = None
    seconds: float = field(default=0.0, compare=False)
    budget: Mapping[str, Any] | None = None
    spent: float | None = None
    full_forwards: float | None = None
    agreement: float | None = None
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", tuple(self.trials))
        object.__setattr__(self, "budget", read_only(self.budget))

    def __repr__(self) -> str:
        asked = "" if self.max_drop is None else f", max_drop {self.max_drop:g}"
        if self.budget is not None:
            asked = f", budget {self.budget['limit']:.4g} {self.budget['unit']}"
        return brief(
            f"SearchResult({self.method}{asked}: score {self.score:.4g} of {self.full_score:.4g} in "
            f"{self.evaluations:g} evaluations, {self.schedule!r})"
        )

    def _tables(self) -> Iterable[shown.Table]:
        known = {
            "schedule": repr(self.schedule),
            "score": f"{shown.plain(self.score, 4)}, the full model's {shown.plain(self.full_score, 4)}",
            "allowed drop": "" if self.max_drop is None else f"{self.max_drop:g}",
            "drop": ESTIMATED if self.certificate is None else self.certificate.promise,
            "budget": "" if self.budget is None else f"{self.budget['limit']:.4g} {self.budget['unit']}",
            "evaluations": f"{self.evaluations:g}",
            "time": shown.duration(self.seconds),
        }
        own = [shown.facts_table(f"Search: {self.method}", known.items())]
        if self.certificate is not None:
            own.append(steps_table(self.certificate))
        return [*own, trials_table(self.trials)]

    def _drawings(self) -> Iterable[Markup]:
        return self.reduction._drawings()

    def report(
        self,
        path: str | os.PathLike[str],
        model: Any = None,
        processor: Any = None,
        examples: Sequence[Example] | str | Path | None = None,
        *,
        title: str | None = None,
        pictures: int = 6,
        **scoring: Any,
    ) -> Path:
        """Write the search as an HTML report, one file that needs no other: its schedule, what is promised of it, every
        evaluation. With a model and examples that the search has not seen, such as those it was certified on, also
        scores, costs, changed answers and kept tokens on those.

        Args:
            path: the file, replaced whole or not at all.
            model, processor: what was searched on, without a reduction on it; None: neither, and no examples.
            examples: those to test on, or what `thinsight.load_examples` takes.
            title: its headline.
            pictures: how many questions are shown with their kept tokens, those that score differently first.
            **scoring: further arguments of `thinsight.Evaluator`, such as ``batch_size`` and ``metric``.

        Returns:
            The path.

        Raises:
            ThinsightError: a model without examples or the other way round, bad examples, or a file that cannot be
                written.
        """
        # reports stand above searches: their room is reached by name, for the sake of whoever holds a result
        write = import_module("thinsight.job.reporting").report
        told = {"title": title, "pictures": pictures, **scoring}
        written: Path = write(self, path, model, processor, examples, **told)
        return written

    @property
    def evaluations(self) -> float:
        """Number of schedules evaluated; one on a sample counts as its share."""
        shares = math.fsum(trial.share for trial in self.trials)
        return int(shares) if shares == int(shares) else shares

    @property
    def drop(self) -> float:
        """Full model's calibration score minus that of the schedule found."""
        return self.full_score - self.score


def trials_table(trials: Sequence[Trial]) -> shown.Table:
    """The evaluations of a search: of layers, or of whole schedules with the share of the examples they took."""
    whole = any(trial.layer is None for trial in trials)
    return shown.Table(
        "Trials, on the calibration set",
        enumerate(trials, 1),
        shown.Column("Trial", lambda row: row[0], text=True),
        shown.Column("Candidate" if whole else "Layer", lambda row: _candidate(row[1]), text=whole),
        shown.Column("Keep rate", lambda row: shown.percent(row[1].keep_rate)),
        shown.Column("Tokens", lambda row: shown.count(row[1].count)),
        shown.Column("Score", lambda row: f"{'' if row[1].complete else '≤ '}{shown.percent(row[1].score)}"),
        shown.Column("Examples" if whole else "Verdict", lambda row: _verdict(row[1]), text=not whole),
        shown.Column("Time", lambda row: shown.duration(row[1].seconds)),
    )


def _candidate(trial: Trial) -> str:
    return trial.why if trial.layer is None else str(trial.layer)


def _verdict(trial: Trial) -> str:
    if trial.layer is None:
        return shown.percent(trial.share)
    return ("accepted" if trial.accepted else "rejected") + ("" if trial.complete else ", stopped early")


class Run:
    """Trials of one search, its journal, what its observer is told, and its result.

    Args:
        evaluator: what is searched with.
        settings: what defines the search, JSON values; "method", "seed" and "first_layer" among them.
        expected: evaluations in all: an upper estimate, for progress.
        budget: what every candidate of `run` holds; None under a tolerance.
        study: journal file, or None; or an open study. ``resume`` and ``confidence`` are for `Study`.
        observer: told what happens. None: a notebook draws it, see notebook.py.
    """

    def __init__(
        self,
        evaluator: SearchEvaluator,
        settings: dict[str, Any],
        *,
        expected: float,
        budget: Budget | None = None,
        study: str | os.PathLike[str] | Study | None = None,
        resume: bool = False,
        confidence: float | None = None,
        observer: SearchObserver | None = None,
    ) -> None:
        self.evaluator, self.expected = evaluator, expected
        self.n = int(evaluator.num_vision_tokens)
        self.settings = settings if budget is None else {**settings, "budget": budget.to_dict()}
        if not isinstance(study, Study):
            seed = int(settings["seed"])
            study = Study(evaluator, self.settings, study, resume=resume, confidence=confidence, seed=seed)
        self.study = study
        self.observer = observer or notebook.watcher()
        self.trials: list[Trial] = []
        self._budget = budget
        self._known: dict[tuple[Reduction, float], Trial] = {}
        self.observer.on_start(
            SearchPlan(
                method=settings["method"],
                num_layers=int(evaluator.num_layers),
                first_layer=settings["first_layer"],
                num_vision_tokens=self.n,
                full_score=study.full_score,
                max_drop=settings.get("max_drop"),
                recorded=study.recorded,
                expected=math.ceil(expected),
            )
        )

    @property
    def budget(self) -> Budget:
        """What may be spent, of a search that has one."""
        assert self._budget is not None
        return self._budget

    @property
    def evaluations(self) -> float:
        """Evaluations so far; one on a sample counts as its share."""
        return math.fsum(trial.share for trial in self.trials)

    def keep_all_before(self, layer: int) -> None:
        """Tell the evaluator that the candidates to come differ from this layer on only."""
        if layer:
            self.evaluator.share(Schedule.full(int(self.evaluator.num_layers)), layer)

    def under(self, ranker: Mapping[str, Any], schedule: Schedule) -> Reduction:
        """A schedule with a ranker, as a candidate."""
        return replace(self.evaluator.reduction(schedule), ranker=ranker)

    def run(
        self, candidate: Schedule | Reduction, why: str, *, share: float = 1.0, floor: float | None = None
    ) -> Trial:
        """Evaluate a candidate, or give back what is known of it; it must hold the budget.

        With a ``floor`` the evaluation may end as soon as the score is sure to stay below it.
        """
        reduction = self.evaluator.bind(candidate)
        if not self.budget.holds(reduction.schedule):
            spent = self.budget.spent(reduction.schedule)
            raise BadInput(f"a candidate ({why}) costs {spent} of {self.budget.limit}")
        return self.measure(reduction, why, share=share, floor=floor)

    def ahead(
        self,
        candidates: Sequence[Schedule | Reduction],
        *,
        share: float = 1.0,
        floor: Callable[[int], float | None] | None = None,
    ) -> None:
        """Let workers that have nothing else to do begin with what `run` or `measure` will be asked for next, in this
        order; nothing happens where there are none. ``floor`` is that of each place, see `Study.ahead`."""
        if self.evaluator.workers > 1:
            self.study.ahead(candidates, floor, share)

    def measure(
        self, candidate: Schedule | Reduction, why: str, *, share: float = 1.0, floor: float | None = None
    ) -> Trial:
        """Likewise, for what may cost anything."""
        reduction = self.evaluator.bind(candidate)
        if (reduction, share) not in self._known:
            schedule = reduction.schedule
            record = self.study.evaluate(reduction, floor, share=share)
            self._known[reduction, share] = trial = Trial(
                layer=None,
                keep_rate=schedule.mean_keep_rate,
                count=sum(schedule.counts(self.n)),
                accepted=record.complete,
                schedule=schedule,
                why=why,
                reduction=reduction,
                **vars(record),
            )
            self.add(trial)
        return self._known[reduction, share]

    def add(self, trial: Trial, expected: int | None = None) -> None:
        """Keep a trial and tell the observer; ``expected`` is how many there will be, if the search knows better
        than the pace says."""
        self.trials.append(trial)
        if expected is None:  # how many times what was done there is to do in all
            expected = math.ceil(len(self.trials) * (self.expected / max(self.evaluations, 1e-9)))
        self.observer.on_trial(trial, self.progress(trial.layer, expected))

    def progress(self, layer: int | None, expected: int) -> Progress:
        """How far the search is, of ``expected`` evaluations."""
        done, seconds = len(self.trials), math.fsum(trial.seconds for trial in self.trials)
        return Progress(layer, evaluations=done, expected=max(done, expected), seconds=seconds)

    def finish_with(self, best: Trial) -> SearchResult:
        """The result whose reduction is a trial's, which was run on all examples."""
        return self.finish(self.evaluator.bind(best.reduction or best.schedule), best.score, best.agreement)

    def finish(
        self, reduction: Reduction, score: float, agreement: float | None = None, more: Mapping[str, Any] | None = None
    ) -> SearchResult:
        """The result whose reduction is this one, which was run on all examples; ``more`` is for its record."""
        self.evaluator.share(reduction.schedule, 0)
        costs = [trial.cost for trial in self.trials]
        known = [cost for cost in costs if cost is not None]
        cost = math.fsum(known) if len(known) == len(costs) else None
        full_cost, budget = self.evaluator.full_cost, self._budget
        # what the average prompt costs
        spent = None if budget is None else reduction.average(budget.spent)
        result = SearchResult(
            schedule=reduction.schedule,
            reduction=reduction,
            trials=tuple(self.trials),
            method=self.settings["method"],
            max_drop=self.settings.get("max_drop"),
            full_score=self.study.full_score,
            score=score,
            seed=self.settings["seed"],
            cost=cost,
            seconds=math.fsum(trial.seconds for trial in self.trials),
            budget=None if budget is None else budget.to_dict(),
            spent=spent,
            full_forwards=None if cost is None or not full_cost else cost / full_cost,
            agreement=agreement,
        )
        record = {
            **self.settings,
            "evaluations": round(result.evaluations, 6),
            "num_vision_tokens": self.n,
            "full_score": self.study.full_score,
            "score": score,
            **({} if spent is None else {"spent": spent}),
            "calibration": self.evaluator.fingerprint,
            **(more or {}),
        }
        result = replace(result, reduction=replace(reduction, search=record))
        self.observer.on_end(result)
        return result


def first_layers(
    evaluator: SearchEvaluator, budget: Budget, rankers: Sequence[Mapping[str, Any]], first_layer: int | None = None
) -> list[tuple[Mapping[str, Any], int]]:
    """The rankers that can reach the budget, each with the first layer that is to get fewer tokens.

    No rankers: the evaluator's own. A wanted ``first_layer`` holds for all.

    Raises:
        ThinsightError: none can reach it.
    """
    found: list[tuple[Mapping[str, Any], int]] = []
    reason: Unreachable | None = None
    own = evaluator.reduction(Schedule.full(budget.num_layers)).ranker
    for ranker in rankers or [own]:
        earliest = evaluator.first_layer_of(ranker) if rankers else evaluator.first_layer
        try:
            found.append((ranker, first_layer_for(budget, earliest, first_layer)))
        except Unreachable as error:
            reason = error
    if not found:
        assert reason is not None
        raise reason
    return found


def budget_of(evaluator: Any, budget: Budget | float, unit: str = "keep") -> Budget:
    """A budget that fits an evaluator: the one that is given, or one of so much for its median prompt.

    Args:
        evaluator: whose prompts are counted.
        budget: a budget, or a number, see `thinsight.budget.make_budget`.
        unit: of a number. "flops" and "ms" take a `thinsight.Evaluator`; for "ms" its device is profiled now.

    Raises:
        ThinsightError: no evaluator, an unknown unit, a value out of range, or a budget for another model.
    """
    evaluator = as_evaluator(evaluator)
    if not isinstance(budget, Budget):
        return evaluator.budget(budget, unit)
    if unit not in ("keep", budget.unit):
        raise BadInput(f"budget_unit is {unit!r} but the budget is in {budget.unit}; leave budget_unit out")
    for name, ours, theirs in (
        ("layers", budget.num_layers, int(evaluator.num_layers)),
        ("vision tokens", budget.n_vision, int(evaluator.num_vision_tokens)),
    ):
        if ours != theirs:
            raise BadInput(f"the budget is for {ours} {name} but the evaluator has {theirs}")
    return budget
