"""Ranker: the attention that a vision token receives inside the vision tower.

Knows nothing about the prompt's text: an image is ranked alike whatever is asked about it.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from .base import VISION_ATTENTION, Context, Ranker, register


@register
class VisionAttention(Ranker):
    """Attention received from the CLS token where the tower has one, otherwise from the average token.

    Mean over heads, taken at the tower's layer whose output the projector reads, as VisionZip (arXiv
    2412.04467) and FasterVLM (arXiv 2412.01818) do. Works at any decoder layer, layer 0 included.
    """

    name = "vision-attention"
    needs = frozenset({VISION_ATTENTION})

    def score(self, context: Context) -> Tensor:
        if context.vision_attention is None:
            raise BadInput(
                "vision-attention needs attention of the vision tower; "
                "pass pixel_values, or features from encode_images(model, inputs, reduction)"
            )
        return context.vision_attention
