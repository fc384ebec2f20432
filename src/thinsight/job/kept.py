"""Looks at one question: which vision tokens it keeps in which layer, and what both models answer.

Runs the model and gives plain pictures. Knows nothing about drawing, scores or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ThinsightError
from ..evaluation.encoding import prompt_text
from ..evaluation.examples import Example, open_image
from ..reduction import Reduction
from ..report.data import Picture
from ..runtime import Handle, apply, vision_token_mask

__all__ = ["picture_of", "spread", "varied"]


@torch.inference_mode()
def picture_of(
    model: Any,
    processor: Any,
    example: Example,
    reduction: Reduction,
    *,
    max_new_tokens: int = 32,
    most_layers: int = 7,
) -> Picture:
    """The kept tokens of the example's (first) image at the layers where tokens are dropped, and both greedy
    answers.

    Args:
        model: the loaded model, without a reduction in force.
        processor: its processor.
        example: the question.
        reduction: what decides which tokens are kept.
        max_new_tokens: longest answer.
        most_layers: show at most so many layers, evenly chosen among those where tokens are dropped.

    Raises:
        ThinsightError: a prompt without an image, or an image whose tokens are no grid of the vision tower's
            patches.
    """
    if not example.images:
        raise ThinsightError(f"example {example.id!r} has no image: there are no vision tokens to show")
    images = [open_image(image) for image in example.images]
    inputs = processor(text=[prompt_text(processor, example)], images=images, return_tensors="pt").to(
        model.device
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    n_vision = int(vision_token_mask(model, inputs["input_ids"]).sum())
    grid = _grid(model, inputs["pixel_values"], n_vision, len(images))
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    full = model.generate(**inputs, **options)  # (1, prompt + answer)
    layers = _layers(reduction, n_vision, most_layers)
    with apply(model, reduction) as handle:
        reduced = model.generate(**inputs, **options)
        kept = [_kept(handle, layer, n_vision) for layer in layers]
    length = inputs["input_ids"].shape[1]
    return Picture(
        image=_as_seen(processor, inputs["pixel_values"][0]),
        grid=grid,
        kept=tuple(tuple(i for i in indices if i < grid[0] * grid[1]) for indices in kept),
        layers=tuple(layers),
        question=example.question,
        answer_full=_text(processor, full[0, length:]),
        answer_reduced=_text(processor, reduced[0, length:]),
        truth=example.answers[0] if example.answers else "",
    )


def varied(examples: Sequence[Example], count: int) -> list[Example]:
    """One example of every task in turn, each on another image, the first ones of the file: no picking by
    result."""
    waiting: dict[str | None, list[Example]] = {}
    for example in examples:
        waiting.setdefault(example.task, []).append(example)
    chosen: list[Example] = []
    shown: set[str] = set()
    while any(waiting.values()):
        for group in waiting.values():
            group[:] = [example for example in group if example.group not in shown]
            if group and len(chosen) < count:
                shown.add(group[0].group)
                chosen.append(group[0])
        if len(chosen) == count:
            break
    return chosen


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, most).round().astype(int)
    return [values[place] for place in places]


def _kept(handle: Handle, layer: int, n_vision: int) -> list[int]:
    """Indices of the vision tokens that entered a layer; a full schedule records none because it drops
    none."""
    return list(range(n_vision)) if handle.schedule.is_full else handle.kept(layer)[0].tolist()


def _layers(reduction: Reduction, n_vision: int, most: int) -> list[int]:
    dropping = sorted(reduction.schedule.reductions(n_vision))
    return spread(dropping, most) if dropping else [reduction.schedule.num_layers - 1]


def _grid(model: Any, pixels: torch.Tensor, n_vision: int, images: int) -> tuple[int, int]:
    """(rows, columns) of one image's vision tokens; ``pixels`` (images, channels, height, width)."""
    patch = model.config.vision_config.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if rows * columns * images != n_vision:
        raise ThinsightError(
            f"{n_vision} vision tokens of {images} images are no grid of {rows} x {columns} patches: "
            "pictures need one token per patch"
        )
    return rows, columns


def _as_seen(processor: Any, pixels: torch.Tensor) -> Image.Image:
    """The image after the processor's crop and resize; ``pixels`` (channels, height, width), normalized."""
    settings = processor.image_processor
    mean = torch.tensor(settings.image_mean)[:, None, None]
    std = torch.tensor(settings.image_std)[:, None, None]
    unit = (pixels.float().cpu() * std + mean).clamp(0, 1)  # (channels, height, width) in [0, 1]
    return Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _text(processor: Any, tokens: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
