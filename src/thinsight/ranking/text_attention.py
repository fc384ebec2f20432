"""Ranker: the attention that a vision token receives from the prompt's text at the decoder layer just run.

Knows nothing about how those attention rows are obtained.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ThinsightError
from .base import QUERIES, TEXT_ATTENTION, Context, Ranker, register

__all__ = ["TextAttention"]


@register
class TextAttention(Ranker):
    """The paper's "prompt-aware" score (arXiv 2412.00556 section 3: S of layer i-1 ranks before layer i).

    Mean over heads and query rows of the softmax attention. The paper does not say which rows;
    ``queries="last"`` is FastV's choice (arXiv 2403.06764), ``"instruction"`` averages all text tokens after
    the last image.
    """

    name = "text-attention"
    needs = frozenset({TEXT_ATTENTION})
    pools = True

    def __init__(self, queries: str = "instruction") -> None:
        if queries not in QUERIES:
            raise ThinsightError(f"queries is {queries!r}; choose one of {', '.join(QUERIES)}")
        super().__init__(queries=queries)
        self.queries = queries

    def score(self, context: Context) -> Tensor:
        received = context.mean_attention()
        if received is None:
            raise ThinsightError("text-attention needs attention rows of the layer before; supply them")
        return received
