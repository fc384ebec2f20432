"""Budgets: what a schedule may cost, as a mean keep rate, as decoder FLOPs or as measured milliseconds.

A budget holds exactly: what `fit` and `fill` return never costs more, and one token more in every layer would.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from . import cost
from .errors import BadInput, Unreachable
from .schedule import Schedule, real, solve

UNITS = ("keep", "flops", "ms")
_ROUNDING = 1e-12


class Budget:
    """What any budget says; subclass it. Cost never falls when a layer gets more tokens.

    Attributes:
        num_layers: L of the schedules it is for.
        n_vision: N of the prompt on which cost is counted.
        limit: the most a schedule may cost, in the budget's unit.
        unit: one of `UNITS`.
    """

    num_layers: int
    n_vision: int
    limit: float
    unit: ClassVar[str]

    def spent(self, schedule: Schedule) -> float:
        """What a schedule costs, in the budget's unit."""
        raise NotImplementedError

    def holds(self, schedule: Schedule) -> bool:
        """Whether a schedule costs no more than the limit (float rounding of one part in 10^12 allowed)."""
        return self.spent(schedule) <= self.limit * (1 + _ROUNDING)

    def limited(self, limit: float) -> Budget:
        """The same kind of budget on the same prompt with another limit."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What a result keeps of it, as JSON values."""
        return {"unit": self.unit, "limit": self.limit, "n_vision": self.n_vision}


@dataclass(frozen=True)
class KeepBudget(Budget):
    """A mean keep rate over all layers (the paper's "memory cost"), counted in whole tokens.

    Raises:
        ThinsightError: a rate outside (0, 1].
    """

    unit = "keep"
    num_layers: int
    n_vision: int
    rate: float

    def __post_init__(self) -> None:
        if not 0 < real(self.rate) <= 1:
            raise BadInput(f"budget is {self.rate!r}; a mean keep rate must be above 0 and at most 1")

    @property
    def limit(self) -> float:  # type: ignore[override]
        """The rate."""
        return float(self.rate)

    def spent(self, schedule: Schedule) -> float:
        """Mean share of the N tokens that enter a layer, after rounding to whole tokens."""
        counts = schedule.counts(self.n_vision)
        return sum(counts) / (len(counts) * self.n_vision) if self.n_vision else 0.0

    def limited(self, limit: float) -> KeepBudget:
        """Another mean keep rate; above 1 it is 1."""
        return replace(self, rate=min(1.0, limit))


@dataclass(frozen=True)
class FlopsBudget(Budget):
    """Decoder prefill FLOPs that a schedule may cost on one stated prompt.

    ``shape`` is the decoder, ``n_vision`` and ``n_text`` the prompt's tokens (medians over a data set, as a
    rule), ``flops`` the limit. Build one with ``like`` or ``ratio``.
    """

    unit = "flops"
    shape: cost.DecoderShape
    n_vision: int
    n_text: int
    flops: float

    @classmethod
    def like(cls, config: Any, schedule: Schedule, *, n_vision: int, n_text: int) -> FlopsBudget:
        """The budget that ``schedule`` itself spends."""
        shape = cost.decoder_shape(config)
        return cls(shape, n_vision, n_text, shape.prefill_flops(n_vision, n_text, schedule))

    @classmethod
    def ratio(cls, config: Any, ratio: float, *, n_vision: int, n_text: int) -> FlopsBudget:
        """The full model's FLOPs divided by ``ratio`` (2.0 = half of them).

        Raises ThinsightError when the ratio is below 1 or not finite.
        """
        if not 1 <= real(ratio) < math.inf:
            raise BadInput(f"flops_ratio must be at least 1 (full / reduced), got {ratio!r}")
        shape = cost.decoder_shape(config)
        return cls(shape, n_vision, n_text, shape.prefill_flops(n_vision, n_text) / ratio)

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        """Of the decoder."""
        return self.shape.num_layers

    @property
    def limit(self) -> float:  # type: ignore[override]
        """The FLOPs."""
        return self.flops

    def spent(self, schedule: Schedule) -> float:
        """Decoder FLOPs of ``schedule`` on this prompt."""
        return self.shape.prefill_flops(self.n_vision, self.n_text, schedule)

    def limited(self, limit: float) -> FlopsBudget:
        """Other FLOPs."""
        return replace(self, flops=limit)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "n_text": self.n_text}


@dataclass(frozen=True)
class LatencyModel:
    """How long a prefill takes on one device: a part that does not depend on the schedule, and for each layer
    a time that depends on its tokens.

    ``tokens`` (all tokens of a prompt that enter a layer, rising) and ``seconds`` (of one layer, for the
    whole batch) are points between which it is linear, two at least; fitted by `timing.profile`.

    Raises:
        ThinsightError: fewer points, counts that do not rise, or not a time for each.
    """

    device: str
    dtype: str
    batch: int
    constant: float  # seconds
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in itertools.pairwise(self.tokens))
        if len(self.tokens) < 2 or len(self.seconds) != len(self.tokens) or not rising:
            raise BadInput(
                f"a latency model has {len(self.tokens)} token counts and {len(self.seconds)} times; give "
                "two or more of both, the counts rising, or measure them with timing.profile"
            )

    def __repr__(self) -> str:
        return (
            f"LatencyModel({self.device!r}, {self.dtype!r}, batch {self.batch}, {self.constant:.4g} s and "
            f"{len(self.tokens)} points)"
        )

    def layer(self, tokens: float) -> float:
        """Seconds of one layer."""
        last = len(self.tokens) - 2
        place = min(max(bisect.bisect_left(self.tokens, tokens) - 1, 0), last)  # the ends go on straight
        (left, right), (low, high) = self.tokens[place : place + 2], self.seconds[place : place + 2]
        return low + (high - low) * (tokens - left) / (right - left)

    def prefill(self, tokens: Sequence[float]) -> float:
        """Seconds of a prefill whose layers get so many tokens each."""
        return self.constant + math.fsum(self.layer(n) for n in tokens)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "tokens": list(self.tokens), "seconds": list(self.seconds)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LatencyModel:
        """Back from `to_dict`."""
        return cls(**{**stored, "tokens": tuple(stored["tokens"]), "seconds": tuple(stored["seconds"])})


@dataclass(frozen=True)
class TimeBudget(Budget):
    """Milliseconds of one prefill of the stated prompt, as a latency model of the device predicts them."""

    unit = "ms"
    latency: LatencyModel
    num_layers: int
    n_vision: int
    n_text: int
    milliseconds: float

    @property
    def limit(self) -> float:  # type: ignore[override]
        """The milliseconds."""
        return self.milliseconds

    def spent(self, schedule: Schedule) -> float:
        """Predicted milliseconds of a prefill under ``schedule``."""
        tokens = cost.layer_tokens(self.num_layers, self.n_vision, self.n_text, schedule)
        return 1e3 * self.latency.prefill(tokens)

    def limited(self, limit: float) -> TimeBudget:
        """Other milliseconds."""
        return replace(self, milliseconds=limit)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "n_text": self.n_text, "latency": self.latency.to_dict()}


def make_budget(
    value: float, unit: str = "keep", *, config: Any, n_vision: int, n_text: int, latency: LatencyModel | None = None
) -> Budget:
    """A budget for prompts of ``n_vision`` and ``n_text`` tokens of the model with this config.

    Args:
        value: "keep": mean keep rate in (0, 1]; "flops": decoder prefill FLOPs of one prompt, or, up to 1, a
            fraction of the full model's; "ms": milliseconds of a prefill of the latency model's batch.
        unit: one of `UNITS`.
        config: the model's config, as `cost.flops` takes it.
        n_vision: median vision tokens of a prompt.
        n_text: its other tokens.
        latency: for "ms", see `timing.profile`.

    Raises:
        ThinsightError: an unknown unit, or a value out of range.
    """
    check_budget_value(value, unit)
    shape = cost.decoder_shape(config)
    if unit == "keep":
        return KeepBudget(shape.num_layers, n_vision, value)
    if unit == "flops":
        limit = value * shape.prefill_flops(n_vision, n_text) if value <= 1 else value
        return FlopsBudget(shape, n_vision, n_text, limit)
    if latency is None:
        raise BadInput("a budget in ms needs a latency model; see thinsight.timing.profile")
    return TimeBudget(latency, shape.num_layers, n_vision, n_text, value)


def check_budget_value(value: Any, unit: str) -> None:
    """Refuse an unknown unit, or a value out of range: what can be told without a model."""
    if unit not in UNITS:
        raise BadInput(f"budget_unit is {unit!r}; choose one of {', '.join(UNITS)}")
    number = real(value)
    if not 0 < number < math.inf or (unit == "keep" and number > 1):
        wanted = "above 0 and at most 1" if unit == "keep" else "a finite number above 0"
        raise BadInput(f"budget is {value!r}; in {unit} it must be {wanted}")


def fit(
    budget: Budget, make: Callable[[float], Schedule], low: float, high: float, name: str = "the schedule"
) -> Schedule:
    """The costliest schedule within the budget of a family with one parameter in [low, high], in which cost
    rises with the parameter.

    Raises:
        ThinsightError: even ``make(low)`` costs more; ``name`` says of what.
    """
    refuse_unreachable(budget, make(low), name)
    if budget.holds(make(high)):
        return make(high)
    return make(solve(lambda x: budget.holds(make(x)), low, high)[0])


def fit_rate(budget: Budget, make: Callable[[float], Schedule], name: str = "the schedule") -> float:
    """The highest count / N whose schedule holds the budget: exact, as counts are whole tokens.

    Raises:
        ThinsightError: even rate 0 costs more.
    """
    n = budget.n_vision
    refuse_unreachable(budget, make(0.0), name)
    count, _ = solve(lambda count: budget.holds(make(count / n)), 0, n + 1, lambda low, high: (low + high) // 2)
    return count / n if n else 0.0


def fill(budget: Budget, schedule: Schedule, first_layer: int = 0) -> Schedule:
    """A schedule that holds, in whole tokens of the budget's N, with what is left spent one token at a time.

    Layers from ``first_layer`` on take turns, shallow to deep, as long as anything fits; counts never rise with depth.
    """
    counts = list(schedule.counts(budget.n_vision))
    grew = True
    while grew:
        grew = False
        for layer in range(first_layer, len(counts)):
            above = counts[layer - 1] if layer else budget.n_vision
            if counts[layer] >= above:
                continue
            counts[layer] += 1
            if budget.holds(schedule_of(counts, budget.n_vision)):
                grew = True
            else:
                counts[layer] -= 1
    return schedule_of(counts, budget.n_vision)


def schedule_of(counts: Sequence[int], n: int) -> Schedule:
    """The schedule with these counts at N = ``n``."""
    return Schedule([count / n for count in counts])


def refuse_unreachable(budget: Budget, cheapest: Schedule, name: str) -> None:
    """Raise, with what it costs and what may be spent, if even the cheapest schedule of its kind costs too much."""
    if not budget.holds(cheapest):
        what = {"keep": "a mean keep rate of", "flops": "decoder FLOPs of", "ms": "milliseconds of prefill:"}
        raise Unreachable(
            f"{name} cannot go below {what[budget.unit]} {budget.spent(cheapest):.4g}, the budget is "
            f"{budget.limit:.4g}: reduce at an earlier layer"
        )
