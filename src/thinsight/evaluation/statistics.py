"""How sure a measured drop is, and whether a score is more than chance.

Knows nothing about models or metrics: it sees columns of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BadInput

NEAR_CHANCE = 0.03  # a score that is no further above guessing says nothing
_HALVINGS = 60  # of [-1, 1], to the last bit
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
    It is too short where few answers change, and has no width where none does, however few examples there
    are: to say how large a drop may be, use `drop_interval`.

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


def drop_interval(
    full: ArrayLike,
    reduced: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of the mean drop ``full - reduced`` that reports print, never narrower than so few
    examples allow.

    For scores of 0 and 1 it is Tango's score interval (`tango_interval`) of the examples lost and won, which
    keeps a width where none is lost. Scores between count as the share of an example that they lose or win,
    which is what rounding both scores at one random threshold comes to on average; there the paired
    bootstrap widens the interval where it is wider. Where examples come in groups, all counts are divided by
    the measured design effect if that is above 1 (Rao & Scott, Biometrics 48:577, 1992); with a single group
    nothing can be measured, and it counts as one example. The ends are at least ln(2 / (1 - level)) / n from
    the mean, 3.7 / n at 95 %: the rule of three, two-sided.

    Arguments and errors as of `paired_bootstrap`, and:

    Raises:
        ThinsightError: scores outside of [0, 1].
    """
    drops = _drops(full, reduced)
    _check_settings(resamples, level)
    sides = np.concatenate([np.asarray(full, dtype=np.float64), np.asarray(reduced, dtype=np.float64)])
    if sides.min() < 0.0 or sides.max() > 1.0:
        raise BadInput("full or reduced holds a score outside of [0, 1]; a metric's scores lie within")
    mean = float(drops.mean())
    effect = design_effect(drops, groups)
    count = len(drops) / effect
    losses, wins = (float(np.clip(side, 0.0, None).sum()) / effect for side in (drops, -drops))
    found = [tango_interval(losses, wins, count, level=level)]
    if not np.isin(sides, (0.0, 1.0)).all():
        found.append(paired_bootstrap(full, reduced, groups=groups, resamples=resamples, level=level, seed=seed))
    least = math.ceil(10 * math.log(2 / (1 - level))) / (10 * count)
    return Interval(
        mean=mean,
        low=max(-1.0, min(mean - least, *(each.low for each in found))),
        high=min(1.0, max(mean + least, *(each.high for each in found))),
    )


def tango_interval(losses: float, wins: float, count: float, *, level: float = 0.95) -> Interval:
    """Tango's score interval of a difference of paired shares, ``(losses - wins) / count`` (Tango, Statistics
    in Medicine 17:891, 1998): all differences that the score test does not reject.

    Args:
        losses: of ``count`` pairs, how many only the first one gets right; need not be whole.
        wins: how many only the second one gets right.
        count: number of pairs, above 0.
        level: confidence level in (0, 1).

    Raises:
        ThinsightError: numbers that cannot be, such as more losses and wins than pairs.
    """
    _check_settings(1, level)
    if not (0 < count < math.inf and losses >= 0 and wins >= 0 and losses + wins <= count * (1 + 1e-9)):
        raise BadInput(f"{losses} losses and {wins} wins of {count} pairs: they must be parts of the pairs")
    z = NormalDist().inv_cdf((1 + level) / 2)

    def rejected(difference: float) -> float:
        """How far beyond the test's limit a difference is, on either side: the square of the statistic
        less z squared, times its denominator, which may be 0."""
        linear = -losses - wins + (2 * count - losses + wins) * difference
        free = wins * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear * linear + 8 * count * free))
        won = max(0.0, root - linear) / (4 * count)  # likeliest share of wins at that difference
        spread = max(0.0, 2 * won + difference * (1 - difference))
        return (losses - wins - count * difference) ** 2 - z * z * count * spread

    mean = (losses - wins) / count
    return Interval(mean, _edge(rejected, mean, -1.0), _edge(rejected, mean, 1.0))


def _edge(rejected: Callable[[float], float], inside: float, outside: float) -> float:
    """Where a difference begins to be rejected on the way from one that is not to the last one there is."""
    if rejected(outside) <= 0:
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) > 0 else (middle, outside)
    return outside


def design_effect(drops: NDArray[np.float64], groups: Sequence[Hashable] | None) -> float:
    """How many times wider than of as many single examples the variance of the mean is, at least 1."""
    sums, sizes = _group_totals(drops, groups)
    many, members = len(sums), len(drops)
    if many == 1:
        return float(members)
    alone = float(((drops - drops.mean()) ** 2).sum()) / (members * (members - 1))
    if alone == 0.0:  # no two drops differ: nothing to measure it by
        return 1.0
    together = many / (many - 1) * float(((sums - drops.mean() * sizes) ** 2).sum()) / members**2
    return max(1.0, together / alone)


def score_to_expect(chances: ArrayLike) -> float:
    """The score below which a model cannot be told from one that guesses.

    Two standard errors above what guessing gets on average, and at least 3 points above it.

    Args:
        chances: shape (examples,), what guessing scores on each.
    """
    shares = np.asarray(chances, dtype=np.float64)
    error = math.sqrt(float((shares * (1.0 - shares)).sum())) / len(shares)
    return float(shares.mean()) + max(NEAR_CHANCE, 2.0 * error)


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
