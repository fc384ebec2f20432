"""Ranker: VisPruner, half by the tower's attention, half by removing duplicates from the rest; nothing of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STATES, VISION_ATTENTION, Context, Ranker, register
from .images import STATES_OF_TOKENS, TOWER, Image, count_of, in_order, share, unit

_AT_ONCE = 8  # tokens removed per round, as published


@register
class VisPruner(Ranker):
    """VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818; its first version is FasterVLM, which is the
    vision-attention ranker): important tokens, then diverse ones.

    Of the T tokens kept, ``int(T * important)`` are those that receive most attention from the tower's CLS token. The
    rest come from the other tokens, in the order of their attention: every second one is compared with the ones
    between, and the up to 8 that are most similar (cosine) to any of them are removed, until T are left in all.

    How many are important depends on T, so the ranker has to be told: ``keep`` is T / N, the keep rate of the
    reduction. Another number of tokens may be kept by its order all the same: important ones first, then the diverse
    ones that survived longest. Departures: similarity is between the projector's outputs, where the paper compares what
    goes into the projector; a tower without CLS token is read by the average token.
    """

    name = "vispruner"
    needs = frozenset({STATES, VISION_ATTENTION})

    def __init__(self, keep: float = 0.25, important: float = 0.5) -> None:
        self.keep, self.important = share(keep, "keep"), share(important, "important")
        super().__init__(keep=self.keep, important=self.important)

    def score(self, context: Context) -> Tensor:
        states = self.given(context.states, STATES_OF_TOKENS)
        received = self.given(context.vision_attention, TOWER)

        def order_of(image: Image) -> Tensor:
            ranked = image.pick(received).argsort(descending=True, stable=True)  # (n,)
            wanted = count_of(self.keep, image)
            important = int(wanted * self.important + 1e-9)
            tokens = unit(image.pick(states))  # (n, hidden)
            rest = distinct_last(tokens, ranked[important:].to(tokens.device), wanted - important)
            return torch.cat([ranked[:important].cpu(), rest])

        return in_order(context, order_of)


def distinct_last(vectors: Tensor, given: Tensor, wanted: int) -> Tensor:
    """The tokens `given`, (m,) int64, most important first, of unit vectors (n, hidden): the `wanted` survivors of the
    removal of duplicates, then the removed ones, last removed first."""
    left, removed = given, []
    while len(left) > max(wanted, 1):
        even, odd = left[::2], left[1::2]
        duplicate = (vectors[even] @ vectors[odd].T).amax(dim=1)  # (even,)
        worst = duplicate.argsort(descending=True, stable=True)
        many = min(_AT_ONCE, len(left) - wanted, len(even))
        removed.append(even[worst[:many]])
        left = torch.cat([even[worst[many:]], odd])
    place = {token: turn for turn, token in enumerate(given.tolist())}
    survivors = sorted(left.tolist(), key=place.__getitem__)
    gone = [token for some in reversed(removed) for token in reversed(some.tolist())]
    return torch.tensor(survivors + gone, dtype=torch.long)
