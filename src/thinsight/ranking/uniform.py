"""Ranker: tokens spread evenly over the image, coarse grid first.

Knows nothing about the image's content or the text.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .base import Context, Ranker, register

_SIGMA = 1.5  # in tokens, Ulichney's value
_MIRROR = 0.4  # at 0 the border is taken too early, at 1 too late


@register
class Uniform(Ranker):
    """A blue-noise order of the image's token grid: any number of leading tokens is spread evenly.

    Each token in turn fills the largest void, as in void-and-cluster dithering (Ulichney 1993): the least sum
    of Gaussians around the tokens taken already and around all mirror images at the borders. The order is
    fixed, so fewer tokens are always a subset of more. An image's grid is taken as the rows x columns nearest
    to a square that hold its tokens exactly; if that is longer than 4 : 1 (no true grid), tokens are spread
    along their sequence.
    """

    name = "uniform"

    def score(self, context: Context) -> Tensor:
        scores = torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)
        for size in torch.unique(context.size[context.valid]).tolist():
            order = _spread(size).to(scores.device)
            here = context.valid & (context.size == size)
            scores = torch.where(here, order[context.index.clamp(max=size - 1)], scores)
        return scores


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of an image of `size` tokens, as far as its size tells."""
    rows = max(r for r in range(1, math.isqrt(size) + 1) if size % r == 0)
    if size > 4 * rows * rows:
        rows = 1
    return rows, size // rows


@lru_cache(maxsize=64)
def _spread(size: int) -> Tensor:
    """(size,) float32: minus the turn at which each token is taken."""
    rows, columns = grid(size)
    down, along = _pull(rows), _pull(columns)  # (rows, rows), (columns, columns)
    # at first a token feels its own mirror images only, which draws the first choice to the middle
    filled = torch.outer(down.diagonal(), along.diagonal())  # (rows, columns)
    turns = torch.zeros(size)
    for turn in range(size):
        cell = int(filled.argmin())
        turns[cell] = turn
        filled += torch.outer(down[cell // columns], along[cell % columns])
        filled[cell // columns, cell % columns] = math.inf
    return -turns


def _pull(length: int) -> Tensor:
    """(length, length) float64: the Gaussian between places of one axis, mirrored at both ends."""
    place = torch.arange(length, dtype=torch.float64)
    pull = torch.zeros(length, length, dtype=torch.float64)
    for image, weight in ((place, 1.0), (-1 - place, _MIRROR), (2 * length - 1 - place, _MIRROR)):
        pull += weight * torch.exp(-((place[:, None] - image[None, :]) ** 2) / (2 * _SIGMA**2))
    return pull
