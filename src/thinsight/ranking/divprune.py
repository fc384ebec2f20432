"""Ranker: DivPrune, the tokens that lie farthest apart; nothing of the text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import STATES, Context, Ranker, register
from .images import STATES_OF_TOKENS, in_order, unit


@register
class DivPrune(Ranker):
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): greedy max-min diversity.

    Distance is 1 - cosine. The first token is the one farthest from its nearest neighbor; each further one is the token
    whose nearest chosen token is farthest away. Before layer 0, as in the paper, the tokens are the projector's output.
    The order of choice is the ranking, so that the k best are the paper's set of size k.

    Departures: a token is never chosen twice (the public code can do so where tokens are equal), and several images of
    a prompt are each thinned by themselves.
    """

    name = "divprune"
    needs = frozenset({STATES})

    def score(self, context: Context) -> Tensor:
        states = self.given(context.states, STATES_OF_TOKENS)
        return in_order(context, lambda image: farthest_first(unit(image.pick(states))))


def farthest_first(vectors: Tensor) -> Tensor:
    """The greedy max-min order of (n, hidden) unit vectors: (n,) int64."""
    distance = (1 - vectors @ vectors.T).cpu().numpy()  # (n, n); many small steps are faster on the CPU
    np.fill_diagonal(distance, np.inf)
    # the first choice looks at every other token; a single one has none
    nearest = distance.min(axis=1, initial=np.inf)  # (n,)
    order: list[int] = []
    for _ in range(len(distance)):
        best = int(nearest.argmax())
        order.append(best)
        nearest = np.minimum(nearest, distance[best]) if len(order) > 1 else distance[best].copy()
        nearest[best] = -np.inf  # and stays so
    return torch.tensor(order, dtype=torch.long)
