"""What a search found, and every evaluation on the way there.

Knows nothing about how schedules are proposed or scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reduction import Reduction
from ..schedule import Schedule

__all__ = ["SearchResult", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        layer: the layer that was being searched.
        keep_rate: the rate tried from that layer on, a fraction of the original tokens.
        count: the same as a number of the reference N tokens.
        score: calibration score; only an upper bound when ``complete`` is False.
        complete: False when the evaluation was stopped early because it could not pass.
        accepted: whether the score stays within the tolerance.
        schedule: the whole candidate.
        cost: decoder FLOPs that the evaluation took, if the evaluator tells.
        seconds: wall time of the evaluation.
    """

    layer: int
    keep_rate: float
    count: int
    score: float
    complete: bool
    accepted: bool
    schedule: Schedule
    cost: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search. ``score`` and ``full_score`` are on the calibration set.

    ``evaluations`` counts the schedules that were run (the full model's own run is not among them);
    ``cost`` is their decoder FLOPs in all, None when the evaluator does not tell; ``seconds`` is their wall
    time, that of interrupted runs included.
    """

    schedule: Schedule
    reduction: Reduction
    trials: list[Trial]
    method: str
    max_drop: float
    full_score: float
    score: float
    seed: int
    cost: float | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def evaluations(self) -> int:
        """Number of schedules evaluated."""
        return len(self.trials)

    @property
    def drop(self) -> float:
        """Full model's calibration score minus that of the schedule found."""
        return self.full_score - self.score
