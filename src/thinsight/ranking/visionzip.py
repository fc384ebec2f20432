"""Ranker: VisionZip, tokens that the vision tower attends to, and the rest merged into a few; nothing of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STATES, VISION_ATTENTION, Context, Ranker, register
from .images import STATES_OF_TOKENS, TOWER, Image, average_into, count_of, images, in_order, share, unit

CONTEXTUAL = 10 / 64  # the paper's 54 dominant and 10 contextual tokens


@register
class VisionZip(Ranker):
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant and contextual tokens.

    Of the T tokens kept, ``round(T * contextual)`` (10 of 64, the paper's share at 64, 128 and 192 tokens) are
    contextual, the others dominant. Dominant ones receive most attention from the tower's CLS token, or from the
    average token where there is none. Contextual ones are taken at equal steps from what is left; every token that
    remains is merged, by averaging, into the contextual one that it is most similar to (cosine).

    Which ones are contextual depends on T, so the ranker has to be told: ``keep`` is T / N, the keep rate of the
    reduction. Departures: similarity and mean are of the projector's outputs, where the paper compares keys of the
    tower's layer and merges before the projector. The mean includes the contextual token itself, as the paper says; the
    public code adds the mean of the others to it instead. The tower's CLS token, which the public code counts among the
    dominant, does not reach the decoder.
    """

    name = "visionzip"
    needs = frozenset({STATES, VISION_ATTENTION})

    def __init__(self, keep: float = 0.25, contextual: float = CONTEXTUAL) -> None:
        self.keep, self.contextual = share(keep, "keep"), share(contextual, "contextual")
        super().__init__(keep=self.keep, contextual=self.contextual)

    def score(self, context: Context) -> Tensor:
        def order_of(image: Image) -> Tensor:
            ranked = self._ranked(context, image)
            wanted = count_of(self.keep, image)
            sampled = self._sampled(wanted)
            rest = ranked[wanted - sampled :].sort().values  # in the order of the image
            contextual = rest[:: max(1, len(rest) // max(1, sampled))][:sampled]
            chosen = torch.cat([ranked[: wanted - sampled], contextual])
            return torch.cat([chosen, ranked[~torch.isin(ranked, chosen)]])

        return in_order(context, order_of)

    def merge(self, context: Context, kept: Tensor) -> Tensor | None:
        states = self.given(context.states, STATES_OF_TOKENS)
        merged = states
        for image in images(context):
            target = self._target(context, image, states, image.pick(kept))
            if target is not None:
                merged = merged.clone() if merged is states else merged
                merged[image.row, image.places.to(states.device)] = average_into(image.pick(states), target)
        return None if merged is states else merged

    def _target(self, context: Context, image: Image, states: Tensor, kept: Tensor) -> Tensor | None:
        """The token into which each of an image's n goes, (n,) int64; None: all stay themselves."""
        ranked = self._ranked(context, image)
        ranked = ranked[kept.to(ranked.device)[ranked]]
        sampled = ranked[len(ranked) - self._sampled(len(ranked)) :].to(states.device)
        if not len(sampled):
            return None
        tokens = unit(image.pick(states))
        nearest = sampled[(tokens @ tokens[sampled].T).argmax(dim=1)]  # (n,)
        return torch.where(kept.to(states.device), torch.arange(len(tokens), device=states.device), nearest)

    def _ranked(self, context: Context, image: Image) -> Tensor:
        """An image's tokens by the attention that they receive, most first: (n,) int64."""
        return image.pick(self.given(context.vision_attention, TOWER)).argsort(descending=True, stable=True)

    def _sampled(self, wanted: int) -> int:
        """How many of so many tokens are contextual."""
        return int(wanted * self.contextual + 0.5)
