"""Ranker: DART, the tokens that least duplicate a few pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput, whole
from .base import STATES, Context, Ranker, register
from .images import STATES_OF_TEXT, STATES_OF_TOKENS, Image, in_order, text_of, unit


@register
class Dart(Ranker):
    """DART (Wen et al., 2025, arXiv 2502.11494): pivot tokens, and what is least similar to them.

    Pivots are the ``vision_pivots`` vision tokens and ``text_pivots`` text tokens of the largest L1 norm (4 and 4,
    before layer 2, in the public code). Vision pivots are kept; then each pivot keeps the tokens of the lowest cosine
    to it among those not taken.

    Departures: the norm is that of the hidden states that enter the layer, where the paper takes the keys of the layer
    before; the cosine is between the same states, where the public code applies the decoder's last norm first; text is
    the instruction after the last image. The public code lets one pivot after the other take its whole share; here they
    take turns, one token each, so that fewer tokens are a subset of more and the ranking does not depend on how many
    are kept.
    """

    name = "dart"
    needs = frozenset({STATES})

    def __init__(self, vision_pivots: int = 4, text_pivots: int = 4) -> None:
        self.vision_pivots = whole(vision_pivots, "vision_pivots", 0)
        self.text_pivots = whole(text_pivots, "text_pivots", 0)
        if not self.vision_pivots + self.text_pivots:
            raise BadInput("vision_pivots and text_pivots are both 0; there must be a pivot")
        super().__init__(vision_pivots=self.vision_pivots, text_pivots=self.text_pivots)

    def score(self, context: Context) -> Tensor:
        states = self.given(context.states, STATES_OF_TOKENS)
        text_states = self.given(context.text_states, STATES_OF_TEXT)

        def order_of(image: Image) -> Tensor:
            text, tokens = text_of(context, image, text_states), image.pick(states)  # (queries or n, hidden)
            own = _largest(tokens, self.vision_pivots)
            asked = text[_largest(text, self.text_pivots)].to(tokens.device)
            similarity = unit(torch.cat([tokens[own], asked])) @ unit(tokens).T  # (pivots, n)
            return least_duplicated(similarity, own)

        return in_order(context, order_of)


def least_duplicated(similarity: Tensor, first: Tensor) -> Tensor:
    """The tokens of `first`, int64, then each pivot's least similar one in turn: (pivots, n) -> (n,) int64."""
    n = similarity.shape[1]
    order: list[int] = first.tolist()
    taken = set(order)
    if not len(similarity):  # no text to ask for a pivot
        return torch.tensor(order + [token for token in range(n) if token not in taken], dtype=torch.long)
    queues = [iter(queue) for queue in similarity.argsort(dim=1, stable=True).tolist()]
    while len(order) < n:
        for queue in queues:
            token = next((token for token in queue if token not in taken), None)
            if token is not None:
                taken.add(token)
                order.append(token)
    return torch.tensor(order, dtype=torch.long)


def _largest(states: Tensor, count: int) -> Tensor:
    """The `count` of (n, hidden) with the largest L1 norm, largest first: int64."""
    norm = states.detach().float().abs().sum(dim=1)
    return norm.argsort(descending=True, stable=True)[:count]
