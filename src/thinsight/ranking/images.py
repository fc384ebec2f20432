"""What rankers that compare an image's tokens with each other share: one image at a time, and token averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadInput
from ..schedule import Schedule, real
from .base import Context

STATES_OF_TOKENS = "hidden states of the vision tokens; supply Context.states"
STATES_OF_TEXT = "hidden states of the text; supply Context.text_states"
TOWER = "attention of the vision tower; supply vision_attention"


@dataclass(frozen=True)
class Image:
    """The tokens of one image that are still there, n of them, in the order of the prompt."""

    row: int  # of the batch
    places: Tensor  # (n,) int64, columns of the context's tensors
    size: int  # N, its tokens at first

    def pick(self, values: Tensor) -> Tensor:
        """This image's part of (batch, tokens, ...): (n, ...)."""
        return values[self.row, self.places.to(values.device)]


def images(context: Context) -> Iterator[Image]:
    """Each image of which any token is left, one by one: ranked to the bit alike whatever else is in its batch."""
    for row in range(context.valid.shape[0]):
        places = context.valid[row].nonzero().flatten()
        number = context.image[row, places]
        for image in torch.unique(number).tolist():
            own = places[number == image]
            yield Image(row, own, int(context.size[row, own[0]]))


def in_order(context: Context, order_of: Callable[[Image], Tensor]) -> Tensor:
    """Scores, (batch, tokens) float32, under which each image's tokens come in an order: minus the turn, so that images
    which compete (``per="prompt"``) get equal shares. ``order_of``: an image's tokens, (n,) int64, best first."""
    scores = torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)
    for image in images(context):
        order = order_of(image)
        turns = torch.arange(len(order), dtype=torch.float32, device=scores.device)
        scores[image.row, image.places[order.to(scores.device)]] = -turns
    return scores


def text_of(context: Context, image: Image, states: Tensor) -> Tensor:
    """The hidden states of the real text tokens that rank an image: (queries, hidden)."""
    if context.queries is None:
        raise BadInput("hidden states of the text come with Context.queries, which says which are real; supply it")
    return states[image.row, context.queries[image.row].to(states.device)]


def unit(states: Tensor) -> Tensor:
    """Rows of (..., hidden) at length 1, so that products are cosines; zeros stay zeros. float64 where the device has
    it."""
    exact = torch.float32 if states.device.type == "mps" else torch.float64
    return functional.normalize(states.detach().to(exact), dim=-1)


def average_into(states: Tensor, target: Tensor) -> Tensor:
    """Each token's mean over all tokens that go into it: states (n, hidden), and the token, (n,) int64, that each goes
    into (its own number where it stays itself) -> (n, hidden), zeros at tokens into which none goes."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    total = torch.zeros_like(wide).index_add(0, target, wide)
    count = torch.bincount(target, minlength=len(target)).clamp(min=1)
    return (total / count[:, None]).to(states.dtype)


def share(value: Any, field: str) -> float:
    """A setting in [0, 1]."""
    found = real(value)
    if not 0 <= found <= 1:
        raise BadInput(f"{field} is {value!r}; it must be a number from 0 to 1")
    return found


def count_of(rate: float, image: Image) -> int:
    """How many of an image's tokens that are left a keep rate stands for, as in a schedule."""
    return min(Schedule([rate]).counts(image.size)[0], len(image.places))
