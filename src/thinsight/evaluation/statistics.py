"""How sure a measured drop is: the paired bootstrap.

Knows nothing about models or metrics: it sees two columns of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BadInput

__all__ = ["Interval", "paired_bootstrap"]

_CELLS_AT_ONCE = 4_000_000  # drawn indices held in memory at a time (32 MB)


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, in the metric's own unit."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    full: ArrayLike,
    reduced: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean drop ``full - reduced`` (Efron & Tibshirani 1993, ch. 13).

    The two columns stay paired: an example is drawn with both of its scores. With ``groups`` whole groups are
    drawn (questions on one image are not independent), and a resample's mean is over the examples it holds.

    Args:
        full: shape (examples,), the full model's score of each example.
        reduced: shape (examples,), the reduced model's score of the same examples in the same order.
        groups: one label per example, for example the image; None draws single examples.
        resamples: number of bootstrap resamples.
        level: confidence level in (0, 1).
        seed: of the random numbers; the same seed gives the same interval.

    Returns:
        Interval: the mean drop and the interval's two ends.

    Raises:
        ThinsightError: columns of different or zero length, values that are not finite, bad settings.
    """
    drops = _drops(full, reduced)
    _check_settings(resamples, level)
    sums, sizes = _group_totals(drops, groups)
    means = _resampled_means(sums, sizes, resamples, seed)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean=float(drops.mean()), low=float(low), high=float(high))


def _drops(full: ArrayLike, reduced: ArrayLike) -> NDArray[np.float64]:
    left, right = np.asarray(full, dtype=np.float64), np.asarray(reduced, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or left.size == 0:
        raise BadInput(
            f"full has shape {left.shape} and reduced {right.shape}; "
            "both need one score per example, for the same examples"
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise BadInput("full or reduced holds a value that is not finite; run every example first")
    return left - right


def _check_settings(resamples: int, level: float) -> None:
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise BadInput(f"resamples is {resamples!r}; it must be a whole number of at least 1")
    if not (isinstance(level, float) and math.isfinite(level) and 0.0 < level < 1.0):
        raise BadInput(f"level is {level!r}; it must be a number between 0 and 1, such as 0.95")


def _group_totals(
    drops: NDArray[np.float64], groups: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of drops and number of examples of each group, both of shape (groups,)."""
    if groups is None:
        return drops, np.ones_like(drops)
    if len(groups) != len(drops):
        raise BadInput(f"groups has {len(groups)} labels for {len(drops)} examples; pass one for each")
    number_of: dict[Hashable, int] = {}
    member = np.array([number_of.setdefault(label, len(number_of)) for label in groups])
    sums = np.bincount(member, weights=drops).astype(np.float64)
    return sums, np.bincount(member).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Mean drop of each resample, shape (resamples,)."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // len(sums))
    parts = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, resamples - start), len(sums)))  # (rows, groups)
        parts.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(parts)
