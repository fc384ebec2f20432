"""Cache layers that hold fewer tokens than they report: keys and values physical, lengths logical.

What was kept lives on the cache itself, so that decoding, beam search, copies and later turns find it. Also
the only place that knows by which name a call carries its cache. Knows nothing about models, hooks or how
tokens were chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import BadInput, Unsupported
from ..schedule import Schedule
from .layout import Columns

_RENAMED = "past_key_values"  # by transformers 5.24, whose models take either name
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _RENAMED
"""What the installed transformers calls a cache, as an argument of models and as a field of their outputs."""


def cache_of(call: Mapping[str, Any]) -> Cache | None:
    """The cache of layers among a call's arguments, by whichever name; None where there is none, or a paged
    one, which has no layers."""
    cache = call[CACHE] if CACHE in call else call.get(_RENAMED)
    return None if isinstance(cache, PagedAttentionCache) else cache


def is_paged(call: Mapping[str, Any]) -> bool:
    """Whether a call brings the cache of continuous batching, which has gone by `cache` in every version."""
    return any(isinstance(call.get(name), PagedAttentionCache) for name in ("cache", _RENAMED))


@dataclass(frozen=True)
class Kept:
    """The first columns of a thinned cache layer. Everything cached after them was kept in full."""

    columns: Columns  # (batch, physical): logical columns of the cache
    covered: int  # how many logical columns these stand for

    def until(self, total: int) -> Columns:
        """What a cache of `total` logical columns holds."""
        index = self.columns.index
        later = torch.arange(self.covered, total, device=index.device).expand(index.shape[0], -1)
        return self.columns.join(later)

    def beyond(self, length: int) -> int:
        """How many physical columns stand at or behind a logical column.

        Raises:
            ThinsightError: the rows differ in it.
        """
        if length >= self.covered:
            return 0
        counts = (self.columns.index >= length).sum(1)
        if self.columns.valid is not None or bool((counts != counts[0]).any()):
            raise Unsupported(
                f"cannot crop the cache to {length} tokens: its rows kept different numbers of vision tokens "
                "behind them; crop to a place after the images, or cache one prompt at a time"
            )
        return int(counts[0])

    def crop(self, length: int) -> Kept:
        """The record of a cache cut to `length` logical columns."""
        if length >= self.covered:
            return self
        width = self.columns.length - self.beyond(length)
        return Kept(Columns(self.columns.index[:, :width], None), length)

    def select(self, rows: Tensor) -> Kept:
        """The record of the given batch rows (repeats allowed)."""
        return replace(self, columns=self.columns.select(rows))


class Thinned(CacheLayerMixin):
    """What is common to cache layers some of whose tokens were never cached. Made by `thin` of stock ones.

    Layers of one stage of a schedule (a run of equal keep rates) hold the same columns and share the record.
    """

    schedule: Schedule
    dropped: int  # logical columns that have no physical one
    kept: Kept | None
    expected: bool  # the hook of this layer has prepared the update that comes next
    coming: int  # physical columns of that update
    offset: int  # the logical column at which the mask of that update begins

    def become(self, schedule: Schedule) -> None:
        """Initialise what the stock layer does not have."""
        self.schedule = schedule
        self._forget()

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        """Announce an update of `seq` logical columns.

        Args:
            batch: rows.
            seq: logical columns.
            new: which of them are there; None for all.
            kept: the record as it will be then; None leaves it.
        """
        self.expected = True
        self.coming = seq if new is None else new.length
        self.dropped += seq - self.coming
        if kept is not None:
            self.kept = kept

    def columns(self) -> Columns:
        """The logical columns of the keys that the announced update returns."""
        raise NotImplementedError

    @property
    def ragged(self) -> bool:
        """Whether some of those columns are filling."""
        return self.kept is not None and self.kept.columns.valid is not None

    def check(self, schedule: Schedule) -> None:
        """Refuse another schedule than the one the layer was filled under.

        Raises:
            ThinsightError: it is another one.
        """
        if self.schedule is not schedule and self.schedule != schedule:
            raise BadInput("this cache was filled under another schedule; start a new cache")

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens`; a positive number is the length to leave (transformers before 5.20)."""
        total = int(self.get_seq_length())
        length = max(0, total + tokens if tokens <= 0 else min(tokens, total))
        if length < total and self.is_initialized:
            self._cut(total, length)

    def _cut(self, total: int, length: int) -> None:
        """Leave `length` of `total` logical columns."""
        raise NotImplementedError

    def _beyond(self, total: int, length: int) -> int:
        """How many physical columns stand at or behind a logical column."""
        covered = total if self.kept is None else min(total, self.kept.covered)
        return total - max(length, covered) + (0 if self.kept is None else self.kept.beyond(length))

    def _claim(self) -> None:
        if not self.expected:
            raise BadInput(
                "this cache was filled under a reduction that is not applied now; "
                "continue it inside the same `apply`, or start a new cache"
            )
        self.expected = False

    def _forget(self) -> None:
        self.kept, self.expected = None, False
        self.dropped = self.coming = self.offset = 0

    def _select(self, rows: Tensor) -> None:
        if self.kept is not None:
            self.kept = self.kept.select(rows)

    def _repeat(self, repeats: int) -> None:
        if self.kept is not None:
            index = self.kept.columns.index
            self._select(torch.arange(index.shape[0], device=index.device).repeat_interleave(repeats))


class ThinnedLayer(Thinned, DynamicLayer):
    """A thinned `DynamicLayer`."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._claim()
        return super().update(key_states, value_states, *args, **kwargs)

    def columns(self) -> Columns:
        assert self.kept is not None
        cached = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return self.kept.until(cached + self.dropped + self.coming)

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped if length else 0

    def _cut(self, total: int, length: int) -> None:
        removed = self._beyond(total, length)
        if self.kept is not None:
            self.kept = self.kept.crop(length)
        self.dropped -= total - length - removed
        self.keys = self.keys[..., : self.keys.shape[-2] - removed, :]
        self.values = self.values[..., : self.values.shape[-2] - removed, :]

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._repeat(repeats)


class ThinnedSlidingLayer(ThinnedLayer, DynamicSlidingWindowLayer):
    """A thinned `DynamicSlidingWindowLayer`: the window is one of logical columns, as the full model's is.

    What no row's window reaches any more is removed before the next update, so that a crop in between finds
    everything.
    """

    held: Columns | None  # the logical columns of `keys`, after the announced update
    ends: deque[int]  # the last logical column, over the rows, of each of them
    cumulative_length: int

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        super().expect(batch, seq, new, kept)
        start = self.cumulative_length
        self.offset = max(start - self.sliding_window + 1, 0)
        self._adopt()
        self._evict()
        if new is None:
            index = torch.arange(start, start + seq, device=self._device()).expand(batch, -1)
            self._hold(index, None, range(start, start + seq))
        else:
            index = new.index + start
            self._hold(index, new.valid, index.amax(0).tolist())
        self.cumulative_length = start + seq

    def columns(self) -> Columns:
        assert self.held is not None
        return self.held

    @property
    def ragged(self) -> bool:
        return self.held is not None and self.held.valid is not None

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._claim()
        return DynamicLayer.update(self, key_states, value_states, *args, **kwargs)

    def _device(self) -> torch.device | None:
        return None if self.held is None else self.held.index.device

    def _hold(self, index: Tensor, valid: Tensor | None, ends: Iterable[int]) -> None:
        self.held = Columns(index, valid) if self.held is None else self.held.join(index, valid)
        self.ends.extend(ends)

    def _adopt(self) -> None:
        """The columns that the stock layer held before it was thinned: the last of its logical ones."""
        if self.held is not None or not self.is_initialized or self.keys.numel() == 0:
            return
        count = self.keys.shape[-2]
        columns = range(self.cumulative_length - count, self.cumulative_length)
        index = torch.tensor(columns, device=self.keys.device).expand(self.keys.shape[0], -1)
        self._hold(index, None, columns)

    def _evict(self) -> None:
        if self.record_past or self.held is None:
            return
        before = len(self.ends)
        while self.ends and self.ends[0] < self.offset:  # they ascend
            self.ends.popleft()
        gone = before - len(self.ends)
        if gone:
            self.keys, self.values = self.keys[..., gone:, :], self.values[..., gone:, :]
            self.held = self.held.drop_first(gone)

    def _cut(self, total: int, length: int) -> None:
        assert self.held is not None
        whole = Kept(self.held, total)
        removed = whole.beyond(length)
        self.held = whole.crop(length).columns
        for _ in range(removed):
            self.ends.pop()
        if self.kept is not None:
            self.kept = self.kept.crop(length)
        self.dropped -= total - length - removed
        self.cumulative_length = length
        self.keys = self.keys[..., : self.keys.shape[-2] - removed, :]
        self.values = self.values[..., : self.values.shape[-2] - removed, :]

    def _forget(self) -> None:
        super()._forget()
        self.held, self.ends = None, deque()

    def _select(self, rows: Tensor) -> None:
        super()._select(rows)
        if self.held is not None:
            self.held = self.held.select(rows)

    def _repeat(self, repeats: int) -> None:
        super()._repeat(repeats)
        if self.held is not None and self.kept is None:
            index = self.held.index
            self.held = self.held.select(torch.arange(index.shape[0], device=index.device).repeat_interleave(repeats))


class ThinnedStaticLayer(Thinned, StaticLayer):
    """A thinned `StaticLayer`: its buffer is allocated without room for what the first prompt drops."""

    cumulative_length: Tensor  # physical columns that are filled
    logical_length: int  # of the stock layer's buffer
    fixed: Columns | None  # logical columns of the whole buffer, filled or not
    is_initialized: bool

    def become(self, schedule: Schedule) -> None:
        super().become(schedule)
        self.logical_length, self.fixed = self.max_cache_len, None

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        super().expect(batch, seq, new, kept)
        if new is not None and not self.is_initialized:
            self.max_cache_len = self.logical_length - self.dropped
        if kept is not None:
            self._lay_out(kept)

    def columns(self) -> Columns:
        assert self.fixed is not None
        return self.fixed

    def _cut(self, total: int, length: int) -> None:
        removed = self._beyond(total, length)
        if removed < total - length:
            raise Unsupported(
                f"cannot crop a static cache to {length} tokens: its buffer has no room for vision tokens "
                "that were left out behind it; crop to a place after the images, or use a dynamic cache"
            )
        self.cumulative_length.sub_(removed)
        if self.kept is not None:
            self.kept = self.kept.crop(length)
            self._lay_out(self.kept)

    def _lay_out(self, kept: Kept) -> None:
        # columns that are not filled yet have no query that sees them
        self.fixed = kept.until(kept.covered + self.max_cache_len - kept.columns.length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._claim()
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> Any:
        return self.cumulative_length + self.dropped if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical_length, 0

    def get_max_length(self) -> int:
        return self.logical_length

    def reset(self) -> None:
        super().reset()
        self._forget()
        # the next prompt may drop fewer tokens, and then needs a larger buffer
        self.max_cache_len, self.fixed, self.is_initialized = self.logical_length, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)
        if self.fixed is not None:
            self.fixed = self.fixed.select(beam_idx)


_THINNED: dict[type, type[Thinned]] = {
    DynamicLayer: ThinnedLayer,
    DynamicSlidingWindowLayer: ThinnedSlidingLayer,
    StaticLayer: ThinnedStaticLayer,
}


def thinned(cache: Cache | None, layer: int) -> Thinned | None:
    """The layer of a cache if it is thinned."""
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    return held if isinstance(held, Thinned) else None


def filled(cache: Cache | None, layer: int) -> int | None:
    """How many tokens a static cache layer has been given; None where its keys end with the last one."""
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if isinstance(held, StaticSlidingWindowLayer):
        return int(held.cumulative_length_int)
    return int(held.cumulative_length) if isinstance(held, StaticLayer) else None


def kept_before(cache: Cache | None, layer: int, schedule: Schedule) -> Kept | None:
    """What the cache records for a layer; None when it holds every column.

    Raises:
        ThinsightError: the cache was filled under another schedule.
    """
    held = thinned(cache, layer)
    if held is None:
        return None
    held.check(schedule)
    return held.kept


def thin(cache: Cache, layer: int, schedule: Schedule) -> Thinned:
    """The layer of a cache, made one that can be thinned.

    Raises:
        ThinsightError: the cache keeps its tokens in a way that cannot be thinned.
    """
    while layer >= len(cache.layers) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())  # a lazily built cache
    held = cache.layers[layer]
    if type(held) in _THINNED:
        held.__class__ = _THINNED[type(held)]
        held.become(schedule)
    if not isinstance(held, Thinned):
        raise Unsupported(
            f"cache layer {layer} is a {type(held).__name__}, from which tokens cannot be left out; use the "
            "default dynamic cache, or a static one on a model without sliding windows"
        )
    held.check(schedule)
    return held


def append(before: Kept | None, past: int, new: Columns, seq: int) -> Kept:
    """The record after a pass that kept `new` of its `seq` tokens, behind `past` logical columns."""
    if not past:
        return Kept(new, seq)
    if before is None:
        cached = torch.arange(past, device=new.index.device).expand(new.index.shape[0], -1)
        return Kept(Columns(cached, None).join(new.index + past, new.valid), past + seq)
    return Kept(before.until(past).join(new.index + past, new.valid), past + seq)
