"""Cache layers that hold fewer tokens than they report: keys and values physical, lengths logical.

What was kept lives on the cache itself, so that decoding, beam search, copies and later turns find it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import BadInput, Unsupported
from ..families import family_of
from ..schedule import Schedule
from .tensors import Columns, Mapped

_RENAMED = "past_key_values"  # by transformers 5.24, whose models take either name
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _RENAMED
"""What the installed transformers calls a cache, as an argument of models and as a field of their outputs."""


def cache_of(call: Mapping[str, Any]) -> Cache | None:
    """The cache among a call's arguments, by whichever name; None where there is none, or a paged one (no layers)."""
    cache = call[CACHE] if CACHE in call else call.get(_RENAMED)
    return None if isinstance(cache, PagedAttentionCache) else cache


def fresh_cache(model: Any) -> dict[str, Any]:
    """What a forward pass that is to leave a cache has to be given: an empty one, of a model that makes none itself."""
    if family_of(model.config).makes_cache:
        return {}
    return {CACHE: DynamicCache(config=model.config.get_text_config(decoder=True))}


def is_paged(call: Mapping[str, Any]) -> bool:
    """Whether a call brings the cache of continuous batching, which has gone by `cache` in every version."""
    return any(isinstance(call.get(name), PagedAttentionCache) for name in ("cache", _RENAMED))


@dataclass(frozen=True)
class Kept(Mapped):
    """The first columns of a thinned cache layer. Everything cached after them was kept in full."""

    columns: Columns  # (batch, physical): logical columns of the cache
    covered: int  # how many logical columns these stand for

    def until(self, total: int) -> Columns:
        """What a cache of `total` logical columns holds."""
        index = self.columns.index
        return self.columns.join(torch.arange(self.covered, total, device=index.device).expand(index.shape[0], -1))

    def beyond(self, length: int) -> int:
        """How many physical columns stand at or behind a logical column; refuses where rows differ in it."""
        if length >= self.covered:
            return 0
        counts = (self.columns.index >= length).sum(1)
        # keys are one rectangle for all rows: only a cut at the same physical place in each can be made
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
        return Kept(self.columns.part(slice(self.columns.length - self.beyond(length))), length)

    def select(self, rows: Tensor) -> Kept:
        """The record of the given batch rows (repeats allowed)."""
        return replace(self, columns=self.columns.select(rows))


def append(before: Kept | None, past: int, new: Columns, seq: int) -> Kept:
    """The record after a pass that kept `new` of its `seq` tokens, behind `past` logical columns; `before`: the
    record until then, None where nothing was dropped."""
    if not past:
        return Kept(new, seq)
    before = before or Kept(Columns(new.index[:, :0], None), 0)
    return Kept(before.until(past).join(new.index + past, new.valid), past + seq)


class Thinned:
    """What is common to cache layers that some tokens never came to. Made by `thin` of stock ones.

    Every layer of a cache reports the same logical length, which is what the model derives masks and positions
    from, while each stage of a schedule (a run of layers of one keep rate) holds another number of tokens.
    Layers of a stage hold the same columns and share the record.
    """

    schedule: Schedule
    kept: Kept | None

    def become(self, schedule: Schedule) -> None:
        """Initialise what the stock layer does not have."""
        self.schedule = schedule
        self._forget()

    def check(self, schedule: Schedule) -> None:
        """Refuse another schedule than the one the layer was filled under."""
        if self.schedule is not schedule and self.schedule != schedule:
            raise BadInput("this cache was filled under another schedule; start a new cache")

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        """Announce a pass of `seq` logical columns, of which `new` are there (None: all), and what will be
        `kept` then (None: as before). The update itself sees what is there alone, not what is missing."""
        raise NotImplementedError

    def _forget(self) -> None:
        self.kept = None

    def _select(self, rows: Tensor) -> None:
        if self.kept is not None:
            self.kept = self.kept.select(rows)


# The stock class stands first: a layer becomes a thinned one in place, for which their memory layout must be one.
class ThinnedState(LinearAttentionLayer, Thinned):
    """A thinned `LinearAttentionLayer`: it holds a state, no tokens, so that nothing but a crop has to know what of
    them did not come to it."""

    behind: int  # columns behind what `kept` covers, since past states are recorded

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        if kept is not None:
            self.kept, self.behind = kept, 0
        elif self.record_past:  # where not, decoding compiles to one graph, in which nothing may count
            self.behind += seq

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens` logical columns; refused where a recurrent state has taken them in."""
        removed = -tokens
        if removed and not self.is_croppable:
            raise Unsupported(
                f"cannot crop the cache by {removed} tokens: the state of its linear attention has taken them in; keep "
                "a copy of the cache from before"
            )
        if self.kept is not None and removed > self.behind:
            length = self.kept.covered - (removed - self.behind)
            removed = self.behind + self.kept.beyond(length)
            self.kept, self.behind = self.kept.crop(length), 0
        else:
            self.behind -= min(removed, self.behind)
        super().crop(-removed)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def _forget(self) -> None:
        super()._forget()
        self.behind = 0


class ThinnedKeys(CacheLayerMixin, Thinned):
    """What is common to those that hold keys and values."""

    dropped: int  # logical columns that have no physical one
    expected: bool  # the hook of this layer has prepared the update that comes next
    coming: int  # physical columns of that update
    offset: int  # the logical column at which the mask of that update begins

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        self.expected = True
        self.coming = seq if new is None else new.length
        self.dropped += seq - self.coming
        if kept is not None:
            self.kept = kept

    def columns(self) -> Columns:
        """The logical columns of the keys that the announced update returns, or the last one has returned."""
        raise NotImplementedError

    @property
    def ragged(self) -> bool:
        """Whether some of those columns are filling."""
        return self.kept is not None and self.kept.columns.valid is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._claim()
        return super().update(key_states, value_states, *args, **kwargs)

    def _claim(self) -> None:
        if not self.expected:
            raise BadInput(
                "this cache was filled under a reduction that is not applied now; "
                "continue it inside the same `apply`, or start a new cache"
            )
        self.expected = False

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens`; a positive number is the length to leave (transformers before 5.20).

        A logical length is cut to, and how many keys that removes depends on what was kept behind it. What
        was dropped in front of it stays dropped; `dropped` forgets only what lies behind.
        """
        total = int(self.get_seq_length())
        length = max(0, total + tokens if tokens <= 0 else min(tokens, total))
        if length < total and self.is_initialized:
            self._cut(total, length)

    def _cut(self, total: int, length: int) -> None:
        """Leave `length` of `total` logical columns."""
        raise NotImplementedError

    def _beyond(self, total: int, length: int) -> int:
        """How many of `total` columns' physical ones stand at or behind a logical column."""
        covered = total if self.kept is None else min(total, self.kept.covered)
        return total - max(length, covered) + (0 if self.kept is None else self.kept.beyond(length))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.expected = False
        self.dropped = self.coming = self.offset = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)


class ThinnedLayer(ThinnedKeys, DynamicLayer):
    """A thinned `DynamicLayer`."""

    keys: Tensor
    values: Tensor

    def columns(self) -> Columns:
        assert self.kept is not None
        cached = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return self.kept.until(cached + self.dropped + (self.coming if self.expected else 0))

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped if length else 0

    def _cut(self, total: int, length: int) -> None:
        removed = self._beyond(total, length)
        if self.kept is not None:
            self.kept = self.kept.crop(length)
        # of the columns cut off, those without a key were counted as dropped
        self.dropped -= total - length - removed
        left = self.keys.shape[-2] - removed
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)


class ThinnedSlidingLayer(ThinnedLayer, DynamicSlidingWindowLayer):
    """A thinned `DynamicSlidingWindowLayer`: the window is one of logical columns, as the full model's is.

    The stock layer forgets by counting keys. Here the last `sliding_window` keys reach further back than the
    window does, each row's by as much as it dropped, so that every key's logical column is held beside it and
    says when it goes. What no row's window reaches any more is removed before the next update, not after the
    last: a crop in between finds everything.
    """

    held: Columns | None  # the logical columns of `keys`, after the announced update
    ends: list[int]  # the last logical column, over the rows, of each of them: known on the host
    cumulative_length: int

    def expect(self, batch: int, seq: int, new: Columns | None = None, kept: Kept | None = None) -> None:
        super().expect(batch, seq, new, kept)
        start = self.cumulative_length
        self.offset = max(start - self.sliding_window + 1, 0)
        if self.held is None and self.is_initialized and self.keys.numel():
            # what the stock layer held before it was thinned: the last of its logical columns
            past = range(start - self.keys.shape[-2], start)
            self._hold(torch.tensor(past, device=self.keys.device).expand(self.keys.shape[0], -1), None, past)
        gone = 0 if self.record_past else bisect.bisect_left(self.ends, self.offset)  # they ascend
        if gone and self.held is not None:
            self.keys, self.values = self.keys[..., gone:, :], self.values[..., gone:, :]
            self.held = self.held.part(slice(gone, None))
            del self.ends[:gone]
        if new is None:
            device = None if self.held is None else self.held.index.device
            index = torch.arange(start, start + seq, device=device).expand(batch, -1)
            self._hold(index, None, range(start, start + seq))
        else:
            index = new.index + start
            real = index if new.valid is None else torch.where(new.valid, index, -1)
            self._hold(index, new.valid, real.amax(0).cummax(0).values.tolist())
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

    def _hold(self, index: Tensor, valid: Tensor | None, ends: Iterable[int]) -> None:
        self.held = Columns(index, valid) if self.held is None else self.held.join(index, valid)
        self.ends.extend(ends)

    def _beyond(self, total: int, length: int) -> int:
        assert self.held is not None
        return Kept(self.held, total).beyond(length)

    def _cut(self, total: int, length: int) -> None:
        super()._cut(total, length)
        assert self.held is not None
        self.held = Kept(self.held, total).crop(length).columns
        del self.ends[self.held.length :]
        self.cumulative_length = length

    def _forget(self) -> None:
        super()._forget()
        self.held, self.ends = None, []

    def _select(self, rows: Tensor) -> None:
        super()._select(rows)
        if self.held is not None:
            self.held = self.held.select(rows)


class ThinnedStaticLayer(ThinnedKeys, StaticLayer):
    """A thinned `StaticLayer`: its buffer is allocated without room for what the first prompt drops, so a crop to
    in front of that, which would leave more to be filled than there is room, cannot be had."""

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

    def _lay_out(self, kept: Kept) -> None:
        # columns that are not filled yet have no query that sees them
        self.fixed = kept.until(kept.covered + self.max_cache_len - kept.columns.length)

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

    def get_seq_length(self) -> Any:
        return self.cumulative_length + self.dropped if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical_length, 0

    def get_max_length(self) -> int:
        return self.logical_length

    def reset(self) -> None:
        super().reset()
        # the next prompt may drop fewer tokens, and then needs a larger buffer
        self.max_cache_len, self.fixed, self.is_initialized = self.logical_length, None, False

    def _select(self, rows: Tensor) -> None:
        super()._select(rows)
        if self.fixed is not None:
            self.fixed = self.fixed.select(rows)


_THINNED: dict[type, type[Thinned]] = {
    DynamicLayer: ThinnedLayer,
    DynamicSlidingWindowLayer: ThinnedSlidingLayer,
    LinearAttentionLayer: ThinnedState,
    StaticLayer: ThinnedStaticLayer,
}


def _layer_of(cache: Cache | None, layer: int) -> Any:
    return None if cache is None or layer >= len(cache.layers) else cache.layers[layer]


def thinned(cache: Cache | None, layer: int) -> Thinned | None:
    """The layer of a cache if it is thinned."""
    held = _layer_of(cache, layer)
    return held if isinstance(held, Thinned) else None


def filled(cache: Cache | None, layer: int) -> int | None:
    """How many tokens a static cache layer has been given; None where its keys end with the last one."""
    held = _layer_of(cache, layer)
    if isinstance(held, StaticSlidingWindowLayer):
        return int(held.cumulative_length_int)
    return int(held.cumulative_length) if isinstance(held, StaticLayer) else None


def lazy_layer(cache: Cache, layer: int) -> Any:
    """The layer of a cache, which may be built only as far as layers have run."""
    while layer >= len(cache.layers) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer]


def thin(cache: Cache, layer: int, schedule: Schedule) -> Thinned:
    """The layer of a cache, made one that can be thinned; refuses a kind that cannot, and another schedule."""
    held = lazy_layer(cache, layer)
    if type(held) in _THINNED:
        # the same object, since cache and caller hold on to it, and maybe tokens in it
        held.__class__ = _THINNED[type(held)]
        held.become(schedule)
    if not isinstance(held, Thinned):
        raise Unsupported(
            f"cache layer {layer} is a {type(held).__name__}, from which tokens cannot be left out; use the "
            "default dynamic cache, or a static one on a model without sliding windows"
        )
    held.check(schedule)
    return held
