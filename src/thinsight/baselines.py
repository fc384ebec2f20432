"""The published methods as a schedule and a ranker, with their own constants or brought to a given cost.

Knows cost and schedules. Knows nothing about torch, models, data or searches: a baseline is a ``Reduction``
like any other and is run, scored and saved like one.

A comparison is only worth printing at equal cost. ``FlopsBudget`` says what may be spent, and each function
takes ``budget=`` and then solves its one free parameter so that the decoder FLOPs come to the budget within
one token per layer, never above it.

To add a method: write one function that returns a ``Reduction``; give it one parameter that raises its cost
and, for ``budget=``, hand ``_most_within`` the function from that parameter to a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import cost
from .errors import ThinsightError
from .reduction import Reduction
from .schedule import Schedule

RankerSpec = str | Mapping[str, Any]


@dataclass(frozen=True)
class FlopsBudget:
    """Decoder prefill FLOPs that a schedule may cost on one stated prompt.

    ``shape`` is the decoder, ``n_vision`` and ``n_text`` the prompt's tokens (medians over a data set, as a
    rule), ``flops`` the limit. Build one with ``like`` or ``ratio``.
    """

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
        if not math.isfinite(ratio) or ratio < 1:
            raise ThinsightError(f"flops_ratio must be at least 1 (full / reduced), got {ratio}")
        shape = cost.decoder_shape(config)
        return cls(shape, n_vision, n_text, shape.prefill_flops(n_vision, n_text) / ratio)

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    def spent(self, schedule: Schedule) -> float:
        """Decoder FLOPs of ``schedule`` on this prompt."""
        return self.shape.prefill_flops(self.n_vision, self.n_text, schedule)

    def holds(self, schedule: Schedule) -> bool:
        """Whether ``schedule`` stays within the budget (float rounding of one part in 10^12 allowed)."""
        return self.spent(schedule) <= self.flops * (1 + 1e-12)


def fastv(
    num_layers: int | None = None,
    *,
    rate: float = 0.5,
    layer: int = 2,
    budget: FlopsBudget | None = None,
    ranker: RankerSpec | None = None,
) -> Reduction:
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764): one step to ``rate`` before layer K = ``layer``.

    Its constants: K = 2, 50 % kept, ranked by the attention of the last prompt token at the layer before,
    averaged over heads. With ``budget`` the rate is solved and ``num_layers`` is the budget's. ``ranker``
    replaces the published one, for a comparison of schedules alone.
    """
    layers = _layers(num_layers, budget)
    if budget is not None:
        rate = _most_kept(
            budget, lambda r: Schedule.step(layers, layer, r), f"FastV (one step at layer {layer})"
        )
    return Reduction(
        Schedule.step(layers, layer, rate), ranker or {"name": "text-attention", "queries": "last"}
    )


def vtw(
    num_layers: int | None = None, *, layer: int | None = None, budget: FlopsBudget | None = None
) -> Reduction:
    """VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803): every vision token leaves at
    one layer.

    ``layer`` is where (default: half of the depth, the paper's choice for LLaVA-1.5-7B's 32 layers being 16).
    With ``budget`` the layer is solved; because whole layers are a coarse grid, the layer of withdrawal
    itself may keep a part of the tokens, which is the only departure from the paper. No ranking matters when
    the rate is 0 or 1; the partial layer is thinned evenly.
    """
    layers = _layers(num_layers, budget)
    if budget is None:
        return Reduction(Schedule.step(layers, layers // 2 if layer is None else layer, 0.0), "uniform")

    def withdraw(depth: float) -> Schedule:
        return Schedule([min(1.0, max(0.0, depth - i)) for i in range(layers)])

    return Reduction(_most_within(budget, withdraw, 0.0, float(layers), "VTW"), "uniform")


def pyramiddrop(
    num_layers: int | None = None,
    *,
    ratio: float = 0.5,
    layers: Sequence[int] | None = None,
    budget: FlopsBudget | None = None,
    ranker: RankerSpec | None = None,
) -> Reduction:
    """PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): a staircase, each stage keeps ``ratio`` of the
    last.

    Its constants: four stages of equal depth (steps at L/4, L/2 and 3L/4; ``layers`` overrides them), ratio
    0.5, ranked by the attention of the last instruction token. With ``budget`` the ratio is solved; the first
    stage is always full, so budgets below it are refused: give earlier ``layers``.
    """
    depth = _layers(num_layers, budget)
    steps = tuple(layers) if layers is not None else tuple(sorted({depth * s // 4 for s in (1, 2, 3)}))

    def staircase(r: float) -> Schedule:
        return Schedule.stages(depth, {start: r ** (i + 1) for i, start in enumerate(steps)})

    schedule = (
        staircase(ratio)
        if budget is None
        else _most_within(budget, staircase, 0.0, 1.0, f"PyramidDrop (steps at {steps})")
    )
    return Reduction(schedule, ranker or {"name": "text-attention", "queries": "last"})


def random(schedule: Schedule, *, seed: int = 0) -> Reduction:
    """Random dropping under the same schedule, hence at the same cost: the floor any ranker has to beat."""
    return Reduction(schedule, {"name": "random", "seed": seed})


def uniform(schedule: Schedule) -> Reduction:
    """Tokens spread evenly over the image under the same schedule: the dumb baseline that is hard to beat."""
    return Reduction(schedule, "uniform")


def _layers(num_layers: int | None, budget: FlopsBudget | None) -> int:
    if budget is None and num_layers is None:
        raise ThinsightError("a baseline needs num_layers= or budget=")
    if budget is not None and num_layers not in (None, budget.num_layers):
        raise ThinsightError(f"num_layers={num_layers} contradicts the budget's {budget.num_layers} layers")
    return budget.num_layers if budget is not None else int(num_layers or 0)


def _most_kept(budget: FlopsBudget, make: Callable[[float], Schedule], name: str) -> float:
    """The highest count / n_vision whose schedule holds the budget: exact, as counts are whole tokens."""
    n = budget.n_vision
    low, high = 0, n
    _refuse_unreachable(budget, make(0.0), name)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if budget.holds(make(middle / n)) else (low, middle - 1)
    return low / n if n else 0.0


def _most_within(
    budget: FlopsBudget, make: Callable[[float], Schedule], low: float, high: float, name: str
) -> Schedule:
    """The costliest schedule of a one-parameter family within the budget, its parameter in [low, high]."""
    _refuse_unreachable(budget, make(low), name)
    if budget.holds(make(high)):
        return make(high)
    for _ in range(60):  # halves the interval down to float64's resolution
        middle = (low + high) / 2
        low, high = (middle, high) if budget.holds(make(middle)) else (low, middle)
    return make(low)


def _refuse_unreachable(budget: FlopsBudget, cheapest: Schedule, name: str) -> None:
    if not budget.holds(cheapest):
        raise ThinsightError(
            f"{name} cannot go below {budget.spent(cheapest):.4g} decoder FLOPs, "
            f"the budget is {budget.flops:.4g}: reduce at an earlier layer"
        )
