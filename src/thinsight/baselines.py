"""The published methods as a schedule and a ranker, with their own constants or brought to a given cost.

A comparison is only worth printing at equal cost: each function takes a ``budget=`` (see budget.py) and then solves its
one free parameter so that the cost comes to the budget within one token per layer, never above it. Where a paper's
layers were chosen for 32 of them, the paper's numbers are the default, and ``scale_layers=True`` brings them to the
model's depth: layer K of 32 becomes ``max(1, round(K * L / 32))``.

To add a method, write a function that returns a ``Reduction`` and hands ``budget.fit`` the function from a parameter
that raises its cost to a schedule; enter it in ``BASELINES``.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from .budget import Budget, fill, fit, fit_rate
from .errors import BadInput
from .reduction import Reduction
from .registry import Registry
from .schedule import Adaptive, Schedule, solve

RankerSpec = str | Mapping[str, Any]

_PAPER_DEPTH = 32  # layers of the decoders for which the papers chose theirs
_SPARSEVLM = {2: 300 / 576, 6: 200 / 576, 15: 110 / 576}  # its setting of 192 tokens on average
_SLOPES = 8  # steps between AutoPrune's steepest curve and its flattest


def fastv(
    num_layers: int | None = None,
    *,
    rate: float = 0.5,
    layer: int = 2,
    budget: Budget | None = None,
    ranker: RankerSpec | None = None,
    scale_layers: bool = False,
) -> Reduction:
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764): one step to ``rate`` before layer K = ``layer``.

    Its constants: K = 2, 50 % kept, ranked by the attention of the last prompt token at the layer before, averaged over
    heads. With ``budget`` the rate is solved and ``num_layers`` is the budget's. On a shallow decoder the layers above
    K may cost more than the budget alone; it is then refused, unless ``scale_layers`` takes K for one of 32 layers.
    ``ranker`` replaces the published one, for a comparison of schedules alone.
    """
    depth = _layers(num_layers, budget)
    layer = _scaled(layer, depth) if scale_layers else layer
    if budget is not None:
        rate = _step_rate(budget, layer, f"FastV (one step at layer {layer})")
    return Reduction(Schedule.step(depth, layer, rate), ranker or {"name": "text-attention", "queries": "last"})


def vtw(num_layers: int | None = None, *, layer: int | None = None, budget: Budget | None = None) -> Reduction:
    """VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803): every vision token leaves at one layer.

    ``layer`` is where (default: half of the depth, the paper's choice for LLaVA-1.5-7B's 32 layers being 16). With
    ``budget`` the layer is solved; because whole layers are a coarse grid, the layer of withdrawal itself may keep a
    part of the tokens, which is the only departure from the paper. No ranking matters when the rate is 0 or 1; the
    partial layer is thinned evenly.
    """
    layers = _layers(num_layers, budget)
    if budget is None:
        return Reduction(Schedule.step(layers, layers // 2 if layer is None else layer, 0.0), "uniform")

    def withdraw(depth: float) -> Schedule:
        return Schedule([min(1.0, max(0.0, depth - i)) for i in range(layers)])

    return Reduction(fit(budget, withdraw, 0.0, float(layers), "VTW"), "uniform")


def pyramiddrop(
    num_layers: int | None = None,
    *,
    ratio: float = 0.5,
    layers: Sequence[int] | None = None,
    budget: Budget | None = None,
    ranker: RankerSpec | None = None,
) -> Reduction:
    """PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): a staircase, each stage keeps ``ratio`` of the last.

    Its constants: four stages of equal depth (steps at L/4, L/2 and 3L/4; ``layers`` overrides them), ratio 0.5, ranked
    by the attention of the last instruction token. With ``budget`` the ratio is solved; the first stage is always full,
    so budgets below it are refused: give earlier ``layers``.
    """
    depth = _layers(num_layers, budget)
    steps = tuple(layers) if layers is not None else tuple(sorted({depth * s // 4 for s in (1, 2, 3)}))

    def staircase(r: float) -> Schedule:
        return Schedule.stages(depth, {start: r ** (i + 1) for i, start in enumerate(steps)})

    name = f"PyramidDrop (steps at {steps})"
    schedule = staircase(ratio) if budget is None else fit(budget, staircase, 0.0, 1.0, name)
    return Reduction(schedule, ranker or {"name": "text-attention", "queries": "last"})


def sparsevlm(num_layers: int | None = None, *, budget: Budget | None = None, scale_layers: bool = True) -> Reduction:
    """SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): a staircase, ranked by selected text tokens.

    Its constants: steps at layers 2, 6 and 15 of 32, to 300, 200 and 110 of 576 tokens (the setting of 192 tokens on
    average). With ``budget`` the three rates keep these proportions, none above 1. The layers are brought to the
    model's depth, as they span half of it; ``scale_layers=False`` takes them as they are. Departures: steps lie before
    those layers, where the public code runs them in full and drops behind them; and those of the `sparsevlm` ranker.
    """
    depth = _layers(num_layers, budget)
    steps = {_scaled(layer, depth) if scale_layers else layer: rate for layer, rate in _SPARSEVLM.items()}

    def staircase(factor: float) -> Schedule:
        return Schedule.stages(depth, {layer: min(1.0, factor * rate) for layer, rate in steps.items()})

    highest = 1 / min(_SPARSEVLM.values())
    name = f"SparseVLM (steps at {tuple(steps)})"
    return Reduction(staircase(1.0) if budget is None else fit(budget, staircase, 0.0, highest, name), "sparsevlm")


def fitprune(statistics: Iterable[Iterable[float]], budget: Budget) -> Reduction:
    """FitPrune (Ye et al., AAAI 2025, arXiv 2409.10197): counts per layer from attention statistics.

    One threshold serves all layers: as many of the least attended tokens go at each layer as leave at least 1 -
    threshold of the attention that the vision tokens receive there. It is bisected until the budget is met. What a
    layer's attention says takes effect in the next one, so layer 0 keeps all tokens. Ranked by text attention.

    Departures: the paper watches attention from the text and from vision tokens and drops what both would drop, with
    the highest head's attention, of each example; here it is the text's, mean over heads, averaged over examples, and
    the layers' rankings count as one (a dropped token is among the least attended ones of later layers too). What the
    threshold leaves of the budget is spent one token at a time.

    Args:
        statistics: per layer, the attention that its vision tokens receive: ``attention_statistics(model, processor,
            examples)``. In any order and at any scale.
        budget: what the reduction may cost.

    Raises:
        ThinsightError: statistics of another depth, or that are no attention.
    """
    profiles = _profiles(statistics, budget.num_layers)

    def pruned(attention: float) -> Schedule:  # 1 - threshold
        kept = [1.0]  # the smallest share of each layer's tokens that holds so much of its attention
        for profile in profiles[:-1]:
            most = len(profile) - 1
            kept.append(min(bisect.bisect_left(profile, attention), most) / most if attention > 0 else 0.0)
        return Schedule(list(itertools.accumulate(kept, min)))

    return Reduction(fill(budget, fit(budget, pruned, 0.0, 1.0, "FitPrune"), first_layer=1), "text-attention")


def visionzip(*, budget: Budget) -> Reduction:
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): all at layer 0, by the `visionzip` ranker."""
    return _at_layer_0(budget, "VisionZip", "visionzip", told=True)


def fastervlm(*, budget: Budget) -> Reduction:
    """FasterVLM (Zhang et al., 2024, arXiv 2412.01818, first version): all at layer 0, by the attention of the vision
    tower's CLS token (of the average token where there is none)."""
    return _at_layer_0(budget, "FasterVLM", "vision-attention")


def vispruner(*, budget: Budget) -> Reduction:
    """VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): all at layer 0, by the `vispruner` ranker."""
    return _at_layer_0(budget, "VisPruner", "vispruner", told=True)


def divprune(*, budget: Budget) -> Reduction:
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): all at layer 0, by the `divprune` ranker."""
    return _at_layer_0(budget, "DivPrune", "divprune")


def cdpruner(*, budget: Budget) -> Reduction:
    """CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): all at layer 0, by the `cdpruner` ranker."""
    return _at_layer_0(budget, "CDPruner", "cdpruner")


def dart(*, budget: Budget, layer: int = 2, scale_layers: bool = False) -> Reduction:
    """DART (Wen et al., 2025, arXiv 2502.11494): one step, by the `dart` ranker.

    Its constants: the step is before layer 2. On a shallow decoder the layers above may cost more than the budget
    alone; it is then refused, unless ``scale_layers`` takes ``layer`` for one of 32.
    """
    layer = _scaled(layer, budget.num_layers) if scale_layers else layer
    rate = _step_rate(budget, layer, f"DART (one step at layer {layer})")
    return Reduction(Schedule.step(budget.num_layers, layer, rate), "dart")


def autoprune(
    *, budget: Budget, x0: float = 14.9, k0: float = 0.4, gamma: float = 0.2, initial: float = 2.5
) -> Reduction:
    """AutoPrune (Wang et al., NeurIPS 2025, arXiv 2509.23931): a logistic whose slope each prompt sets.

    Its constants: after layer 0 ``initial`` times the mean keep rate; then, after each layer i of 32, rates in
    proportion to ``1 / (1 + exp(k (i - x0 - k)))``, scaled until every prompt spends the budget, with ``k = max(k0 -
    gamma x I, 0)`` and I the mutual information of text and vision tokens in layer 1's attention, summed over 32 heads.
    Layers are scaled to the model's depth and I to 32 heads. Ranked by text attention.

    Departures: k in steps of 0.05, so that there are nine schedules; the first selection is by text attention too,
    where the paper adds the vision tower's; dropped tokens are not clustered into new ones. All prompts cost the same,
    so ``shares`` of the schedules are given as alike.
    """
    depth = budget.num_layers
    layer = min(2, depth - 1)
    slopes = [k0 * step / _SLOPES for step in range(_SLOPES, -1, -1)]
    edges = [(k0 - (one + two) / 2) / (gamma * _PAPER_DEPTH) for one, two in itertools.pairwise(slopes)]

    def made(k: float) -> Schedule:
        place = [(i - 1) * _PAPER_DEPTH / depth for i in range(layer, depth)]
        curve = [1 / (1 + math.exp(k * (x - x0 - k))) for x in place]
        start = fit(budget, lambda rate: _scaled_curve(rate, initial, curve, layer), 0.0, 1.0, "AutoPrune")
        return fill(budget, start, layer)

    schedules = tuple(made(k) for k in slopes)
    # the first selection has to be one for all: the budget decides it, not the slope
    shared = min(schedule.keep_rates[:layer] for schedule in schedules)
    schedules = tuple(
        fill(budget, Schedule([*shared, *(min(rate, shared[-1]) for rate in each.keep_rates[layer:])]), layer)
        for each in schedules
    )
    share = 1 / len(schedules)
    family = Adaptive("mutual-information", layer, tuple(edges), schedules, (share,) * len(schedules))
    return Reduction(family.mean(), "text-attention", adaptive=family)


def random(schedule: Schedule | None = None, *, budget: Budget | None = None, seed: int = 0) -> Reduction:
    """Random dropping: the floor any ranker has to beat.

    Under a given schedule, hence at the same cost; with ``budget`` instead, all at layer 0.
    """
    return Reduction(_given(schedule, budget, "Random"), {"name": "random", "seed": seed})


def uniform(schedule: Schedule | None = None, *, budget: Budget | None = None) -> Reduction:
    """Tokens spread evenly over the image: the dumb baseline that is hard to beat.

    Under a given schedule, hence at the same cost; with ``budget`` instead, all at layer 0.
    """
    return Reduction(_given(schedule, budget, "Uniform"), "uniform")


def downsample(*, budget: Budget) -> Reduction:
    """The image at a lower resolution, by pooling its tokens before layer 0: the `downsample` ranker."""
    return _at_layer_0(budget, "Downsampling", "downsample")


@dataclass(frozen=True)
class Baseline:
    """One method of a comparison.

    Attributes:
        name: as in `BASELINES`.
        title: for tables and figures.
        paper: authors, venue; empty where there is none.
        arxiv: its number; empty where there is none.
        function: the function of this file.
        needs_statistics: whether `make` has to be given ``statistics=``.
        has_layers: whether `make` takes ``scale_layers=``.
    """

    name: str
    title: str
    paper: str
    arxiv: str
    function: Callable[..., Reduction]
    needs_statistics: bool = False
    has_layers: bool = False

    def make(
        self,
        budget: Budget,
        *,
        statistics: Iterable[Iterable[float]] | None = None,
        scale_layers: bool | None = None,
        **options: Any,
    ) -> Reduction:
        """The method at this budget. All methods can be called alike: what one has no use for is left aside.

        Args:
            budget: what it may cost.
            statistics: `attention_statistics`, for methods that need them.
            scale_layers: for methods whose layers are numbered for 32; None: the function's default.
            options: the function's own, such as ``seed``.

        Raises:
            ThinsightError: a budget that it cannot reach, or statistics that are missing.
        """
        if self.needs_statistics:
            if statistics is None:
                raise BadInput(f"{self.title} needs statistics=: attention_statistics(model, processor, examples)")
            options["statistics"] = statistics
        if self.has_layers and scale_layers is not None:
            options["scale_layers"] = scale_layers
        return self.function(budget=budget, **options)


BASELINES: Registry[Baseline] = Registry("baseline", code=attrgetter("function"))
for _each in (
    Baseline("fastv", "FastV", "Chen et al., ECCV 2024", "2403.06764", fastv, has_layers=True),
    Baseline("vtw", "VTW", "Lin et al., AAAI 2025", "2405.05803", vtw),
    Baseline("pyramiddrop", "PyramidDrop", "Xing et al., CVPR 2025", "2410.17247", pyramiddrop),
    Baseline("sparsevlm", "SparseVLM", "Zhang et al., ICML 2025", "2410.04417", sparsevlm, has_layers=True),
    Baseline("fitprune", "FitPrune", "Ye et al., AAAI 2025", "2409.10197", fitprune, needs_statistics=True),
    Baseline("visionzip", "VisionZip", "Yang et al., CVPR 2025", "2412.04467", visionzip),
    Baseline("fastervlm", "FasterVLM", "Zhang et al., 2024", "2412.01818", fastervlm),
    Baseline("vispruner", "VisPruner", "Zhang et al., ICCV 2025", "2412.01818", vispruner),
    Baseline("divprune", "DivPrune", "Alvar et al., CVPR 2025", "2503.02175", divprune),
    Baseline("cdpruner", "CDPruner", "Zhang et al., NeurIPS 2025", "2506.10967", cdpruner),
    Baseline("dart", "DART", "Wen et al., 2025", "2502.11494", dart, has_layers=True),
    Baseline("autoprune", "AutoPrune", "Wang et al., NeurIPS 2025", "2509.23931", autoprune),
    Baseline("random", "Random", "", "", random),
    Baseline("uniform", "Uniform", "", "", uniform),
    Baseline("downsample", "Downsampling", "", "", downsample),
):
    BASELINES.register(_each)
get_baseline = BASELINES.__getitem__


def _scaled_curve(mean: float, initial: float, curve: Sequence[float], layer: int) -> Schedule:
    """AutoPrune's rates with this mean: all at layer 0, ``initial`` means up to ``layer``, then the curve."""
    head = [1.0, *[min(1.0, initial * mean)] * (layer - 1)]
    left = mean * (len(head) + len(curve)) - sum(head)

    def tail(scale: float) -> list[float]:
        return [min(head[-1], scale * rate) for rate in curve]

    scale, _ = solve(lambda scale: sum(tail(scale)) <= left, 0.0, head[-1] / min(curve))
    return Schedule([*head, *tail(scale)])


def _layers(num_layers: int | None, budget: Budget | None) -> int:
    if budget is None and num_layers is None:
        raise BadInput("a baseline needs num_layers= or budget=")
    if budget is not None and num_layers not in (None, budget.num_layers):
        raise BadInput(f"num_layers={num_layers} contradicts the budget's {budget.num_layers} layers")
    return budget.num_layers if budget is not None else int(num_layers or 0)


def _scaled(layer: int, depth: int) -> int:
    """A layer of 32 at another depth; never layer 0, where no attention has been paid."""
    return max(1, math.floor(layer * depth / _PAPER_DEPTH + 0.5))


def _step_rate(budget: Budget, layer: int, name: str) -> float:
    """The rate of one step that spends the budget."""
    return fit_rate(budget, lambda rate: Schedule.step(budget.num_layers, layer, rate), name)


def _at_layer_0(budget: Budget, title: str, ranker: str, told: bool = False) -> Reduction:
    """All at layer 0; the ranker is ``told`` the rate where its choice depends on it."""
    rate = _step_rate(budget, 0, title)
    return Reduction(Schedule.step(budget.num_layers, 0, rate), {"name": ranker, "keep": rate} if told else ranker)


def _given(schedule: Schedule | None, budget: Budget | None, name: str) -> Schedule:
    if schedule is not None and budget is None:
        return schedule
    if schedule is None and budget is not None:
        return Schedule.step(budget.num_layers, 0, _step_rate(budget, 0, name))
    raise BadInput(f"{name} dropping needs either a schedule or budget=")


def _profiles(statistics: Iterable[Iterable[float]], depth: int) -> list[list[float]]:
    """Per layer, the attention of its best 0, 1, ... N tokens, as shares of all."""
    layers = [sorted(map(float, layer), reverse=True) for layer in statistics]
    if len(layers) != depth:
        raise BadInput(f"statistics have {len(layers)} layers, the budget's model has {depth}")
    for number, layer in enumerate(layers):
        # NaN fails both comparisons
        if not (layer and all(0 <= value < math.inf for value in layer) and sum(layer) > 0):
            raise BadInput(f"statistics[{number}] is no attention: give at least one value, none below 0, not all 0")
    return [[value / sum(layer) for value in itertools.accumulate(layer, initial=0.0)] for layer in layers]
