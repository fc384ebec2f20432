"""Schedules: how many of a prompt's vision tokens enter each decoder layer, for all prompts or by prompt."""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from . import shown
from .errors import BadInput, whole
from .texts import brief

if TYPE_CHECKING:
    from markupsafe import Markup

_ADAPTIVE_KEYS = ("statistic", "layer", "edges", "keep_rates", "shares")
_SHARES_SLACK = 1e-6  # shares are written with all their digits, yet are sums of fractions
_ROUNDING_SLACK = 1e-9  # so that 0.3 * 10 = 3.0000000000000004 counts as 3 tokens, not as 4
_STEEPEST = 1000.0  # a single step for any depth; beyond it floats no longer resolve alpha
_HALVINGS, _FAR = 60, 700.0  # exp of more is infinite
_SHOWN = 8  # runs of layers in a repr
_WANTED = "pass a list of numbers in [0, 1], one per decoder layer"


@dataclass(frozen=True, slots=True)
class Schedule(shown.Shown):
    """The keep rates of all L decoder layers (the paper's "reduction strategy", arXiv 2412.00556 section 3).

    ``keep_rates[i]`` is the fraction of the prompt's original N vision tokens that enter layer i, layers
    numbered from 0. Rates lie in [0, 1] and never rise with depth, since a dropped token stays dropped.
    A schedule is immutable and hashable; two schedules are equal when their rates are.

    Raises:
        ThinsightError: no rates, or a rate that is not a finite number in [0, 1], or one that rises.
    """

    keep_rates: tuple[float, ...]

    def __init__(self, keep_rates: Sequence[float]) -> None:
        object.__setattr__(self, "keep_rates", keep_rates)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Apart, for a record that is read back is made without ``__init__``."""
        keep_rates: Any = self.keep_rates
        try:
            given = None if isinstance(keep_rates, (str, bytes)) else list(keep_rates)
        except TypeError:
            given = None
        if not given:
            raise BadInput(f"keep_rates is {'empty' if given == [] else repr(keep_rates)}; {_WANTED}")
        rates = [_rate(rate, f"keep_rates[{i}]") for i, rate in enumerate(given)]
        for i in range(1, len(rates)):
            if rates[i] > rates[i - 1]:
                raise BadInput(
                    f"keep_rates[{i}] is {rates[i]} but keep_rates[{i - 1}] is {rates[i - 1]}; "
                    "rates must not rise with depth, since a dropped token stays dropped"
                )
        object.__setattr__(self, "keep_rates", tuple(rates))

    def __repr__(self) -> str:
        runs = [
            f"{float(f'{rate:.4g}')}" + (f" x{last - first + 1}" if last > first else "")
            for first, last, rate in self.runs()
        ]
        if len(runs) <= _SHOWN:
            return f"Schedule([{', '.join(runs)}])"
        some = ", ".join([*runs[: _SHOWN // 2], "...", *runs[-2:]])
        return f"Schedule([{some}], {self.num_layers} layers, mean {self.mean_keep_rate:.4g})"

    def _tables(self) -> Iterable[shown.Table]:
        return [schedule_table(self)]

    def _drawings(self) -> Iterable[Markup]:
        return [drawn(self)]

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.keep_rates)

    @property
    def mean_keep_rate(self) -> float:
        """Mean of the keep rates over all L layers (the paper's "memory cost")."""
        return math.fsum(self.keep_rates) / len(self.keep_rates)

    @property
    def is_full(self) -> bool:
        """True when every layer keeps every vision token."""
        return self.keep_rates[-1] == 1.0

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of ``n`` vision tokens enter each layer: ``ceil(r_i * n - 1e-9)``, the one rule."""
        size = whole(n, "n (the number of vision tokens)", 0)
        return tuple(max(0, math.ceil(rate * size - _ROUNDING_SLACK)) for rate in self.keep_rates)

    def reductions(self, n: int) -> dict[int, int]:
        """The layers that receive fewer tokens than the layer above, and how many: ``{layer: count}``.

        Layer 0 is among them when it receives fewer than ``n``.
        """
        counts = self.counts(n)
        return {i: count for i, (above, count) in enumerate(zip((n, *counts), counts, strict=False)) if count < above}

    def runs(self) -> list[tuple[int, int, float]]:
        """Maximal runs of layers with one rate: ``(first layer, last layer, rate)``."""
        ends = itertools.accumulate(len(list(run)) for _, run in itertools.groupby(self.keep_rates))
        return [(first, end - 1, self.keep_rates[first]) for first, end in itertools.pairwise((0, *ends))]

    def with_tail(self, layer: int, rate: float) -> Schedule:
        """This schedule with the rates from ``layer`` on lowered to at most ``rate``."""
        first = whole(layer, "layer", 0, self.num_layers - 1)
        limit = _rate(rate, "rate")
        head, tail = self.keep_rates[:first], self.keep_rates[first:]
        return Schedule((*head, *(min(old, limit) for old in tail)))

    def resample(self, num_layers: int) -> Schedule:
        """The same schedule for a decoder of another depth, with the same mean keep rate.

        Each new layer gets the average of the old rates over its share of the depth.
        """
        new = whole(num_layers, "num_layers", 1)
        old = self.num_layers
        rates = []
        for layer in range(new):
            start, stop = layer * old, (layer + 1) * old  # in units of 1 / (new * old) of the depth
            spans = range(start // new, (stop - 1) // new + 1)
            weighted = [(min(stop, (i + 1) * new) - max(start, i * new)) * self.keep_rates[i] for i in spans]
            # clamped, so that rounding can neither leave the averaged rates nor make a rate rise
            highest, lowest = self.keep_rates[spans[0]], self.keep_rates[spans[-1]]
            rates.append(min(highest, max(lowest, math.fsum(weighted) / old)))
        return Schedule(rates)

    @classmethod
    def full(cls, num_layers: int) -> Schedule:
        """Every layer keeps every vision token."""
        return cls([1.0] * whole(num_layers, "num_layers", 1))

    @classmethod
    def step(cls, num_layers: int, layer: int, rate: float) -> Schedule:
        """All tokens above ``layer``, the fraction ``rate`` from it on (FastV's shape; VTW's with rate 0)."""
        return cls.stages(num_layers, {layer: rate})

    @classmethod
    def stages(cls, num_layers: int, rates: Mapping[int, float]) -> Schedule:
        """A staircase: from each given layer on, the rate given for it; all tokens before the first."""
        depth = whole(num_layers, "num_layers", 1)
        by_layer = {whole(layer, "layer", 0, depth - 1): rate for layer, rate in rates.items()}
        keep_rates: list[float] = []
        current = 1.0
        for layer in range(depth):
            current = by_layer.get(layer, current)
            keep_rates.append(current)
        return cls(keep_rates)

    @classmethod
    def sigmoid(cls, num_layers: int, k: float, budget: float) -> Schedule:
        """The paper's P-Sigmoid shape (arXiv 2412.00556 section 3): ``1 / (1 + exp(k (i - alpha)))``.

        ``alpha`` is solved by bisection so that the mean keep rate equals ``budget``, never above it.

        Args:
            num_layers: L.
            k: steepness per layer, above 0 and up to 1000. Small is a gentle slope, large a single step.
            budget: mean keep rate over all layers, in [0, 1].
        """
        depth = whole(num_layers, "num_layers", 1)
        target = _rate(budget, "budget")
        if not isinstance(k, Real) or isinstance(k, bool) or not 0 < k <= _STEEPEST:
            raise BadInput(f"k is {k!r}; the sigmoid's steepness must be above 0 and at most {_STEEPEST:g}")
        if target in (0.0, 1.0):
            return cls([target] * depth)

        def fits(shift: float) -> bool:
            return math.fsum(sigmoid_rates(depth, k, shift)) / depth <= target

        # the first layer's rate is at least the mean, the last one's at most: both ends bracket the budget
        logit = math.log(target) - math.log1p(-target)
        return cls(sigmoid_rates(depth, k, solve(fits, logit - 1.0, logit + k * depth + 1.0)[0]))


def schedule_table(schedule: Schedule, total: int | None = None) -> shown.Table:
    """The keep rate of each layer, and its tokens where a prompt's number of them is known."""
    rows = [(layer, shown.percent(rate)) for layer, rate in enumerate(schedule.keep_rates)]
    layer, rate = (shown.Column(name, itemgetter(at), name.lower()) for at, name in enumerate(("Layer", "Keep rate")))
    columns = [layer._replace(text=True), rate]
    if total is not None:
        counts = schedule.counts(total)
        columns.append(shown.Column(f"Tokens of {total}", lambda row: shown.count(counts[row[0]])))
    return shown.Table("Keep rate by layer", rows, *columns)


def drawn(schedule: Schedule, others: Sequence[tuple[str, Schedule]] = ()) -> Markup:
    """The plot of a schedule for a notebook; behind it others of as many layers, by name."""
    from .drawing import schedule_plot

    behind = [(name, other.keep_rates, 2 + place % 6) for place, (name, other) in enumerate(others)]
    # two outputs of a notebook have one name only where they show the same
    ident = f"schedule-{zlib.crc32(repr((schedule.keep_rates, behind)).encode()):08x}"
    return schedule_plot(schedule.keep_rates, behind, width=500, ident=ident)


def sigmoid_rates(depth: int, k: float, shift: float, top: float = 1.0, low: float = 0.0) -> list[float]:
    """P-Sigmoid's falling rates, ``low + (top - low) / (1 + exp(k i - shift))``; shift = k alpha, so that its
    range does not depend on k."""
    return list(itertools.accumulate((low + (top - low) * logistic(shift - k * i) for i in range(depth)), min))


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-min(x, _FAR)))
    power = math.exp(max(x, -_FAR))
    return power / (1.0 + power)


def solve(
    holds: Callable[[float], bool],
    low: float,
    high: float,
    middle: Callable[[float, float], float] = lambda low, high: (low + high) / 2,
) -> tuple[float, float]:
    """Two neighbours between ``low``, where ``holds`` is true, and ``high``, where it is not: bisected to the
    resolution of floats, as far as 60 halvings lead there."""
    for _ in range(_HALVINGS):
        between = middle(low, high)
        if between in (low, high):
            break
        low, high = (between, high) if holds(between) else (low, between)
    return low, high


@dataclass(frozen=True)
class Adaptive(shown.Shown):
    """A family of schedules, and the rule that picks one for each prompt by its text's attention.

    Attributes:
        statistic: the name of a statistic, see `thinsight.ranking.STATISTICS`.
        layer: the first layer in which prompts may differ, at least 1; the statistic reads the attention of
            the layer before.
        edges: where one schedule ends and the next begins, rising; a value at an edge belongs above it.
        schedules: one more than there are edges, for rising values; all alike before ``layer``.
        shares: what part of the calibration prompts got each schedule; they sum to 1.

    Raises:
        ThinsightError: parts that do not fit each other.
    """

    statistic: str
    layer: int
    edges: tuple[float, ...]
    schedules: tuple[Schedule, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("edges", "schedules", "shares"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.statistic, str) or not self.statistic:
            raise BadInput(f"adaptive.statistic is {self.statistic!r}; it must be a name")
        depths = {schedule.num_layers for schedule in self.schedules}
        if len(depths) != 1:
            raise BadInput(f"adaptive.schedules have {sorted(depths)} layers; give schedules of one depth")
        whole(self.layer, "adaptive.layer", 1, self.num_layers - 1)
        if not len(self.schedules) == len(self.shares) == len(self.edges) + 1:
            raise BadInput(
                f"adaptive has {len(self.schedules)} schedules, {len(self.edges)} edges and "
                f"{len(self.shares)} shares; there must be one schedule and one share more than edges"
            )
        finite = all(math.isfinite(real(edge)) for edge in self.edges)
        if not finite or any(b <= a for a, b in itertools.pairwise(self.edges)):
            raise BadInput(f"adaptive.edges is {self.edges!r}; they must be finite numbers that rise")
        parts = all(0 <= real(share) <= 1 for share in self.shares)
        if not parts or not math.isclose(math.fsum(self.shares), 1, abs_tol=_SHARES_SLACK):
            raise BadInput(f"adaptive.shares is {self.shares!r}; they must be from 0 to 1 and sum to 1")
        if len({schedule.keep_rates[: self.layer] for schedule in self.schedules}) != 1:
            raise BadInput(f"adaptive.schedules differ before layer {self.layer}, where the statistic is not known")

    def __repr__(self) -> str:
        means = ", ".join(f"{schedule.mean_keep_rate:.4g}" for schedule in self.schedules)
        return brief(
            f"Adaptive({self.statistic!r} at layer {self.layer} of {self.num_layers}, "
            f"{len(self.schedules)} schedules, means {means})"
        )

    def _tables(self) -> Iterable[shown.Table]:
        lows, highs = (shown.NOTHING, *map(_edge, self.edges)), (*map(_edge, self.edges), shown.NOTHING)
        yield shown.Table(
            f"Schedules by {self.statistic} at layer {self.layer}",
            zip(lows, highs, self.schedules, self.shares, strict=True),
            shown.Column("From", itemgetter(0)),
            shown.Column("To below", itemgetter(1)),
            shown.Column("Mean keep rate", lambda row: shown.percent(row[2].mean_keep_rate)),
            shown.Column("Share of the prompts", lambda row: shown.percent(row[3])),
        )

    def _drawings(self) -> Iterable[Markup]:
        return [drawn(self.mean(), [(f"schedule {place}", each) for place, each in enumerate(self.schedules)])]

    @property
    def num_layers(self) -> int:
        """L of all its schedules."""
        return self.schedules[0].num_layers

    def level(self, value: float) -> int:
        """Which of the schedules a prompt with this statistic gets."""
        return bisect.bisect_right(self.edges, value)

    def mean(self) -> Schedule:
        """The keep rates of the average calibration prompt."""
        rates = [self.average(lambda schedule, at=i: schedule.keep_rates[at]) for i in range(self.num_layers)]
        # where all agree, rounding may not make a difference; nor may it make a rate rise
        head = self.schedules[0].keep_rates[: self.layer]
        return Schedule(list(itertools.accumulate([*head, *(min(1.0, rate) for rate in rates[self.layer :])], min)))

    def average(self, of: Callable[..., float]) -> float:
        """The mean over calibration prompts of a function of their schedule, such as its cost."""
        return math.fsum(
            share * of(schedule) for share, schedule in zip(self.shares, self.schedules, strict=True) if share
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "statistic": self.statistic,
            "layer": self.layer,
            "edges": list(self.edges),
            "keep_rates": [list(schedule.keep_rates) for schedule in self.schedules],
            "shares": list(self.shares),
        }

    @classmethod
    def from_dict(cls, stored: Any) -> Adaptive:
        """Back from `to_dict`.

        Raises:
            ThinsightError: missing, unknown or damaged entries.
        """
        if not isinstance(stored, Mapping) or set(stored) != set(_ADAPTIVE_KEYS):
            raise BadInput(f"adaptive is {stored!r}; it must be an object with {', '.join(_ADAPTIVE_KEYS)}")
        for key in ("edges", "keep_rates", "shares"):
            if not isinstance(stored[key], Sequence) or isinstance(stored[key], str):
                raise BadInput(f"adaptive.{key} is {stored[key]!r}; it must be a list")
        return cls(
            stored["statistic"],
            stored["layer"],
            tuple(stored["edges"]),
            tuple(Schedule(rates) for rates in stored["keep_rates"]),
            tuple(stored["shares"]),
        )


def _edge(value: float) -> str:
    return f"{value:.4g}"


def real(value: Any) -> float:
    """A real number as a float; NaN for anything else, and for a whole number that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _rate(value: Any, field: str) -> float:
    """``value`` as a float in [0, 1]."""
    rate = real(value)
    if not 0.0 <= rate <= 1.0:  # false for NaN too
        said = _said(value) if math.isnan(rate) else str(rate)
        raise BadInput(f"{field} is {said}; it must be a number in [0, 1]")
    return rate + 0.0  # -0.0 becomes 0.0


def _said(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number of more digits than Python writes out
        return "too large"
