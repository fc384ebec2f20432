"""Looks at one question: which vision tokens it keeps in which layer, and what both models answer.

Runs the model and gives plain pictures. Knows nothing about drawing, scores or files.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import BadInput
from ..evaluation.examples import Example
from ..evaluation.prompts import PromptReader, check_length, process
from ..reduction import Reduction
from ..report.data import Picture
from ..runtime import Handle, apply, vision_token_mask
from ..timing import on_device
from .grid import grid_of

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
    reader: PromptReader | None = None,
) -> Picture:
    """The kept tokens of the example's (first) image at the layers where tokens are dropped, and both greedy
    answers.

    Args:
        model: the loaded model, without a reduction in force.
        processor: its processor.
        example: the question.
        reduction: what decides which tokens are kept.
        max_new_tokens: longest answer.
        reader: what has read the example for this model, or None.
        most_layers: show at most so many layers, evenly chosen among those where tokens are dropped.

    Raises:
        ThinsightError: a prompt without an image, or an image whose tokens form no grid.
    """
    if not example.images:
        raise BadInput(f"example {example.id!r} has no image: there are no vision tokens to show")
    read = process(processor, [example]) if reader is None else reader.batch([example])
    inputs = on_device(model, read)
    if too_long := check_length(model, example, inputs["input_ids"].shape[1]):
        warnings.warn(too_long, stacklevel=2)
    n_vision = int(vision_token_mask(model, inputs["input_ids"]).sum())
    grid = grid_of(model, processor, example, inputs, n_vision)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    full = model.generate(**inputs, **options)  # (1, prompt + answer)
    layers = _layers(reduction, n_vision, most_layers)
    with apply(model, reduction) as handle:
        reduced = model.generate(**inputs, **options)
        kept = [_kept(handle, layer, n_vision) for layer in layers]
    length = inputs["input_ids"].shape[1]
    return Picture(
        image=grid.image,
        grid=grid.size,
        kept=tuple(grid.inside(indices) for indices in kept),
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


def _text(processor: Any, tokens: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
