"""Ranker: CDPruner, diverse tokens among those that the instruction is about."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from .base import STATES, Context, Ranker, register
from .images import STATES_OF_TEXT, STATES_OF_TOKENS, Image, in_order, text_of, unit

_LEAST = 1e-6  # the relevance of the least relevant token, after scaling


@register
class CDPruner(Ranker):
    """CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): a determinantal point process conditioned on the
    instruction.

    The kernel is ``diag(r) S diag(r)``: S the cosines between vision tokens, r their relevance, scaled to [0, 1] over
    the image (1e-6 is added, as published). Greedy MAP inference adds at each step the token that adds most volume; its
    order is the ranking, so that the k best are the set of size k.

    Relevance is the mean cosine between a vision token and the instruction's tokens, both as they enter the layer.
    Departures: the paper takes CLIP's text encoder and CLIP's own projection of the patches where the tower has them; a
    decoder's embeddings stand in for both here, for every model alike. The public code turns the sign of CLIP's
    cosines, which run against relevance for patches; ``invert=True`` does so here. A token that adds no volume to
    float64's resolution is ranked behind all that do, by relevance, where the public code would divide by rounding
    errors.
    """

    name = "cdpruner"
    needs = frozenset({STATES})

    def __init__(self, invert: bool = False) -> None:
        if not isinstance(invert, bool):
            raise BadInput(f"invert is {invert!r}; it must be True or False")
        super().__init__(invert=invert)
        self.invert = invert

    def score(self, context: Context) -> Tensor:
        states = self.given(context.states, STATES_OF_TOKENS)
        text_states = self.given(context.text_states, STATES_OF_TEXT)

        def order_of(image: Image) -> Tensor:
            text = unit(text_of(context, image, text_states))  # (queries, hidden)
            tokens = unit(image.pick(states))  # (n, hidden)
            cosine = (tokens @ text.to(tokens.device).T).mean(dim=1)  # (n,)
            return greedy_map(tokens, _scaled(-cosine if self.invert else cosine))

        return in_order(context, order_of)


def _scaled(cosine: Tensor) -> Tensor:
    """Relevance in (0, 1]; all alike where the cosines are."""
    low, high = cosine.aminmax()
    spread = high - low
    return (cosine - low + _LEAST) / spread if spread > _LEAST else torch.ones_like(cosine)


def greedy_map(vectors: Tensor, relevance: Tensor) -> Tensor:
    """The greedy order of a determinantal point process, (n,) int64, of unit vectors (n, hidden) and their relevance
    (n,), above 0."""
    kernel = (relevance[:, None] * (vectors @ vectors.T) * relevance[None, :]).cpu().numpy()  # (n, n)
    left = kernel.diagonal().copy()  # (n,) volume that each token would add; many small steps, hence the CPU
    nothing = 1000 * np.finfo(kernel.dtype).eps
    factors = np.zeros_like(kernel)  # row t: Cholesky factor of the t-th choice
    order: list[int] = []
    while len(order) < len(kernel):
        best = int(left.argmax())
        if left[best] <= nothing:
            break
        step = len(order)
        known = factors[:step, best] @ factors[:step]  # (n,)
        factors[step] = (kernel[best] - known) / np.sqrt(left[best])
        left -= np.square(factors[step])
        order.append(best)
        left[best] = -np.inf  # and stays so
    by_relevance = relevance.argsort(descending=True, stable=True).tolist()
    taken = set(order)
    return torch.tensor(order + [token for token in by_relevance if token not in taken], dtype=torch.long)
