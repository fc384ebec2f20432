"""From logical to physical columns: attention masks, rotary tables and hidden states of a layer.

Knows nothing about models, caches or why a column was dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .layout import Columns


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """Columns of (..., batch or 1, seq, dim) by index (batch, physical) -> (..., batch, physical, dim)."""
    index = index.to(states.device)
    rows, seq = states.shape[-3:-1]
    if rows > 1:
        index = index + seq * torch.arange(rows, device=index.device)[:, None]
    # whole columns are copied, not one number after the other as `gather` does
    return states.flatten(-3, -2).index_select(-2, index.flatten()).unflatten(-2, index.shape)


def scatter_tokens(states: Tensor, columns: Columns, seq: int) -> Tensor:
    """(batch, physical, dim) back to (batch, seq, dim); columns that are not there become zeros."""
    if columns.valid is not None:
        states = states * columns.valid[:, :, None].to(states)
    index = columns.index.to(states.device)[:, :, None].expand_as(states)
    return states.new_zeros(states.shape[0], seq, states.shape[2]).scatter(1, index, states)


def replace_tokens(states: Tensor, places: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """States (batch, seq, hidden) with those at `places` (batch, tokens) replaced by `new` (batch, tokens,
    hidden) where `where` (batch, tokens) is True."""
    batch, seq, hidden = states.shape
    spare = states.new_zeros(batch, 1, hidden)  # what is not to be written goes there
    index = torch.where(where, places, seq)[..., None].expand(-1, -1, hidden).to(states.device)
    return torch.cat([states, spare], dim=1).scatter(1, index, new.to(states))[:, :seq]


def causal(queries: int, keys: int, implementation: str, device: torch.device) -> Tensor:
    """A missing mask written out: (1, 1, queries, keys) bool, or (1, keys) for flash attention."""
    if implementation.startswith("flash"):
        return torch.ones(1, keys, dtype=torch.bool, device=device)
    last_seen = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device) <= last_seen[:, None])[None, None]


def reduce_mask(mask: Any, keys: Columns, queries: Columns | None, offset: int = 0) -> Any:
    """A logical attention mask in physical columns.

    Args:
        mask: (batch or 1, heads or 1, queries, keys), bool (True = seen) or float (added), or (batch or 1,
            keys), or a `BlockMask`.
        keys: the logical column of each physical key.
        queries: which of the pass's own tokens are there; None for all.
        offset: the logical column of the mask's first key.

    Returns:
        The mask for the columns that are there. Filling is hidden from everyone, and so are columns in front
        of the mask's first or behind its last.
    """
    place = keys.index - offset
    if isinstance(mask, BlockMask):
        return _reduce_blocks(mask, place, keys.valid, queries)
    if queries is not None and mask.ndim == 4:
        mask = gather_tokens(mask.transpose(0, 1), queries.index).transpose(0, 1)
    inside = (place >= 0) & (place < mask.shape[-1])
    seen = inside if keys.valid is None else inside & keys.valid
    rows, middle = place.shape[0], (1,) * (mask.ndim - 2)
    index = place.clamp(0, mask.shape[-1] - 1).to(mask.device).view(rows, *middle, -1)
    shape = (rows, *mask.shape[1:-1])
    taken = mask.expand(*shape, -1).gather(-1, index.expand(*shape, -1))
    lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return taken.masked_fill(~seen.to(mask.device).view(rows, *middle, -1), lowest)


def _reduce_blocks(mask: BlockMask, place: Tensor, valid: Tensor | None, queries: Columns | None) -> BlockMask:
    """The same for flex attention, whose masks are functions of row, head, query and key."""
    length = mask.seq_lengths[1]
    seen = (place >= 0) & (place < length)
    seen = seen if valid is None else seen & valid
    place = place.clamp(0, length - 1)
    logical, asks = mask.mask_mod, None if queries is None else queries.index

    def physical(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query if asks is None else asks[batch, query]
        return seen[batch, key] & logical(batch, head, row, place[batch, key])

    count = mask.seq_lengths[0] if asks is None else asks.shape[1]
    return create_block_mask(
        physical, place.shape[0], None, count, place.shape[1], device=str(place.device), BLOCK_SIZE=mask.BLOCK_SIZE
    )
