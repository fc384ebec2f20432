"""Evaluation: what one run of a schedule over a set of examples gave.

Knows nothing about models, metrics or how the score came about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput


@dataclass(frozen=True)
class Evaluation:
    """The score of one schedule on one set of examples.

    Attributes:
        score: mean metric over the examples, in the metric's own unit (higher is better).
            When ``complete`` is False it is only an upper bound of that mean.
        per_example: float64, shape (examples,), read-only; NaN where an example was not run. None if unknown.
        complete: False when the run was stopped early because the score could not reach the floor asked for.
        full_score: the full model's score on the same examples, if known.
        cost: decoder FLOPs spent to obtain this evaluation, if known.
        agreement: mean over the examples run of the probability that is given to the full model's answer, in
            [0, 1]: a smooth signal where scores are equal. None if unknown.
        share: of the examples, how many the score is about; below 1 for a sample.

    Raises:
        ThinsightError: a score that is not a finite number, or ``per_example`` that is not one-dimensional.
    """

    score: float
    per_example: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    complete: bool = True
    full_score: float | None = None
    cost: float | None = None
    agreement: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", _finite(self.score, "score"))
        if self.full_score is not None:
            object.__setattr__(self, "full_score", _finite(self.full_score, "full_score"))
        if self.per_example is not None:
            object.__setattr__(self, "per_example", _read_only_vector(self.per_example))

    @property
    def drop(self) -> float:
        """Full model's score minus this score, in the metric's own unit.

        Raises:
            ThinsightError: the full model's score is not known.
        """
        if self.full_score is None:
            raise BadInput("full_score is None; a drop needs the full model's score on the same examples")
        return self.full_score - self.score


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadInput(f"{name} is {value!r}; an evaluation needs a finite number") from None
    except OverflowError:
        raise BadInput(f"{name} is too large a number; an evaluation needs a finite one") from None
    if not math.isfinite(number):
        raise BadInput(f"{name} is {number}; an evaluation needs a finite number")
    return number


def _read_only_vector(values: object) -> NDArray[np.float64]:
    vector = np.array(values, dtype=np.float64)  # a copy, so that later writes elsewhere do not reach it
    if vector.ndim != 1:
        raise BadInput(f"per_example has shape {vector.shape}; it must be one score per example")
    vector.flags.writeable = False
    return vector
