"""What a search found, and every evaluation on the way there.

Knows nothing about how schedules are proposed or scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import tables, words
from ..adaptive import Adaptive
from ..reduction import Reduction, read_only
from ..schedule import Schedule
from ..texts import brief


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        layer: the layer that was being searched; None where a whole schedule was.
        keep_rate: the rate tried from that layer on, a fraction of the original tokens; a whole schedule's
            mean.
        count: the same as a number of the reference N tokens.
        score: calibration score; only an upper bound when ``complete`` is False.
        complete: False when the evaluation was stopped early because it could not pass.
        accepted: whether the score stays within the tolerance.
        schedule: the whole candidate.
        cost: decoder FLOPs that the evaluation took, if the evaluator tells.
        seconds: wall time of the evaluation.
        agreement: see `thinsight.Evaluation`.
        share: of the examples, how many were run.
        ranker: in place of the evaluator's own.
        why: how the candidate came about.
        adaptive: schedules of which each prompt gets its own; ``schedule`` is their mean.
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
    ranker: Mapping[str, Any] | None = None
    why: str = ""
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranker", read_only(self.ranker))

    def __repr__(self) -> str:
        what = self.why if self.layer is None else f"layer {self.layer}, {self.count} tokens"
        score = f"{'' if self.complete else '<= '}{self.score:.4g}"
        return brief(f"Trial({what}: score {score}, mean keep rate {self.schedule.mean_keep_rate:.4g})")


@dataclass(frozen=True)
class SearchResult(tables.Shown):
    """The outcome of a search. ``score`` and ``full_score`` are on the calibration set.

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

    def _tables(self) -> Iterable[tables.Table]:
        known = {
            "schedule": repr(self.schedule),
            "calibration score": f"{words.plain(self.score, 4)}, the full model's {words.plain(self.full_score, 4)}",
            "allowed drop": "" if self.max_drop is None else f"{self.max_drop:g}",
            "budget": "" if self.budget is None else f"{self.budget['limit']:.4g} {self.budget['unit']}",
            "evaluations": f"{self.evaluations:g}",
            "time": words.duration(self.seconds),
        }
        return [tables.facts_table(f"Search: {self.method}", known.items()), tables.trials_table(self.trials)]

    @property
    def evaluations(self) -> float:
        """Number of schedules evaluated; one on a sample counts as its share."""
        shares = math.fsum(trial.share for trial in self.trials)
        return int(shares) if shares == int(shares) else shares

    @property
    def drop(self) -> float:
        """Full model's calibration score minus that of the schedule found."""
        return self.full_score - self.score
