"""Schedules that spend a budget exactly: sigmoids, random staircases, and changes to a known schedule.

Each is a family with one free parameter in which cost rises, solved for by bisection. Knows nothing about
models, scores or why a shape is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..budget import Budget, fill, fit, refuse_unreachable
from ..errors import BadInput, Unreachable
from ..schedule import Schedule, logistic, sigmoid_rates

Space = Mapping[str, tuple[float, float, bool] | tuple[int, int]]


def propose(seen: Sequence[tuple[Mapping[str, float], float]], space: Space, seed: int, startup: int) -> dict[str, Any]:
    """Parameters to try next, a pure function of what was seen (Optuna's Gaussian process, seeded anew).

    Args:
        seen: parameters and the value each gave; higher is better, and values are taken as noisy.
        space: per parameter its lowest and highest value: two whole numbers, or two floats and whether its scale
            is logarithmic.
        seed: of this proposal.
        startup: values seen before the Gaussian process takes over from random proposals.
    """
    import optuna

    with quiet(optuna):
        sampler = optuna.samplers.GPSampler(seed=seed % 2**32, n_startup_trials=startup)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        kinds: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(*limits)
            if len(limits) == 2
            else optuna.distributions.FloatDistribution(*limits[:2], log=limits[2])
            for name, limits in space.items()
        }
        for parameters, value in seen:
            study.add_trial(optuna.trial.create_trial(params=dict(parameters), distributions=dict(kinds), value=value))
        return dict(study.ask(kinds).params)


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from writing a line per study to the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


_FURTHEST = 60.0  # logits beyond it are rates of 0 or 1 in float64


def first_layer_for(budget: Budget, earliest: int, wanted: int | None = None) -> int:
    """The shallowest layer that is to get fewer tokens.

    The paper's layer 2 where the layers before it take at most half of the budget, otherwise the earliest
    possible one; or ``wanted``, checked.

    Args:
        budget: what may be spent.
        earliest: the first layer at which the ranker can rank.
        wanted: the caller's choice.

    Raises:
        ThinsightError: the layers before it cost more than the budget, or it is before ``earliest``.
    """
    last = budget.num_layers - 1
    if wanted is not None:
        if not earliest <= wanted <= last:
            raise BadInput(f"first_layer is {wanted}: it must be from {earliest}, where the ranker can rank, to {last}")
        chosen = wanted
    else:
        chosen = max(earliest, min(2, last))
        while chosen > earliest and budget.spent(_head(budget, chosen)) > budget.limit / 2:
            chosen -= 1
    if not budget.holds(_head(budget, chosen)):
        raise Unreachable(
            f"layers 0 to {chosen - 1} keep all tokens and cost {budget.spent(_head(budget, chosen)):.4g}, "
            f"the budget is {budget.limit:.4g} ({budget.unit}): choose an earlier first_layer; at layer 0 "
            "only a ranker such as 'staged' or 'vision-attention' can rank"
        )
    return chosen


def _head(budget: Budget, first_layer: int) -> Schedule:
    return Schedule.step(budget.num_layers, first_layer, 0.0)


def sigmoid(budget: Budget, k: float, *, amplitude: float = 1.0, floor: float = 0.0, first_layer: int = 0) -> Schedule:
    """P-Sigmoid's schedule (arXiv 2412.00556): ``floor + (amplitude - floor) / (1 + exp(k (i - alpha)))``.

    Layers before ``first_layer`` keep all. ``alpha`` is solved so that the budget is spent, never more; where
    the amplitude (or the floor) leaves no such alpha, it gives way until there is one.

    Args:
        budget: what may be spent.
        k: steepness per layer, above 0.
        amplitude: the highest rate after the first layers, in (0, 1].
        floor: the lowest rate, in [0, amplitude].
        first_layer: as above.
    """
    if not (k > 0 and math.isfinite(k)) or not 0 <= floor <= amplitude <= 1 or amplitude == 0:
        raise BadInput(
            f"k, amplitude and floor are {k}, {amplitude} and {floor}: k must be above 0, and 0 <= floor <= "
            "amplitude <= 1"
        )

    def curve(shift: float) -> Schedule:
        # at the ends the amplitude or the floor gives way, so that every budget can be spent
        over, under = max(0.0, shift - reach), max(0.0, -_FURTHEST - shift)
        top = min(1.0, amplitude + over)
        low = max(0.0, floor - under) if under else min(top, floor)
        return _with_head(sigmoid_rates(budget.num_layers, k, shift, top, low), first_layer)

    reach = _FURTHEST + k * budget.num_layers
    return fit(budget, curve, -_FURTHEST - 1.0, reach + 1.0, "P-Sigmoid")


def fit_sigmoid(schedule: Schedule, first_layer: int = 0) -> dict[str, float]:
    """Steepness, amplitude and floor of the sigmoid closest (least squares) to a schedule from
    ``first_layer`` on."""
    from scipy.optimize import least_squares

    layers = np.arange(first_layer, schedule.num_layers)
    rates = np.array(schedule.keep_rates[first_layer:])

    def values(x: Sequence[float]) -> np.ndarray:
        k, alpha, amplitude, floor = x
        return floor + (amplitude - floor) / (1 + np.exp(np.clip(k * (layers - alpha), -_FURTHEST, _FURTHEST)))

    middle = float(layers[np.argmin(np.abs(rates - (rates.max() + rates.min()) / 2))])
    start = [4.0 / max(1, len(layers)), middle, max(rates.max(), 1e-3), min(rates.min(), 0.99)]
    bounds = ([1e-3, -4.0 * len(layers), 1e-3, 0.0], [100.0, 4.0 * schedule.num_layers, 1.0, 1.0])
    start = [min(max(value, low), high) for value, low, high in zip(start, *bounds, strict=True)]
    found = least_squares(lambda x: values(x) - rates, start, bounds=bounds).x
    k, _, amplitude, floor = (float(value) for value in found)
    return {"k": k, "amplitude": amplitude, "floor": min(floor, amplitude)}


def random_staircase(budget: Budget, rng: np.random.Generator, first_layer: int = 0) -> Schedule:
    """A random schedule that falls in any number of steps at any layers to any rates, and spends the
    budget."""
    depth = budget.num_layers - first_layer
    steps = int(rng.integers(1, depth + 1))
    starts = np.sort(rng.choice(depth, steps, replace=False))
    heights = np.sort(rng.uniform(0.0, 1.0, steps))[::-1]
    rates = np.ones(depth)
    for start, height in zip(starts, heights, strict=True):
        rates[start:] = height

    def curve(share: float) -> Schedule:
        power = (1 - share) / share if share > 0 else math.inf
        raised = [0.0 if rate < 1 and power == math.inf else float(rate**power) for rate in rates]
        return _with_head([1.0] * first_layer + raised, first_layer)

    # a staircase whose first step is late may be unable to fall far enough: then it starts at once
    if not budget.holds(curve(0.0)):
        rates = np.minimum(rates, float(heights[0]))
    return fill(budget, fit(budget, curve, 0.0, 1.0, "a random staircase"), first_layer)


def from_scores(budget: Budget, logits: Sequence[float] | NDArray[np.float64], first_layer: int = 0) -> Schedule:
    """The schedule whose rates have these logits per layer (of layers from ``first_layer`` on), all moved by
    one number so that the budget is spent to the last token. Logits that rise are made level.
    """
    falling = np.minimum.accumulate(np.asarray(logits, dtype=float))

    def curve(shift: float) -> Schedule:
        return _with_head([1.0] * first_layer + [logistic(x + shift) for x in falling], first_layer)

    reach = _FURTHEST + float(np.abs(falling).max(initial=0.0))
    return fill(budget, fit(budget, curve, -reach, reach), first_layer)


def deform(
    budget: Budget, schedule: Schedule, rng: np.random.Generator, strength: float, first_layer: int = 0
) -> Schedule:
    """A schedule near another one: a smooth random bump on the logits of its rates, the budget spent again.

    Args:
        budget: what may be spent.
        schedule: where to start.
        rng: of the bump's place, width and height.
        strength: standard deviation of its height, in logits.
        first_layer: layers before it keep all.
    """
    logits = _logits(budget, schedule, first_layer)
    layers = np.arange(len(logits))
    centre, width = rng.uniform(-0.5, len(logits) - 0.5), math.exp(rng.uniform(-0.5, 1.5))
    bump = np.exp(-0.5 * ((layers - centre) / width) ** 2)
    if rng.random() < 0.5:  # from one layer on: what moves a step
        bump = (layers >= centre).astype(float)
    return from_scores(budget, logits + strength * rng.normal() * bump, first_layer)


def blend(budget: Budget, one: Schedule, two: Schedule, share: float, first_layer: int = 0) -> Schedule:
    """A schedule between two: ``share`` of the first one's logits, the rest the second one's, and the budget
    spent again."""
    first, second = (_logits(budget, schedule, first_layer) for schedule in (one, two))
    return from_scores(budget, share * first + (1 - share) * second, first_layer)


def _logits(budget: Budget, schedule: Schedule, first_layer: int) -> NDArray[np.float64]:
    """Of the rates from ``first_layer`` on, those of 0 and 1 taken for a quarter of a token less extreme."""
    edge = 0.25 / budget.n_vision
    rates = np.clip(schedule.keep_rates[first_layer:], edge, 1 - edge)
    logits: NDArray[np.float64] = np.log(rates / (1 - rates))
    return logits


def bend(budget: Budget, schedule: Schedule, layer: int) -> Schedule:
    """A schedule whose rates from ``layer`` on are all moved by one number, in logits, so that the budget is
    spent as far as the rates above allow.

    Raises:
        ThinsightError: the layers above alone cost more.
    """
    head = schedule.keep_rates[:layer]
    limit = head[-1] if head else 1.0
    logits = _logits(budget, schedule, layer)

    def curve(shift: float) -> Schedule:
        return Schedule([*head, *(min(limit, logistic(x + shift)) for x in logits)])

    reach = _FURTHEST + float(np.abs(logits).max(initial=0.0))
    lowest = Schedule([*head, *[0.0] * len(logits)])
    refuse_unreachable(budget, lowest, f"the layers above {layer}")
    start = fit(budget, curve, -reach, reach) if budget.holds(curve(-reach)) else lowest
    return fill(budget, start, layer)


def _with_head(rates: Sequence[float], first_layer: int) -> Schedule:
    falling = np.minimum.accumulate([1.0] * first_layer + list(rates[first_layer:]))
    return Schedule([float(rate) for rate in np.clip(falling, 0.0, 1.0)])
