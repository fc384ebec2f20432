"""When each band of ranked tokens may leave: an additive model of the loss, and the best schedules by it.

The tokens of a prompt, ranked, are cut into bands; a schedule is the layer at which each band leaves, the
lowest-ranked first. What it costs the answers to take a band out at a layer is read off step schedules
(``all tokens until layer l, the share q from there on``): the loss of one step less that of the next smaller
one is the band between. Losses are taken to add up, so the best schedule for any budget is found by dynamic
programming. Knows nothing about models, evaluators or how the losses were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..budget import Budget, fill, fit
from ..schedule import Schedule

__all__ = ["ExitModel", "grid"]

_LIGHT, _HEAVY, _HALVINGS = 1e-9, 1e6, 60  # prices between which the right one lies


def grid(num_layers: int, first_layer: int, layers: int = 5) -> tuple[list[int], list[float]]:
    """Layers and rates of the steps to measure: evenly spread layers, rates from a half down to nothing."""
    depth = np.linspace(first_layer, num_layers - 1, min(layers, num_layers - first_layer))
    return sorted({round(float(each)) for each in depth}), [0.5, 0.25, 0.125, 0.03, 0.0]


@dataclass(frozen=True)
class ExitModel:
    """Losses of steps, in any unit that adds up.

    Attributes:
        num_layers: L.
        first_layer: layers before it keep all.
        layers: the layers that were measured, rising.
        rates: the rates that were measured, falling, each below 1.
        losses: (layers, rates), the loss of the step at that layer to that rate.
    """

    num_layers: int
    first_layer: int
    layers: tuple[int, ...]
    rates: tuple[float, ...]
    losses: NDArray[np.float64]

    def band_losses(self) -> NDArray[np.float64]:
        """(bands, exits): what taking each band out at each layer loses, best-ranked band last.

        Exits are the layers from the first one on, and at last L: never. Made monotone: a later exit never
        loses more, and no band's loss is below 0.
        """
        steps = np.maximum.accumulate(np.clip(self.losses, 0.0, None), axis=1)  # fewer tokens, more loss
        steps = np.maximum.accumulate(steps[::-1], axis=0)[::-1]  # earlier, more loss
        exits = np.arange(self.first_layer, self.num_layers + 1)
        known = [*self.layers, self.num_layers]
        everywhere = np.stack(
            [np.interp(exits, known, [*column, 0.0]) for column in steps.T]
        )  # (rates, exits)
        bands = np.diff(everywhere, axis=0, prepend=0.0)
        return np.maximum.accumulate(np.clip(bands, 0.0, None)[:, ::-1], axis=1)[:, ::-1]

    def schedule(self, budget: Budget) -> Schedule:
        """The schedule that loses least within a budget, which is spent to the last token."""
        light, heavy = _LIGHT, _HEAVY
        for _ in range(_HALVINGS):
            price = float(np.sqrt(light * heavy))
            light, heavy = (light, price) if budget.holds(self._best(price)) else (price, heavy)
        cheap, dear = self._best(heavy).keep_rates, self._best(light).keep_rates

        def between(share: float) -> Schedule:
            return Schedule([(1 - share) * low + share * high for low, high in zip(cheap, dear, strict=True)])

        return fill(budget, fit(budget, between, 0.0, 1.0, "the exit model"), self.first_layer)

    def _best(self, price: float) -> Schedule:
        """Least ``loss + price x tokens kept``, by dynamic programming from the worst band to the best."""
        losses, exits = self.band_losses(), np.arange(self.first_layer, self.num_layers + 1)
        widths = -np.diff([1.0, *self.rates])  # of each band, in shares of the tokens
        least: NDArray[np.float64] = np.zeros(len(exits))
        came: list[NDArray[np.intp]] = []
        # bands in the order in which they leave: the lowest-ranked, which the highest rate lacks, first
        for band, width in zip(losses, widths, strict=True):
            before = np.minimum.accumulate(least)  # of bands that left at this exit or earlier
            came.append(_first_least(least))
            least = before + band + price * width * exits
        left = self._trace(least, came)
        return Schedule(self._rates(left))

    @staticmethod
    def _trace(least: NDArray[np.float64], came: list[NDArray[np.intp]]) -> list[int]:
        place = int(np.argmin(least))
        places = [place]
        for before in reversed(came[1:]):
            place = int(before[place])
            places.append(place)
        return places[::-1]

    def _rates(self, places: Sequence[int]) -> list[float]:
        """Keep rates of the schedule whose bands leave at these exits."""
        rates = np.ones(self.num_layers)
        for place, rate in zip(places, self.rates, strict=True):
            rates[self.first_layer + place :] = rate
        return [float(rate) for rate in rates]


def _first_least(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each place, where the least value up to it is."""
    best, places = 0, []
    for place, value in enumerate(values):
        if value < values[best]:
            best = place
        places.append(best)
    return np.array(places)
