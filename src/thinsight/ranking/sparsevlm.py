"""Ranker: SparseVLM, the attention of those text tokens that have to do with the image."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STATES, TEXT_ATTENTION, Context, Ranker, mean_rows, register

_ROUNDING = 1e-5  # equal shares are no more than their mean


@register
class SparseVLM(Ranker):
    """SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): selected text tokens rate the vision tokens.

    Raters are the text tokens that get more than the mean share of the vision tokens: for each vision token a softmax
    over its products with all text tokens, averaged over the vision tokens, above the mean. A vision token's score is
    the attention that it receives from the raters at the layer before, mean over heads and raters.

    Departures: the paper selects raters once, from the embeddings; here they are selected from the hidden states where
    tokens are dropped, which is what a ranker sees. Token recycling (dropped tokens clustered into a few new ones) and
    the rank-based number of dropped tokens are left out: a schedule says how many. Text is the instruction after the
    last image. Cannot rank before layer 0.
    """

    name = "sparsevlm"
    needs = frozenset({STATES, TEXT_ATTENTION})

    def score(self, context: Context) -> Tensor:
        attention = self.given(context.attention, "attention rows of the layer before; supply them")
        queries = self.given(context.queries, "attention rows of the layer before; supply them")
        how = "hidden states; supply Context.states and text_states"
        states, text_states = self.given(context.states, how), self.given(context.text_states, how)
        chosen = raters(states, context.valid, text_states, queries)
        return mean_rows(attention, chosen.to(attention.device))


def raters(states: Tensor, valid: Tensor, text: Tensor, queries: Tensor) -> Tensor:
    """Which text tokens rate, (batch, queries) bool: all real ones where none stands out, or without a vision token.
    `valid` and `queries` (bool) say which of states and text, (batch, tokens or queries, hidden), count."""
    queries, valid = queries.to(states.device), valid.to(states.device)
    product = states.detach().float() @ text.detach().float().transpose(1, 2)  # (batch, tokens, queries)
    hidden = ~queries[:, None, :]
    shares = product.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(dim=2)
    shares = shares.masked_fill(~valid[:, :, None], 0).sum(dim=1)
    shares = shares / valid.sum(dim=1, keepdim=True).clamp(min=1)  # (batch, queries)
    mean = (shares * queries).sum(dim=1, keepdim=True) / queries.sum(dim=1, keepdim=True).clamp(min=1)
    chosen = queries & (shares > mean * (1 + _ROUNDING))  # (batch, queries)
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, queries)
