"""Tensors in the two token spaces of a pass, and the way of states, masks and rotary tables between them.

*Logical* columns number the pass's new tokens as the caller gave them, padding included: 0..seq-1. *Physical* columns
number the tokens that really run through a layer. Masks, positions and cache lengths are always logical; hidden
states, keys and values are physical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Change = Callable[[str, Tensor], Tensor]
M = TypeVar("M", bound="Mapped")


class Mapped:
    """A dataclass of tensors as a whole, whatever tuples and dataclasses they stand in."""

    def mapped(self: M, change: Change) -> M:
        """The same with every tensor replaced by ``change(name, tensor)``, in a fixed order; names are unique."""
        return _mapped(self, "", change)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of `mapped`."""
        found: list[Tensor] = []

        def take(_: str, tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(take)
        return found

    def to(self: M, device: torch.device | str) -> M:
        """The same on another device."""
        return self.mapped(lambda _, tensor: tensor.to(device))

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def _mapped(value: Any, name: str, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(name.removeprefix("."), value)
    if isinstance(value, tuple):
        return tuple(_mapped(each, f"{name}.{number}", change) for number, each in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{key: _mapped(each, f"{name}.{key}", change) for key, each in held.items()})
    return value


@dataclass(frozen=True)
class Columns:
    """The logical column that each physical column holds, ascending in every row.

    Rows with fewer tokens than the longest are filled up with columns that nobody may see.
    """

    index: Tensor  # (batch, physical) int64
    valid: Tensor | None  # (batch, physical) bool, False at filling; None when there is none

    @property
    def length(self) -> int:
        """How many physical columns there are."""
        return self.index.shape[1]

    def part(self, which: slice) -> Columns:
        """Some of the physical columns."""
        return Columns(self.index[:, which], None if self.valid is None else self.valid[:, which])

    def select(self, rows: Tensor) -> Columns:
        """The columns of the given batch rows (repeats allowed)."""
        rows = rows.to(self.index.device)
        return Columns(self.index[rows], None if self.valid is None else self.valid[rows])

    def join(self, index: Tensor, valid: Tensor | None = None) -> Columns:
        """These and, behind them, others: index (batch, n), valid (batch, n) or None for all."""
        joined = torch.cat([self.index, index.to(self.index.device)], dim=1)
        if self.valid is None and valid is None:
            return Columns(joined, None)
        first = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        second = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        return Columns(joined, torch.cat([first, second.to(first.device)], dim=1))

    def physical(self, seq: int, *logical: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns, each (batch, any), of `seq` are now; meaningless for those that were dropped."""
        place = torch.arange(self.length, device=self.index.device).expand_as(self.index)
        inverse = torch.zeros(self.index.shape[0], seq, dtype=torch.long, device=self.index.device)
        inverse = inverse.scatter(1, self.index, place)
        return tuple(inverse.gather(1, each) for each in logical)


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """Columns of (..., batch or 1, seq, dim) by index (batch, physical) -> (..., batch, physical, dim)."""
    index = index.to(states.device)
    rows, seq = states.shape[-3:-1]
    if rows > 1:
        index = index + seq * torch.arange(rows, device=index.device)[:, None]
    # whole columns are copied, not one number after the other as `gather` does
    return states.flatten(-3, -2).index_select(-2, index.flatten()).unflatten(-2, index.shape)


def scatter_tokens(states: Tensor, columns: Columns, seq: int) -> Tensor:
    """(..., batch, physical, dim) back to (..., batch, seq, dim); columns that are not there become zeros."""
    if columns.valid is not None:
        # filled, not multiplied: a gradient that is not finite at columns of zeros (Gemma 3n's) must end here
        states = states.masked_fill(~columns.valid[:, :, None].to(states.device), 0)
    index = columns.index.to(states.device)[:, :, None].expand_as(states)
    return states.new_zeros(*states.shape[:-2], seq, states.shape[-1]).scatter(-2, index, states)


def replace_tokens(states: Tensor, places: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """States (batch, seq, hidden) with those at `places` (batch, tokens) replaced by `new` (batch, tokens,
    hidden) where `where` (batch, tokens) is True."""
    batch, seq, hidden = states.shape
    # a column more takes what is not to be written: picking by `where` would ask the device how much it is
    spare = states.new_zeros(batch, 1, hidden)
    index = torch.where(where, places, seq)[..., None].expand(-1, -1, hidden).to(states.device)
    return torch.cat([states, spare], dim=1).scatter(1, index, new.to(states))[:, :seq]


def causal(queries: int, keys: int, implementation: str, device: torch.device) -> Tensor:
    """A missing mask written out: (1, 1, queries, keys) bool, or (1, keys) for flash attention."""
    if implementation.startswith("flash"):
        return torch.ones(1, keys, dtype=torch.bool, device=device)
    last_seen = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device) <= last_seen[:, None])[None, None]


def reduce_mask(mask: Any, keys: Columns, queries: Columns | None, offset: int = 0) -> Any:
    """A logical attention mask for the columns that are there; filling is hidden from everyone, and so are columns in
    front of the mask's first or behind its last.

    Args:
        mask: (batch or 1, heads or 1, queries, keys) bool (seen) or float (added), (batch or 1, keys), `BlockMask`.
        keys: the logical column of each physical key.
        queries: which of the pass's own tokens are there; None for all.
        offset: the logical column of the mask's first key.
    """
    blocks = isinstance(mask, BlockMask)
    length = mask.seq_lengths[1] if blocks else mask.shape[-1]
    place = keys.index - offset
    seen = (place >= 0) & (place < length)
    if keys.valid is not None:
        seen = seen & keys.valid
    place = place.clamp(0, length - 1)
    if blocks:  # flex attention's, which is a function of row, head, query and key
        logical, asks = mask.mask_mod, None if queries is None else queries.index

        def physical(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = query if asks is None else asks[batch, query]
            return seen[batch, key] & logical(batch, head, row, place[batch, key])

        count = mask.seq_lengths[0] if asks is None else asks.shape[1]
        batch, device, size = len(place), str(place.device), mask.BLOCK_SIZE
        return create_block_mask(physical, batch, None, count, place.shape[1], device=device, BLOCK_SIZE=size)
    if queries is not None and mask.ndim == 4:
        mask = gather_tokens(mask.transpose(0, 1), queries.index).transpose(0, 1)
    rows, middle = place.shape[0], (1,) * (mask.ndim - 2)
    index = place.to(mask.device).view(rows, *middle, -1)
    shape = (rows, *mask.shape[1:-1])
    taken = mask.expand(*shape, -1).gather(-1, index.expand(*shape, -1))
    # the lowest number, not -inf: a row of filling sees nothing, and its softmax must stay one of numbers
    lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return taken.masked_fill(~seen.to(mask.device).view(rows, *middle, -1), lowest)
