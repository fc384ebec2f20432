"""Where one picture lies among a prompt's vision tokens: which tokens, in what grid, and what the model saw.

Of an image that is cut into tiles the whole view is taken: LLaVA-NeXT, LLaVA-OneVision and Ovis2 put it
first, InternVL, Idefics3, SmolVLM, Aya Vision and Cohere2 Vision last. Knows nothing about reductions or
drawing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..errors import Unsupported
from ..evaluation.examples import Example
from ..evaluation.images import open_image

__all__ = ["Grid", "grid_of"]

_ANY_RESOLUTION = frozenset({"llava_next", "llava_next_video", "llava_onevision"})  # tiles without padding
_OVERVIEW_FIRST = frozenset({"ovis2"})
_OVERVIEW_LAST = frozenset({"aya_vision", "cohere2_vision", "idefics3", "internvl", "smolvlm"})
_RESAMPLED = frozenset({"idefics2"})  # each token has looked at the whole image


@dataclass(frozen=True)
class Grid:
    """A picture and its vision tokens, numbered from ``first`` in reading order."""

    image: Image.Image
    rows: int
    columns: int
    first: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.columns

    def inside(self, tokens: list[int]) -> tuple[int, ...]:
        """Those of a prompt's vision tokens that belong to the picture, as numbers within the grid."""
        last = self.first + self.rows * self.columns
        return tuple(token - self.first for token in tokens if self.first <= token < last)


def grid_of(model: Any, processor: Any, example: Example, inputs: Mapping[str, Any], n_vision: int) -> Grid:
    """The grid of an example's first image.

    Args:
        model: the loaded model.
        processor: its processor, which made ``inputs`` of this one example.
        example: what is asked.
        inputs: the processor's output.
        n_vision: vision tokens of the prompt.

    Raises:
        ThinsightError: the tokens form no grid that can be laid over a picture.
    """
    vision = model.config.vision_config
    if model.config.model_type in _RESAMPLED:
        raise _no_grid(f"the {n_vision} vision tokens, which are resampled from all of an image,")
    if inputs.get("image_grid_thw") is not None:
        merge = vision.spatial_merge_size
        _, rows, columns = (int(side) for side in inputs["image_grid_thw"][0])
        found = Grid(open_image(example.images[0]), rows // merge, columns // merge)
    elif vision.model_type == "pixtral":
        found = _pixtral(model, processor, inputs)
    else:
        found = _tile(model, processor, len(example.images), inputs, n_vision)
    if found.first + found.rows * found.columns > n_vision:
        raise _no_grid(f"{n_vision} vision tokens are fewer than a grid of {found.rows} x {found.columns}")
    return found


def _pixtral(model: Any, processor: Any, inputs: Mapping[str, Any]) -> Grid:
    """An image of any size, padded to the largest of its batch."""
    height, width = (int(side) for side in inputs["image_sizes"][0])
    cell = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    pixels = inputs["pixel_values"][0, :, :height, :width]
    return Grid(_as_seen(processor, pixels), height // cell, width // cell)


def _tile(model: Any, processor: Any, images: int, inputs: Mapping[str, Any], n_vision: int) -> Grid:
    """A tile of fixed size: the image itself, or its whole view."""
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))  # (..., tiles, 3, height, width)
    if pixels is None:
        raise _no_grid(f"{n_vision} vision tokens of something other than images")
    family = model.config.model_type
    patch = _side(model.config.vision_config.patch_size)
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if family in _ANY_RESOLUTION:
        return Grid(_as_seen(processor, pixels.flatten(0, -4)[0]), rows, columns)
    tiles = pixels.flatten(0, -4)
    tokens, rest = divmod(n_vision, len(tiles))
    block = math.isqrt(rows * columns // tokens) if tokens else 0
    if rest or not block or tokens * block**2 != rows * columns or rows % block or columns % block:
        raise _no_grid(
            f"{n_vision} vision tokens of {len(tiles)} images or tiles of {rows} x {columns} patches"
        )
    if len(tiles) == images or (images == 1 and family in _OVERVIEW_FIRST):
        shown = 0
    elif images == 1 and family in _OVERVIEW_LAST:
        shown = len(tiles) - 1
    else:
        raise _no_grid(f"{images} images are cut into {len(tiles)} tiles")
    return Grid(_as_seen(processor, tiles[shown]), rows // block, columns // block, shown * tokens)


def _no_grid(what: str) -> Unsupported:
    return Unsupported(f"{what} form no grid that could be drawn over one picture; show another example")


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _as_seen(processor: Any, pixels: torch.Tensor) -> Image.Image:
    """The image after the processor's crop and resize; ``pixels`` (channels, height, width), normalized."""
    settings = processor.image_processor
    # without either the pixels are not normalized
    mean = torch.tensor(getattr(settings, "image_mean", None) or [0.0] * 3)[:, None, None]
    std = torch.tensor(getattr(settings, "image_std", None) or [1.0] * 3)[:, None, None]
    unit = (pixels.float().cpu() * std + mean).clamp(0, 1)  # (channels, height, width) in [0, 1]
    return Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
