"""Whether a finite set has lost too much, judged from the parts of it seen so far, in a random order.

Losses are bets (Waudby-Smith & Ramdas, arXiv 2006.04448, for draws without replacement; Shekhar et al., arXiv
2305.06884, for draws of unequal probability). Knows nothing about models, metrics or schedules: it sees
numbers.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BadInput

_STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # shares of the capital; no one of them suits every loss


def check_confidence(confidence: Any) -> None:
    """Check a confidence level.

    Raises:
        ThinsightError: it is not a number between 0 and 1.
    """
    number = isinstance(confidence, Real) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:
        raise BadInput(f"confidence is {confidence!r}; it must be between 0 and 1, such as 0.99")


def random_order(weights: ArrayLike, seed: int | list[int]) -> list[int]:
    """All parts in the order of draws without replacement, each with a chance in proportion to its weight.

    Args:
        weights: shape (parts,), positive.
        seed: of ``numpy.random.default_rng``; the same seed gives the same order.
    """
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
