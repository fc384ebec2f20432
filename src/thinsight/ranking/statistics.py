"""Numbers that a prompt's text-to-vision attention gives: how peaked it is, how much it depends on the word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import Registry

Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]
_SMALL = 1e-6  # AutoPrune's, inside its logarithm


def concentration(attention: Tensor, queries: Tensor, valid: Tensor) -> Tensor:
    """How peaked the text's attention is: 0 where all vision tokens get the same, 1 where one gets all.

    One minus the entropy of what the tokens receive, over all heads and text rows, in units of its maximum.

    Args:
        attention: (batch, heads, queries, tokens) float32, a softmax.
        queries: (batch, queries) bool, rows that are real.
        valid: (batch, tokens) bool, vision tokens that are still there.

    Returns:
        (batch,) float32.
    """
    received = attention.mean(1).masked_fill(~queries[:, :, None], 0).sum(1)  # (batch, tokens)
    received = received.masked_fill(~valid, 0)
    shares = received / received.sum(1, keepdim=True).clamp(min=torch.finfo(received.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum(1)
    count = valid.sum(1)
    # a single token, or none, is neither peaked nor flat
    return torch.where(count > 1, 1 - entropy / count.clamp(min=2).log(), 0.0)


def mutual_information(attention: Tensor, queries: Tensor, valid: Tensor) -> Tensor:
    """AutoPrune's complexity (arXiv 2509.23931): bits that the text token tells about the vision token.

    ``sum over x, y of p(x, y) log2(p(x, y) / (p(x) p(y) + 1e-6))`` with text tokens x alike likely and
    p(y | x) the attention as it is, not normalised over vision tokens; mean over heads, where the public code
    sums. Arguments and result as of `concentration`.
    """
    rows = attention.masked_fill(~(queries[:, None, :, None] & valid[:, None, None, :]), 0)
    text = queries.sum(1).clamp(min=1)[:, None, None, None]  # (batch, 1, 1, 1)
    joint = rows / text
    ratio = joint / (joint.sum(2, keepdim=True) / text + _SMALL)
    return (joint * ratio.clamp(min=_SMALL).log2()).sum((2, 3)).mean(1)


STATISTICS: Registry[Statistic] = Registry("statistic")
"""Statistics by name, as an adaptive reduction stores them."""
STATISTICS.register(concentration, "concentration")
STATISTICS.register(mutual_information, "mutual-information")
get_statistic = STATISTICS.__getitem__
