"""From logical to physical columns: attention masks, rotary tables and hidden states of a layer.

Knows nothing about models or about why a column was dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Kept
from .layout import Columns

__all__ = ["causal", "gather_tokens", "reduce_mask", "scatter_tokens"]


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """Columns of (..., batch or 1, seq, dim) by index (batch, physical) -> (..., batch, physical, dim)."""
    index = index.to(states.device)
    shape = (*states.shape[:-3], index.shape[0], *states.shape[-2:])
    wanted = index[:, :, None].expand(*states.shape[:-3], *index.shape, states.shape[-1])
    return states.expand(shape).gather(-2, wanted)


def scatter_tokens(states: Tensor, columns: Columns, seq: int) -> Tensor:
    """(batch, physical, dim) back to (batch, seq, dim); columns that are not there become zeros."""
    if columns.valid is not None:
        states = states * columns.valid[:, :, None].to(states)
    index = columns.index.to(states.device)[:, :, None].expand_as(states)
    return states.new_zeros(states.shape[0], seq, states.shape[2]).scatter(1, index, states)


def causal(queries: int, keys: int, implementation: str, device: torch.device) -> Tensor:
    """A missing mask written out: (1, 1, queries, keys) bool, or (1, keys) for flash attention."""
    if implementation.startswith("flash"):
        return torch.ones(1, keys, dtype=torch.bool, device=device)
    last_seen = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device) <= last_seen[:, None])[None, None]


def reduce_mask(mask: Tensor, past_length: int, past: Kept | None, new: Columns | None) -> Tensor:
    """A logical attention mask in physical columns.

    Args:
        mask: (batch or 1, heads or 1, queries, keys), bool (True = seen) or float (added), or (batch or 1,
            keys).
        past_length: logical columns in the cache before this pass.
        past: which of those are there; None for all.
        new: which of the pass's own tokens are there; None for all.

    Returns:
        The mask for the columns that are there. Filling is hidden from everyone.
    """
    if new is not None and mask.ndim == 4:
        mask = gather_tokens(mask.transpose(0, 1), new.index).transpose(0, 1)
    pieces = []
    start = 0
    if past is not None:
        start = past.covered
        pieces.append(_keys(mask[..., :start], past.columns))
    if new is None:
        pieces.append(mask[..., start:])
    else:
        pieces += [mask[..., start:past_length], _keys(mask[..., past_length:], new)]
    batch = max(piece.shape[0] for piece in pieces)
    return torch.cat([piece.expand(batch, *piece.shape[1:]) for piece in pieces], dim=-1)


def _keys(mask: Tensor, columns: Columns) -> Tensor:
    """Columns of a mask's last dimension, filling hidden."""
    middle = (1,) * (mask.ndim - 2)
    index = columns.index.to(mask.device).view(columns.index.shape[0], *middle, -1)
    shape = (index.shape[0], *mask.shape[1:-1])
    taken = mask.expand(*shape, -1).gather(-1, index.expand(*shape, -1))
    if columns.valid is None:
        return taken
    hidden = ~columns.valid.to(mask.device).view(columns.valid.shape[0], *middle, -1)
    lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return taken.masked_fill(hidden, lowest)
