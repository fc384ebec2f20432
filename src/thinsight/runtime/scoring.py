"""Reads a few rows of one attention module's softmax, whatever attention implementation runs.

Fused kernels return no weights, and asking for all of them (`output_attentions`) would cost a matrix of
queries x keys per head. So a module is *armed* for one call: its config says "thinsight_scoring" for that long,
a registered attention function that sees queries and keys as attention does (rotated, normalised, cached),
computes the wanted rows and then calls the real implementation, whose result is returned untouched.
Knows nothing about vision tokens, ranking or schedules.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from ..errors import Unsupported
from ..ranking import full_precision, weighted_rows

_NAME = "thinsight_scoring"
_ROWS_AT_ONCE = 128  # bounds the memory of whole-matrix requests
_NUMBERS_AT_ONCE = 1 << 24  # of logits, or of keys in float32, that are held at a time: 64 MiB


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | BlockMask | None,
    scaling: float,
    rows: Tensor,
    *,
    is_causal: bool,
    cached: int | None = None,
    softcap: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The softmax of some query rows over all keys: (batch, heads, rows, keys) float32; with `weights`, their mean over
    heads and weighted rows, (batch, keys), for which at most 64 MiB of the softmax are held at once, or one key head's.

    Args:
        query: (batch, heads, queries, dim), as the attention implementation gets it.
        key: (batch, key heads, keys, dim); key heads divide heads.
        mask: (batch or 1, heads or 1, queries, keys) bool or float, (batch, keys) bool or int, or a `BlockMask`.
        scaling: factor of the dot products.
        rows: (batch, rows) int64, which queries.
        is_causal: whether a query sees only keys up to its own place, where the mask does not say.
        cached: the place of the first query among the keys; the last queries' if not given.
        softcap: tanh limit of the logits, for models that have one.
        weights: (batch, rows) float32, see `ranking.row_weights`.
    """
    batch, heads, _, dim = query.shape
    _, key_heads, keys, _ = key.shape
    if batch == 1:
        picked = query.index_select(2, rows[0])
    else:
        place = torch.arange(batch, device=rows.device)[:, None]
        picked = query[place, :, rows].transpose(1, 2)
    # Float32 whatever the model runs in: tokens are ordered by what comes out, and the two or three digits
    # of bfloat16 would make ties of them. It is a few rows; the layer itself stays as it is.
    picked = picked.float() * scaling  # (batch, heads, rows, dim)
    added = _added(mask, query, key, rows, is_causal, cached)

    def softmax(row: slice, head: slice) -> Tensor:
        """Of some rows of the batch and some key heads: (some, heads of them, rows, keys)."""
        # Heads that share a key head (grouped-query attention) follow each other, so they can be taken for more
        # rows of that one head, and keys need not be repeated for each of them. Flat before it is transposed: the
        # product would copy a transposed batch of keys element by element.
        some, shared = key[row, head].float(), slice(head.start * heads // key_heads, head.stop * heads // key_heads)
        grouped = picked[row, shared].reshape(some.shape[0] * some.shape[1], -1, dim)
        logits = (grouped @ some.flatten(0, 1).transpose(1, 2)).view(some.shape[0], -1, rows.shape[1], keys)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if added is not None:
            logits.add_(added[row] if added.shape[1] == 1 else added[row, shared])
        return logits.softmax(dim=-1)

    # How many heads at once goes by the lengths alone, so that a row is summed alike in whatever batch it is.
    each = keys * max(dim, heads // key_heads * rows.shape[1])
    at_once = min(key_heads, max(1, _NUMBERS_AT_ONCE // each))
    rows_at_once = min(batch, max(1, _NUMBERS_AT_ONCE // (each * at_once)))
    blocks = [slice(at, min(at + at_once, key_heads)) for at in range(0, key_heads, at_once)]
    found = []
    for start in range(0, batch, rows_at_once):
        row = slice(start, start + rows_at_once)
        if weights is None:
            found.append(torch.cat([softmax(row, head) for head in blocks], dim=1))
            continue
        parts = ((softmax(row, head), (head.stop - head.start) / key_heads) for head in blocks)
        found.append(sum((weighted_rows(part, weights[row]) * share for part, share in parts), start=torch.zeros(())))
    return torch.cat(found)


def _added(
    mask: Tensor | BlockMask | None, query: Tensor, key: Tensor, rows: Tensor, is_causal: bool, cached: int | None
) -> Tensor | None:
    """What the mask adds to the logits of some query rows, (batch, heads or 1, rows, keys) float32; None
    where it hides nothing. Added, for filling the logits, larger by the number of heads, takes longer than
    their product.
    """
    batch, keys = query.shape[0], key.shape[2]
    lowest = torch.finfo(torch.float32).min
    if isinstance(mask, BlockMask):
        # a function of row, head, query and key
        row = torch.arange(batch, device=rows.device)[:, None, None]
        key_place = torch.arange(keys, device=rows.device).expand(*rows.shape, keys)
        seen = mask.mask_mod(row, torch.zeros_like(row), rows[:, :, None], key_place)
        return _zeros(~seen.expand_as(key_place)[:, None], lowest)
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys].expand(batch, -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(batch, mask.shape[1], -1, keys))
        return _zeros(~mask, lowest) if mask.dtype == torch.bool else mask.float().clamp(min=lowest)
    added = None
    if is_causal:
        # A mask of two dimensions, or none, leaves order to the kernel (`is_causal`), which never saw it.
        last_seen = rows + (keys - query.shape[2] if cached is None else cached)  # (batch, rows)
        later = torch.arange(keys, device=key.device) > last_seen[:, :, None]
        added = _zeros(later, -torch.inf)[:, None]
    if mask is not None:
        # not -inf: a row of padding sees padding alone, and must not come out of the softmax as NaN
        padding = ~mask.bool()[:, None, None, :keys]
        added = _zeros(padding, lowest) if added is None else added.masked_fill_(padding, lowest)
    return added


def _zeros(hidden: Tensor, fill: float) -> Tensor:
    """Float32 zeros, but for `fill` where `hidden` (bool) is True."""
    return torch.where(hidden, fill, torch.zeros((), dtype=torch.float32, device=hidden.device))


class Request:
    """What is wanted from one attention call; holds the answer afterwards."""

    result: Tensor | None = None
    filled: int | None = None  # tokens in a static cache, whose keys go on behind the new ones

    def cached(self, query: Tensor, key: Tensor) -> int:
        """How many keys stand in front of those of the queries."""
        most = key.shape[2] - query.shape[2]
        return most if self.filled is None else min(most, self.filled)  # a window shows the last ones only

    def read(self, rows_of: Callable[..., Tensor], query: Tensor, key: Tensor) -> None:
        """Compute `result`; `rows_of(rows (batch, n), weights=None)` is `attention_rows`."""
        raise NotImplementedError


@dataclass(eq=False)
class TextRows(Request):
    """Rows of new tokens over columns of new tokens: result (batch, heads, rows, columns) float32, or, with
    ``weights``, its mean over heads and weighted rows (batch, columns)."""

    rows: Tensor  # (batch, rows) physical columns of this pass
    columns: Tensor  # (batch, columns) likewise
    valid: Tensor  # (batch, columns) bool: the others receive nothing
    filled: int | None = None
    weights: Tensor | None = None  # (batch, rows) float32, see `row_weights`

    def read(self, rows_of: Callable[..., Tensor], query: Tensor, key: Tensor) -> None:
        rows = self.rows.to(query.device)
        columns, cached = self.columns.to(query.device), self.cached(query, key)
        if cached:
            columns = columns + cached
        valid = self.valid.to(query.device)
        if self.weights is not None:
            received = rows_of(rows, self.weights.to(query.device))  # (batch, keys)
            self.result = torch.where(valid, received.gather(1, columns), 0)
            return
        read = rows_of(rows)
        columns = columns[:, None, None, :].expand(*read.shape[:3], -1)
        self.result = torch.where(valid[:, None, None, :], read.gather(3, columns), 0)


@dataclass(eq=False)
class VisionReceived(Request):
    """What each column receives, mean over heads, (batch, columns) float32: from row 0 (a CLS token), or from the
    average row."""

    from_class_token: bool

    def read(self, rows_of: Callable[..., Tensor], query: Tensor, key: Tensor) -> None:
        batch, _, queries, _ = query.shape
        wanted = 1 if self.from_class_token else queries
        total = query.new_zeros((batch, key.shape[2]), dtype=torch.float32)
        for rows in torch.arange(wanted, device=query.device).split(_ROWS_AT_ONCE):
            total += rows_of(rows.expand(batch, -1), torch.ones((batch, len(rows)), device=query.device))
        self.result = total / wanted


class _Arming:
    """How many calls have one module armed; swaps its config for the first and back after the last.

    The config is of the module, and so of all threads and of every `Probe` on it: it may go back only when the
    last of them is done. That a thread without a request runs into an armed module does no harm, for the
    scoring function then goes straight to the real one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: Counter[Probe] = Counter()  # armed and not disarmed, by whom; of all threads
        self.original: Any = None
        self.implementation = ""  # outlives `down`: another thread may still be inside a call that it armed
        self._armed: Any = None  # a copy of the config as it was when last armed, for copying takes long
        self._settings: dict[str, Any] = {}

    def up(self, attention: nn.Module, probe: Probe) -> None:
        with self.lock:
            self.calls[probe] += 1
            if self.calls.total() > 1:
                return
            self.original = attention.config
            settings = vars(self.original)
            if self._armed is None or settings != self._settings:
                self._settings = dict(settings)
                self.implementation = self.original._attn_implementation
                # The decoder's layers share one config, which the model asks for masks: only this module may
                # see another. Not through the public setter: that one also writes to the configs inside.
                self._armed = copy.copy(self.original)
                self._armed._attn_implementation_internal = _NAME
            # past nn.Module's own way of setting attributes, whose questions take longer than all else here
            attention.__dict__["config"] = self._armed

    def down(self, attention: nn.Module, probe: Probe, *, all_of_it: bool = False) -> None:
        with self.lock:
            calls = self.calls[probe] if all_of_it else 1
            self.calls -= Counter({probe: calls})  # which leaves nothing of it behind at 0
            if calls and not self.calls:
                attention.__dict__["config"] = self.original


_armings: weakref.WeakKeyDictionary[nn.Module, _Arming] = weakref.WeakKeyDictionary()


class _Wanted(threading.local):
    def __init__(self) -> None:
        self.requests: dict[int, list[Request]] = {}  # of this thread, by id of the module


_wanted = _Wanted()


class Probe:
    """Arms one attention module, one call at a time. Each thread reads its own calls only."""

    def __init__(self, attention: nn.Module) -> None:
        AttentionInterface.register(_NAME, _scoring_attention)
        self.attention = attention
        self._arming = _armings.setdefault(attention, _Arming())
        self._own = threading.local()  # .request, of this thread's call

    def arm(self, request: Request) -> None:
        """From now on, this thread's calls of the module answer `request`."""
        self.disarm()
        self._own.request = request
        _wanted.requests.setdefault(id(self.attention), []).append(request)
        self._arming.up(self.attention, self)

    def disarm(self) -> Request | None:
        """Undo `arm`; the request with its answer, or None when this thread had not armed the module."""
        request: Request | None = getattr(self._own, "request", None)
        if request is not None:
            self._own.request = None
            _wanted.requests[id(self.attention)].remove(request)
            self._arming.down(self.attention, self)
        return request

    def restore(self) -> None:
        """Put the config back whatever happened (an interrupt leaves no time to disarm)."""
        self.disarm()
        self._arming.down(self.attention, self, all_of_it=True)


@torch.compiler.disable
def _scoring_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: reads what is wanted, then lets the real implementation run."""
    requests = _wanted.requests.get(id(module))
    if requests:
        # Queries and keys are here as the kernel gets them: rotated, normalised, and keys with the cache in
        # front. Rows computed from hidden states would have to know each family's way there.
        scaling = kwargs.get("scaling")
        is_causal = kwargs.get("is_causal")

        def rows_of(request: Request, rows: Tensor, weights: Tensor | None = None) -> Tensor:
            return attention_rows(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                rows,
                is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
                cached=request.cached(query, key),
                softcap=kwargs.get("softcap"),
                weights=weights,
            )

        with torch.no_grad(), full_precision(query.device):
            for request in requests:
                request.read(partial(rows_of, request), query, key)
    return _real_attention(module)(module, query, key, value, attention_mask, **kwargs)


def _real_attention(module: nn.Module) -> Callable[..., Any]:
    """The implementation that the module would run if it were not armed."""
    name = _armings[module].implementation
    if name != "eager":
        return AttentionInterface()[name]
    # eager attention is in no table: each modelling file has a function of its own under this name
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise Unsupported(f"{type(module).__name__} has no eager attention to call; load the model with sdpa")
