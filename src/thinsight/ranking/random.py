"""Ranker: a random order, the yardstick that every other ranker must beat.

Knows nothing about the image or the text.
"""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor

from ..errors import BadInput
from .base import Context, Ranker, register

_SEEDS = 2**31
_SIZES = 2**32  # above any number of tokens


@register
class Random(Ranker):
    """A random permutation of each image's tokens.

    Drawn from `seed`, the image's place in the prompt and its size. The order is the same at every layer (so
    kept sets are nested) and for every prompt of one shape (so a prompt's answer does not depend on what it
    is batched with). Vary `seed` to average over draws.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < _SEEDS:
            raise BadInput(f"seed is {seed!r}; it must be a whole number from 0 to {_SEEDS - 1}")
        self.seed: int = int(seed)
        super().__init__(seed=self.seed)

    def score(self, context: Context) -> Tensor:
        scores = torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)
        both = context.image * _SIZES + context.size  # pairs as one number each, which sort much faster
        for image, size in (divmod(pair, _SIZES) for pair in torch.unique(both[context.valid]).tolist()):
            drawn = _permutation(self.seed, image, size).to(scores.device)
            here = context.valid & (context.image == image) & (context.size == size)
            scores = torch.where(here, drawn[context.index.clamp(max=size - 1)], scores)
        return scores


@lru_cache(maxsize=64)
def _permutation(seed: int, image: int, size: int) -> Tensor:
    """(size,) float32: the numbers 0..size-1 in a random order."""
    generator = torch.Generator().manual_seed(seed + _SEEDS * image)
    return torch.randperm(size, generator=generator).to(torch.float32)
