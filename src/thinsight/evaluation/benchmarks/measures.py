"""What benchmarks report of the scores of all questions together: means, questions that belong together all right, F1,
sums over categories; and how sure their drop is.

A measure is a function of sums, so that a resample is drawn and added up at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..example import Example
from ..result import Interval, drop_interval

Vector = NDArray[np.float64]
_LEVEL = 0.95
_RESAMPLES = 10_000
_AT_ONCE = 4_000_000  # numbers held in memory at a time


@dataclass(frozen=True)
class Counted:
    """What each unit of a set adds up.

    Attributes:
        parts: (units, parts) what a unit adds to each sum.
        clusters: what is drawn together, by unit.
    """

    parts: Vector
    clusters: list[Hashable]


@dataclass(frozen=True)
class Measure:
    """One number for a set of questions, in fractions: what is printed is 100 times it.

    Attributes:
        name: such as "F1".
        count: ``count(examples, scores)``, what each unit adds; nothing where the set has none of what it is about.
        value: ``value(sums)``, (..., parts) -> (...); NaN where it is not defined.
        mean: whether it is the mean of its first part, and all of them are from 0 to 1.
    """

    name: str
    count: Callable[[Sequence[Example], Vector], Counted]
    value: Callable[[Vector], Vector]
    mean: bool = False

    def of(self, examples: Sequence[Example], scores: Vector) -> float:
        """Its value; NaN where there is nothing to measure."""
        parts = self.count(examples, scores).parts
        return float(self.value(parts.sum(axis=0))) if len(parts) else math.nan

    def drop(self, examples: Sequence[Example], full: Vector, reduced: Vector, seed: int = 0) -> Interval:
        """Full minus reduced with its 95 % interval: `drop_interval` of a mean, else the percentile bootstrap of pairs,
        whole clusters drawn, and no narrower than what one unit, turned around, changes times 3.7 (the rule of three,
        two-sided)."""
        before, after = self.count(examples, full), self.count(examples, reduced)
        if self.mean:
            return drop_interval(before.parts[:, 0], after.parts[:, 0], groups=before.clusters, seed=seed)
        mean = float(self.value(before.parts.sum(axis=0)) - self.value(after.parts.sum(axis=0)))
        low, high = self._bootstrap(before, after, seed)
        turned = self.count(examples, 1 - full)
        sums = before.parts.sum(axis=0)
        one = float(np.nanmax(np.abs(self.value(sums - before.parts + turned.parts) - self.value(sums))))
        least = math.log(2 / (1 - _LEVEL)) * one
        return Interval(mean, min(low, mean - least), max(high, mean + least))

    def _bootstrap(self, before: Counted, after: Counted, seed: int) -> tuple[float, float]:
        number: dict[Hashable, int] = {}
        member = np.array([number.setdefault(each, len(number)) for each in before.clusters])
        totals = np.zeros((2, len(number), before.parts.shape[1]))
        for total, counted in zip(totals, (before, after), strict=True):
            np.add.at(total, member, counted.parts)
        rng = np.random.default_rng(seed)
        rows = max(1, _AT_ONCE // max(totals[0].size, len(number)))
        drops = []
        for start in range(0, _RESAMPLES, rows):
            count = min(rows, _RESAMPLES - start)
            chosen = rng.integers(len(number), size=(count, len(number))) + len(number) * np.arange(count)[:, None]
            # how often each cluster is drawn, (rows, clusters)
            drawn = np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(np.float64)
            drops.append(self.value(drawn @ totals[0]) - self.value(drawn @ totals[1]))
        tail = (1 - _LEVEL) / 2
        low, high = np.nanquantile(np.concatenate(drops), [tail, 1 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class Measured:
    """A measure of a benchmark on a test set, full and reduced, over so many units."""

    benchmark: str
    name: str
    units: int
    full: float
    reduced: float
    drop: Interval


# -- kinds of measures ---------------------------------------------------------------------------------------


def everything(example: Example) -> bool:
    """All examples."""
    return True


def picked(examples: Sequence[Example], scores: Vector, only: Callable[[Example], bool]) -> list[tuple[Example, float]]:
    """The examples that are meant, with their scores."""
    return [pair for pair in zip(examples, scores.tolist(), strict=True) if only(pair[0])]


def share(sums: Vector) -> Vector:
    """The first sum over the second one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Vector = sums[..., 0] / sums[..., 1]
    return found


def mean(name: str, only: Callable[[Example], bool] = everything) -> Measure:
    """The mean score of those questions."""

    def count(examples: Sequence[Example], scores: Vector) -> Counted:
        rows = picked(examples, scores, only)
        parts = np.array([[score, 1.0] for _, score in rows]).reshape(-1, 2)
        return Counted(parts, [example.group for example, _ in rows])

    return Measure(name, count, share, mean=True)


def units_of(
    rows: Sequence[tuple[Example, float]], unit: Callable[[Example], Hashable]
) -> dict[Hashable, list[tuple[Example, float]]]:
    """The questions of each unit."""
    found: dict[Hashable, list[tuple[Example, float]]] = {}
    for example, score in rows:
        found.setdefault(unit(example), []).append((example, score))
    return found


def all_right(
    name: str,
    unit: Callable[[Example], Hashable],
    cluster: Callable[[Example], Hashable] | None = None,
    only: Callable[[Example], bool] = everything,
) -> Measure:
    """The share of units of which every question is right."""

    def count(examples: Sequence[Example], scores: Vector) -> Counted:
        units = units_of(picked(examples, scores, only), unit).values()
        parts = np.array([[float(all(score == 1.0 for _, score in each)), 1.0] for each in units]).reshape(-1, 2)
        return Counted(parts, [(cluster or (lambda one: one.group))(each[0][0]) for each in units])

    return Measure(name, count, share, mean=True)


def over_categories(
    name: str,
    category: Callable[[Example], str],
    total: bool,
    unit: Callable[[Example], Hashable] | None = None,
    only: Callable[[Example], bool] = everything,
) -> Measure:
    """The mean score of each category, averaged over them or (``total``) added up; with ``unit`` of a category's units,
    each its mean score plus 1 if all of it is right, as MME has it."""

    def count(examples: Sequence[Example], scores: Vector) -> Counted:
        rows = picked(examples, scores, only)
        if not rows:
            return Counted(np.zeros((0, 2)), [])
        names = sorted({category(example) for example, _ in rows})
        units: Sequence[list[tuple[Example, float]]] = [[row] for row in rows]
        if unit is not None:
            units = list(units_of(rows, unit).values())
        parts = np.zeros((len(units), 2, len(names)))
        for place, each in enumerate(units):
            found = [score for _, score in each]
            value = math.fsum(found) / len(found)
            if unit is not None:
                value += float(all(score == 1.0 for score in found))
            parts[place, :, names.index(category(each[0][0]))] = value, 1.0
        return Counted(parts.reshape(len(units), -1), [each[0][0].group for each in units])

    def value(sums: Vector) -> Vector:
        halves = sums.reshape(*sums.shape[:-1], 2, sums.shape[-1] // 2)  # (..., sums and numbers, categories)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = halves[..., 0, :] / halves[..., 1, :]  # NaN where a resample has none of a category
        found: Vector = np.nansum(rates, axis=-1) if total else np.nanmean(rates, axis=-1)
        return found

    return Measure(name, count, value)


def yes_measures() -> tuple[Measure, ...]:
    """F1, precision and recall of the answer yes, and its share, where every answer counts as yes or as no."""

    def count(examples: Sequence[Example], scores: Vector) -> Counted:
        parts = []
        for example, score in zip(examples, scores.tolist(), strict=True):
            label = example.answers[0].strip().rstrip(".").lower() == "yes"
            said = label == (score == 1.0)
            parts.append([float(label and said), float(said and not label), float(label and not said), 1.0])
        return Counted(np.array(parts).reshape(-1, 4), [example.group for example in examples])

    def ratio(above: Callable[[Any], Any], below: Callable[[Any], Any]) -> Callable[[Vector], Vector]:
        def value(sums: Vector) -> Vector:
            right, wrong, missed, number = np.moveaxis(sums, -1, 0)
            told = right, wrong, missed, number
            return share(np.stack([above(told), np.maximum(below(told), 1e-12)], axis=-1))

        return value

    return (
        Measure("F1", count, ratio(lambda n: 2 * n[0], lambda n: 2 * n[0] + n[1] + n[2])),
        Measure("precision", count, ratio(lambda n: n[0], lambda n: n[0] + n[1])),
        Measure("recall", count, ratio(lambda n: n[0], lambda n: n[0] + n[2])),
        Measure("share of yes", count, ratio(lambda n: n[0] + n[1], lambda n: n[3])),
    )
