"""How many vision tokens of each image enter each layer, and whether so many fewer that they are ranked anew.

Keep rates made counts. Knows nothing about which tokens are kept, nor about models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..schedule import Schedule
from .layout import Layout
from .passes import Pass

if TYPE_CHECKING:
    from ..adaptive import Adaptive

__all__ = ["Quotas"]


class Quotas:
    """The counts of a reduction.

    Args:
        schedule: of an adaptive reduction: the mean, which falls wherever one of them does.
        adaptive: the schedules that a pass's levels number, if there are several.
        per: "image" or "prompt", what the keep rate holds for.
        rerank: as for `apply`.
    """

    def __init__(self, schedule: Schedule, adaptive: Adaptive | None, per: str, rerank: bool | float) -> None:
        rates = schedule.keep_rates
        # a stage is a run of layers with one keep rate below 1
        self.starts = [i for i, rate in enumerate(rates) if rate < (rates[i - 1] if i else 1.0)]
        self._schedules = (schedule,) if adaptive is None else adaptive.schedules
        self._counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._per = per
        self._share = float(rerank)  # True is 1: a row that falls gets less than ever; False is 0

    def groups(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the sets of tokens that compete: each image, or the whole prompt."""
        return sizes if self._per == "image" else (sum(sizes),)

    def group_of(self, layout: Layout) -> Tensor:
        """The group of each token, (batch, tokens) int64."""
        return layout.image if self._per == "image" else torch.zeros_like(layout.image)

    def count(self, n: int, layer: int, level: int = 0) -> int:
        """How many of a group's n tokens enter a layer."""
        if (n, level) not in self._counts:
            self._counts[n, level] = self._schedules[level].counts(n)
        return self._counts[n, level][layer]

    def rows(self, run: Pass, layer: int) -> list[tuple[int, ...]]:
        """Per row, how many tokens of each group enter a layer; -1: the pass."""
        known = run.counts.get(layer)
        if known is None:
            known = run.counts[layer] = self._rows(run, layer)
        return known

    def _rows(self, run: Pass, layer: int) -> list[tuple[int, ...]]:
        groups = [self.groups(sizes) for sizes in run.call.layout.sizes]
        if layer < 0:
            return groups
        rows = zip(groups, run.levels, strict=True)
        return [tuple(self.count(n, layer, level) for n in sizes) for sizes, level in rows]

    def falls(self, run: Pass, layer: int) -> bool:
        """Whether any group has fewer tokens in this layer than in the one before."""
        return self.rows(run, layer) != self.rows(run, layer - 1)

    def ranking(self, run: Pass, layer: int) -> list[bool]:
        """Which rows rank anew before this layer. Each row decides by its own counts, so that a prompt is
        ranked alike alone and in a batch."""
        rows = zip(self.rows(run, layer), self.rows(run, layer - 1), run.ranked, strict=True)
        share = self._share
        return [now != before and (last is None or sum(now) < share * last) for now, before, last in rows]

    def of_tokens(self, run: Pass, layer: int) -> tuple[Tensor, Tensor]:
        """The group of each token and how many its group may keep, (batch, tokens) int64 both."""
        layout = run.call.layout
        if run.quota is None:
            run.quota = self.of_stages(layout, run.levels)
        group = self.group_of(layout)
        return group, run.quota[self.starts.index(layer)].gather(1, group)

    def of_stages(self, layout: Layout, levels: list[int]) -> Tensor:
        """How many of each group every stage may keep: (stages, batch, groups) int64, 0 where a row has
        fewer groups."""
        rows = [(self.groups(sizes), level) for sizes, level in zip(layout.sizes, levels, strict=True)]
        most = max(1, *(len(groups) for groups, _ in rows))
        counts = [
            [
                [self.count(n, layer, level) for n in groups] + [0] * (most - len(groups))
                for groups, level in rows
            ]
            for layer in self.starts
        ]
        return torch.tensor(counts, device=layout.image.device)
