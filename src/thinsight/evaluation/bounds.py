"""The order in which batches are scored, and whether those seen so far have lost too much.

Losses are bets (Waudby-Smith & Ramdas, arXiv 2006.04448, for draws without replacement; Shekhar et al., arXiv
2305.06884, for draws of unequal probability). Knows nothing about models, metrics or schedules: it sees
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BadInput

_LEAST_HARDNESS = 0.02  # of an example that the full model is quite sure of, on a scale of losses
_ROUNDING_SLACK = 1e-9  # an early stop must be certain in spite of rounding
_STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # shares of the capital; no one of them suits every loss


def check_confidence(confidence: Any, name: str = "confidence") -> None:
    """Refuse a confidence level that is not a number between 0 and 1."""
    number = isinstance(confidence, Real) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:
        raise BadInput(f"{name} is {confidence!r}; it must be between 0 and 1, such as 0.99")


def random_order(weights: ArrayLike, seed: int | list[int]) -> list[int]:
    """All parts in the order of draws without replacement, each with a chance in proportion to its weight, (parts,)
    and positive; ``seed`` is that of ``numpy.random.default_rng``."""
    heavy = np.asarray(weights, dtype=np.float64)
    # the largest of log weight + Gumbel noise is such a draw, the second largest the next one, and so on
    keys = np.log(heavy) + np.random.default_rng(seed).gumbel(size=len(heavy))
    return [int(part) for part in np.argsort(-keys, kind="stable")]


class LossTest:
    """Tests "the losses of all parts add up to at most ``allowed``" while parts are seen one by one.

    The unit is the part (a batch of examples), so nothing is assumed about the examples in it. Divided by its
    chance of being drawn, a part's loss is an unbiased estimate of what all parts left lose together. Capital
    is bet on these estimates being larger than what is left of ``allowed``. While they are not, it cannot be
    expected to grow (it is a nonnegative supermartingale), so by Ville's inequality it ever reaches
    ``1 / (1 - confidence)`` times its start with a probability of at most ``1 - confidence``. That is uniform
    in time: it holds for a look after every part, without a correction for their number. The capital is the
    mean over several fixed stakes.

    Args:
        weights: shape (parts,), positive, in the order in which `random_order` drew the parts by them.
        allowed: what all parts may lose together.
        confidence: in (0, 1).
    """

    def __init__(self, weights: ArrayLike, allowed: float, confidence: float) -> None:
        drawn = np.asarray(weights, dtype=np.float64)
        self._chances: NDArray[np.float64] = drawn / np.cumsum(drawn[::-1])[::-1]  # among the parts left
        self._seen = 0
        self._left = float(allowed)
        self._logs = np.zeros_like(_STAKES)  # of the capital, per stake
        self._goal = -math.log1p(-confidence)

    def sees(self, loss: float) -> bool:
        """Take the loss of the next part, at least 0; whether the losses seen so far are too many.

        They are for certain above ``allowed``, or with the confidence asked for.
        """
        if self._left > 0:
            estimate = loss / float(self._chances[self._seen])
            self._logs += np.log1p(_STAKES * (estimate / self._left - 1.0))
        self._seen += 1
        self._left -= loss
        capital = float(np.logaddexp.reduce(self._logs)) - math.log(len(_STAKES))
        return self._left < 0 or capital >= self._goal


@dataclass(eq=False)
class Order:
    """The orders in which the batches of a set are scored, and when that can end."""

    batches: Sequence[list[int]]  # the examples of each
    ceilings: NDArray[np.float64]  # (examples,), the highest score that any answer to each can get
    full: NDArray[np.float64]  # (examples,), the full model's scores
    margins: NDArray[np.float64]  # (examples,), how sure it is of its answers, see `GreedyAnswer`
    failures: NDArray[np.float64]  # (examples,), what each lost in earlier evaluations; added to

    def note(self, scores: NDArray[np.float64]) -> None:
        """Take an evaluation's scores, NaN where an example was not run."""
        self.failures += np.where(np.isnan(scores), 0.0, self.ceilings - scores)

    def hardest_first(self) -> list[list[int]]:
        """Batches by the score they lost so far, most first; the full model's losses count as one call."""
        lost = self.failures + self.ceilings - self.full
        return sorted(self.batches, key=lambda batch: -float(np.mean(lost[batch])))

    def drawn(self, floor: float, confidence: float, seed: list[int]) -> tuple[list[list[int]], LossTest]:
        """All batches in a random order, and the test of their losses that keep the mean score at ``floor``.

        The order must not depend on how the reduction does, nor on what was evaluated before (a resumed
        search takes the same one), so only the full model's answers say what is hard.
        """
        hardness = self.ceilings - self.full + np.exp(-self.margins) + _LEAST_HARDNESS
        weights = np.array([hardness[batch].sum() ** 2 for batch in self.batches])  # nearly hardest first
        order = random_order(weights, seed)
        allowed = float((self.ceilings - floor + _ROUNDING_SLACK).sum())
        return [self.batches[number] for number in order], LossTest(weights[order], allowed, confidence)

    def sample(self, share: float) -> list[list[int]]:
        """About that share of the batches, evenly spread over all of them, in their order; the same ones every
        time, and all of a smaller share."""
        bits = max(1, (len(self.batches) - 1).bit_length())
        mirrored = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
        spread = [number for number in mirrored if number < len(self.batches)]
        count = max(1, round(share * len(self.batches)))
        return [self.batches[number] for number in sorted(spread[:count])]

    def upper_bound(self, scores: NDArray[np.float64]) -> float:
        """The highest mean that scores can come to, NaN where one is not known yet."""
        return float(np.mean(np.where(np.isnan(scores), self.ceilings, scores)))

    def is_lost(self, scores: NDArray[np.float64], batch: list[int], floor: float, test: LossTest | None) -> bool:
        """Whether the mean is below ``floor``, for certain or as ``test`` sees it after the latest batch."""
        if self.upper_bound(scores) < floor - _ROUNDING_SLACK:
            return True
        return test is not None and test.sees(float((self.ceilings - scores)[batch].sum()))
