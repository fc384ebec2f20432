"""Schedule: how many of a prompt's vision tokens enter each decoder layer.

Knows nothing about which tokens those are, about models, or about what a schedule costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import BadInput

_ROUNDING_SLACK = 1e-9  # so that 0.3 * 10 = 3.0000000000000004 counts as 3 tokens, not as 4
_STEEPEST = 1000.0  # a single step for any depth; beyond it floats no longer resolve alpha
_SHOWN = 8  # runs of layers in a repr
_WANTED = "pass a list of numbers in [0, 1], one per decoder layer"


@dataclass(frozen=True, slots=True)
class Schedule:
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
        object.__setattr__(self, "keep_rates", _checked_rates(self.keep_rates))

    def __repr__(self) -> str:
        runs = [
            f"{float(f'{rate:.4g}')}" + (f" x{last - first + 1}" if last > first else "")
            for first, last, rate in self.runs()
        ]
        if len(runs) <= _SHOWN:
            return f"Schedule([{', '.join(runs)}])"
        shown = ", ".join([*runs[: _SHOWN // 2], "...", *runs[-2:]])
        return f"Schedule([{shown}], {self.num_layers} layers, mean {self.mean_keep_rate:.4g})"

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
        result: dict[int, int] = {}
        above = n
        for layer, count in enumerate(self.counts(n)):
            if count < above:
                result[layer] = count
                above = count
        return result

    def runs(self) -> list[tuple[int, int, float]]:
        """Maximal runs of layers with one rate: ``(first layer, last layer, rate)``."""
        result: list[tuple[int, int, float]] = []
        for layer, rate in enumerate(self.keep_rates):
            if result and result[-1][2] == rate:
                result[-1] = (result[-1][0], layer, rate)
            else:
                result.append((layer, layer, rate))
        return result

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
        return cls(_solve_sigmoid(depth, float(k), target))


def _solve_sigmoid(depth: int, k: float, budget: float) -> list[float]:
    """Keep rates of the sigmoid of steepness ``k`` whose mean is ``budget``, from below."""

    def rates(shift: float) -> list[float]:  # shift = k * alpha keeps the search range free of k
        return _falling([_logistic(shift - k * layer) for layer in range(depth)])

    def mean(shift: float) -> float:
        return math.fsum(rates(shift)) / depth

    # the first layer's rate is at least the mean, the last one's at most: both ends bracket the budget
    logit = math.log(budget) - math.log1p(-budget)
    return rates(_bisect(lambda shift: mean(shift) <= budget, logit - 1.0, logit + k * depth + 1.0))


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest float found between ``low``, where ``holds`` is true, and ``high``, where it is not."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        if holds(middle):
            low = middle
        else:
            high = middle


def _logistic(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    power = math.exp(x)
    return power / (1.0 + power)


def _falling(rates: list[float]) -> list[float]:
    """The rates with any rise of a last bit removed."""
    for i in range(1, len(rates)):
        rates[i] = min(rates[i], rates[i - 1])
    return rates


def _checked_rates(keep_rates: Any) -> tuple[float, ...]:
    if isinstance(keep_rates, (str, bytes)):
        raise BadInput(f"keep_rates is {keep_rates!r}; {_WANTED}")
    try:
        given = list(keep_rates)
    except TypeError:
        raise BadInput(f"keep_rates is {keep_rates!r}; {_WANTED}") from None
    if not given:
        raise BadInput(f"keep_rates is empty; {_WANTED}")
    rates = [_rate(rate, f"keep_rates[{i}]") for i, rate in enumerate(given)]
    for i in range(1, len(rates)):
        if rates[i] > rates[i - 1]:
            raise BadInput(
                f"keep_rates[{i}] is {rates[i]} but keep_rates[{i - 1}] is {rates[i - 1]}; "
                "rates must not rise with depth, since a dropped token stays dropped"
            )
    return tuple(rates)


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
        shown = _shown(value) if math.isnan(rate) else str(rate)
        raise BadInput(f"{field} is {shown}; it must be a number in [0, 1]")
    return rate + 0.0  # -0.0 becomes 0.0


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number of more digits than Python writes out
        return "too large"


def whole(value: Any, field: str, least: int, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``; raises `BadInput` for anything else."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or int(value) < least or (most is not None and int(value) > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BadInput(f"{field} is {value!r}; it must be a whole number {wanted}")
    return int(value)
