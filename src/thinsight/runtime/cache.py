"""A cache layer that holds fewer tokens than it reports: keys and values physical, lengths logical.

What was kept lives on the cache itself, so that decoding, beam search, copies and later turns find it.
Knows nothing about models, hooks or how tokens were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import ThinsightError
from ..schedule import Schedule
from .layout import Columns

__all__ = ["Kept", "ThinnedLayer", "append", "expect", "kept_before", "thin"]


@dataclass(frozen=True)
class Kept:
    """The first columns of a thinned cache layer. Everything cached after them was kept in full."""

    columns: Columns  # (batch, physical): logical columns of the cache
    covered: int  # how many logical columns these stand for


class ThinnedLayer(DynamicLayer):
    """A DynamicLayer some of whose tokens were never cached. Made by `thin` out of a stock one.

    Layers of one stage of a schedule (a run of equal keep rates) hold the same columns; the first of them
    owns the record.
    """

    keys: Tensor
    values: Tensor
    schedule: Schedule
    dropped: int  # logical columns that have no physical one
    kept: Kept | None  # on the first layer of a stage
    expected: bool  # the hook of this layer has prepared the update that comes next

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.expected:
            raise ThinsightError(
                "this cache was filled under a reduction that is not applied now; "
                "continue it inside the same `apply`, or start a new cache"
            )
        self.expected = False
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped if length else 0

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens`; a positive number is the length to leave (early transformers)."""
        removed = -tokens if tokens <= 0 else self.get_seq_length() - tokens
        if removed <= 0 or not self.is_initialized:
            return
        tail = self.get_seq_length() - (self.kept.covered if self.kept is not None else 0)
        if self.kept is not None and removed > tail:
            raise ThinsightError(
                f"cannot crop {removed} tokens: only {tail} came after the reduced prompt; "
                "decode without an assistant and without prompt lookup under a reduction"
            )
        self.keys = self.keys[..., :-removed, :]
        self.values = self.values[..., :-removed, :]

    def reset(self) -> None:
        super().reset()
        if not self.is_initialized:  # early transformers zero the tokens but do not remove them
            self.dropped, self.kept, self.expected = 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.kept is not None:
            rows = torch.arange(self.kept.columns.index.shape[0], device=self.kept.columns.index.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.kept is not None:
            self.kept = Kept(self.kept.columns.select(rows), self.kept.covered)


def kept_before(cache: Cache | None, layer: int, schedule: Schedule) -> Kept | None:
    """What the cache records for the layer at the start of a stage; None when it holds every column.

    Raises:
        ThinsightError: the cache was filled under another schedule.
    """
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if not isinstance(held, ThinnedLayer):
        return None
    _check_schedule(held, schedule)
    return held.kept


def expect(cache: Cache | None, layer: int) -> None:
    """Announce that the next update of a thinned layer is made with masks that fit it."""
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if isinstance(held, ThinnedLayer):
        held.expected = True


def thin(cache: Cache, layer: int, schedule: Schedule, dropped: int) -> ThinnedLayer:
    """Announce that the next update of a layer leaves `dropped` tokens out.

    Turns a stock layer into a thinned one.

    Raises:
        ThinsightError: the cache keeps its tokens in a way that cannot be thinned.
    """
    while layer >= len(cache.layers) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())  # a lazily built cache
    held = cache.layers[layer]
    if type(held) is DynamicLayer:
        held.__class__ = ThinnedLayer
        held.schedule, held.dropped, held.kept = schedule, 0, None
    if not isinstance(held, ThinnedLayer):
        raise ThinsightError(
            f"cache layer {layer} is a {type(held).__name__}; use the default dynamic cache under a reduction"
        )
    _check_schedule(held, schedule)
    held.dropped += dropped
    held.expected = True
    return held


def _check_schedule(held: ThinnedLayer, schedule: Schedule) -> None:
    if held.schedule != schedule:
        raise ThinsightError("this cache was filled under another schedule; start a new cache")


def append(before: Kept | None, past: int, new: Columns, seq: int) -> Kept:
    """The record after a pass that kept `new` of its `seq` tokens, behind `past` logical columns."""
    batch, device = new.index.shape[0], new.index.device
    start = 0 if before is None else before.covered
    full = torch.arange(start, past, device=device).expand(batch, -1)  # cached in full since the last record
    index = [full, new.index + past]
    valid = [None, new.valid]
    if before is not None:
        index.insert(0, before.columns.index.to(device))
        valid.insert(0, before.columns.valid)
    known = [
        torch.ones_like(i, dtype=torch.bool) if v is None else v for i, v in zip(index, valid, strict=True)
    ]
    ragged = any(v is not None for v in valid)
    return Kept(Columns(torch.cat(index, 1), torch.cat(known, 1) if ragged else None), past + seq)
