"""Rankers: the attention that a vision token receives, from the prompt's text or inside the vision tower."""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from .base import QUERIES, TEXT_ATTENTION, VISION_ATTENTION, Context, Ranker, register

ROWS = 16
"""Rows of attention that are averaged unless a setting says otherwise."""


@register
class TextAttention(Ranker):
    """The paper's "prompt-aware" score (arXiv 2412.00556 section 3: S of layer i-1 ranks before layer i).

    Mean over heads and query rows of the softmax attention. The paper does not say which rows; ``queries="last"`` is
    FastV's choice (arXiv 2403.06764), ``"instruction"`` averages all text tokens after the last image: `rows` of them
    at most, evenly spaced with the last among them, so that ranking stays cheap where the text is long (None for all).
    """

    name = "text-attention"
    needs = frozenset({TEXT_ATTENTION})
    pools = True

    def __init__(self, queries: str = "instruction", rows: int | None = ROWS) -> None:
        if queries not in QUERIES:
            raise BadInput(f"queries is {queries!r}; choose one of {', '.join(QUERIES)}")
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise BadInput(f"rows is {rows!r}; it must be a whole number of at least 1, or null for all")
        super().__init__(queries=queries, **({} if rows == ROWS else {"rows": rows}))
        self.queries = queries
        self.rows = rows

    def score(self, context: Context) -> Tensor:
        return self.given(context.mean_attention(), "attention rows of the layer before; supply them")


@register
class VisionAttention(Ranker):
    """Attention inside the vision tower: from the CLS token where the tower has one, otherwise from the average token.

    Mean over heads, taken at the tower's layer whose output the projector reads, as VisionZip (arXiv 2412.04467) and
    FasterVLM (arXiv 2412.01818) do. Works at any decoder layer, layer 0 included; an image is ranked alike whatever is
    asked about it.
    """

    name = "vision-attention"
    needs = frozenset({VISION_ATTENTION})

    def score(self, context: Context) -> Tensor:
        how = "pass pixel_values, or features from encode_images(model, inputs, reduction)"
        return self.given(context.vision_attention, f"attention of the vision tower; {how}")
