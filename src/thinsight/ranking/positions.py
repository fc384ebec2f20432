"""Rankers that go by a token's place alone: a random order, an even spread, a lower resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import whole
from .base import STATES, Context, Ranker, register
from .images import STATES_OF_TOKENS, average_into, images

_SEEDS = 2**31
_SIZES = 2**32  # above any number of tokens
_SIGMA = 1.5  # in tokens, Ulichney's value
_MIRROR = 0.4  # at 0 the border is taken too early, at 1 too late


@register
class Random(Ranker):
    """A random permutation of each image's tokens.

    Drawn from `seed`, the image's place in the prompt and its size. The order is the same at every layer (so kept sets
    are nested) and for every prompt of one shape (so a prompt's answer does not depend on what it is batched with).
    Vary `seed` to average over draws.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = whole(seed, "seed", 0, _SEEDS - 1)
        super().__init__(seed=self.seed)

    def score(self, context: Context) -> Tensor:
        # pairs as one number each, which sort much faster
        pairs = context.image * _SIZES + context.size
        return _looked_up(context, pairs, lambda pair: _permutation(self.seed, *divmod(pair, _SIZES)))


@register
class Uniform(Ranker):
    """A blue-noise order of the image's token grid: any number of leading tokens is spread evenly.

    Each token in turn fills the largest void, as in void-and-cluster dithering (Ulichney 1993): the least sum of
    Gaussians around the tokens taken already and around all mirror images at the borders. The order is fixed, so fewer
    tokens are always a subset of more. An image's grid is taken as the rows x columns nearest to a square that hold its
    tokens exactly; if that is longer than 4 : 1 (no true grid), tokens are spread along their sequence.
    """

    name = "uniform"

    def score(self, context: Context) -> Tensor:
        return _looked_up(context, context.size, _spread)


@register
class Downsample(Uniform):
    """The image at a lower resolution: a coarser grid, whose tokens are means of their cells.

    The `uniform` ranker says which tokens stay, so that any number of them can be kept; each takes the mean of all
    tokens that lie nearer to it than to any other one kept (the earlier one where two are equally near), on the same
    grid. What is averaged are the projector's outputs: pixels are not resized and the vision tower runs at full
    resolution, so this is what pooling its features keeps of an image, not what a smaller picture would give, and it
    saves nothing in the tower.
    """

    name = "downsample"
    needs = frozenset({STATES})

    def merge(self, context: Context, kept: Tensor) -> Tensor | None:
        states = self.given(context.states, STATES_OF_TOKENS)
        merged = states.clone()
        for image in images(context):
            chosen = image.pick(kept)  # (n,) bool
            if not chosen.any():
                continue
            target = nearest_kept(image.pick(context.index), chosen, image.size).to(states.device)
            merged[image.row, image.places.to(states.device)] = average_into(image.pick(states), target)
        return merged


def _looked_up(context: Context, key: Tensor, table: Callable[[int], Tensor]) -> Tensor:
    """Scores (batch, tokens): each token's place in the table, (size,) float32, of its key, (batch, tokens) int64."""
    scores = torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)
    for each in torch.unique(key[context.valid]).tolist():
        values = table(each).to(scores.device)
        here = context.valid & (key == each)
        scores = torch.where(here, values[context.index.clamp(max=len(values) - 1)], scores)
    return scores


@lru_cache(maxsize=64)
def _permutation(seed: int, image: int, size: int) -> Tensor:
    """(size,) float32: the numbers 0..size-1 in a random order."""
    generator = torch.Generator().manual_seed(seed + _SEEDS * image)
    return torch.randperm(size, generator=generator).to(torch.float32)


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of an image of `size` tokens, as far as its size tells."""
    rows = max(r for r in range(1, math.isqrt(size) + 1) if size % r == 0)
    return (rows, size // rows) if size <= 4 * rows * rows else (1, size)


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


def nearest_kept(index: Tensor, kept: Tensor, size: int) -> Tensor:
    """The kept token, of 0..n-1, that is nearest to each: (n,) int64. Their places `index` (n,) int64 are on the grid
    of an image of `size` tokens; `kept` (n,) bool has at least one True."""
    _, columns = grid(size)
    place = torch.stack([index // columns, index % columns], dim=1)  # (n, 2)
    chosen = kept.nonzero().flatten()
    offset = place[:, None] - place[chosen][None]  # (n, kept, 2)
    return chosen[offset.square().sum(dim=2).argmin(dim=1)]
