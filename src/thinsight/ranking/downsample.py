"""Ranker: image downsampling, tokens spread evenly over the image, each the mean of the area around it.

Knows nothing about the image's content or the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STATES, Context, register
from .images import average_into, image_states, images
from .uniform import Uniform, grid


@register
class Downsample(Uniform):
    """The image at a lower resolution: a coarser grid, whose tokens are means of their cells.

    The `uniform` ranker says which tokens stay, so that any number of them can be kept; each takes the mean
    of all tokens that lie nearer to it than to any other one kept (the earlier one where two are equally
    near), on the same grid. What is averaged are the projector's outputs: pixels are not resized and the
    vision tower runs at full resolution, so this is what pooling its features keeps of an image, not what a
    smaller picture would give, and it saves nothing in the tower.
    """

    name = "downsample"
    needs = frozenset({STATES})

    def merge(self, context: Context, kept: Tensor) -> Tensor | None:
        states = image_states(context, self.name)
        merged = states.clone()
        for image in images(context):
            chosen = image.pick(kept)  # (n,) bool
            if not chosen.any():
                continue
            size = int(context.size[image.row, image.places[0]])
            target = nearest_kept(image.pick(context.index), chosen, size).to(states.device)
            merged[image.row, image.places.to(states.device)] = average_into(image.pick(states), target)
        return merged


def nearest_kept(index: Tensor, kept: Tensor, size: int) -> Tensor:
    """The kept token that is nearest to each token on the image's grid.

    Args:
        index: (n,) int64, places on the grid of an image of `size` tokens.
        kept: (n,) bool, at least one True.

    Returns:
        (n,) int64, numbers 0..n-1.
    """
    _, columns = grid(size)
    place = torch.stack([index // columns, index % columns], dim=1)  # (n, 2)
    chosen = kept.nonzero().flatten()
    offset = place[:, None] - place[chosen][None]  # (n, kept, 2)
    return chosen[offset.square().sum(dim=2).argmin(dim=1)]
