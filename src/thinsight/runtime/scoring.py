"""Reads a few rows of one attention module's softmax, whatever attention implementation runs.

A module is *armed* for one call: its config says "thinsight_scoring" for that long, a registered attention
function that sees queries and keys as attention does (rotated, normalised, cached), computes the wanted rows
and then calls the real implementation, whose result is returned untouched. Knows nothing about vision tokens,
ranking or schedules.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
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
_wanted = threading.local()  # .requests: {id(module): [Request]}, of this thread


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
) -> Tensor:
    """The softmax of some query rows over all keys.

    Args:
        query: (batch, heads, queries, dim), as the attention implementation gets it.
        key: (batch, key heads, keys, dim); key heads divide heads.
        mask: (batch or 1, heads or 1, queries, keys) bool or float, (batch, keys) bool or int, a
            `BlockMask`, or None.
        scaling: factor of the dot products.
        rows: (batch, rows) int64, which queries.
        is_causal: whether a query sees only keys up to its own place, where the mask does not say.
        cached: the place of the first query among the keys; the last queries' if not given.
        softcap: tanh limit of the logits, for models that have one.

    Returns:
        (batch, heads, rows, keys) float32.
    """
    batch, heads, _, dim = query.shape
    if batch == 1:
        picked = query.index_select(2, rows[0])
    else:
        place = torch.arange(batch, device=rows.device)[:, None]
        picked = query[place, :, rows].transpose(1, 2)
    picked = picked.float() * scaling  # (batch, heads, rows, dim)
    # heads that share a key head are put in one group, so that keys need not be repeated
    grouped = picked.reshape(batch * key.shape[1], -1, dim)  # (batch * key heads, heads of each * rows, dim)
    # flat before it is transposed: the product would copy a transposed batch of keys element by element
    logits = grouped @ key.float().flatten(0, 1).transpose(1, 2)
    logits = logits.view(batch, heads, -1, key.shape[2])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    added = _added(mask, query, key, rows, is_causal, cached)
    return (logits if added is None else logits.add_(added)).softmax(dim=-1)


def _added(
    mask: Tensor | BlockMask | None, query: Tensor, key: Tensor, rows: Tensor, is_causal: bool, cached: int | None
) -> Tensor | None:
    """What the mask adds to the logits of some query rows, (batch, heads or 1, rows, keys) float32; None
    where it hides nothing.

    Filling the logits themselves, which are as many times larger as there are heads, takes longer than their
    product.
    """
    batch, keys = query.shape[0], key.shape[2]
    lowest = torch.finfo(torch.float32).min
    if isinstance(mask, BlockMask):
        return _zeros(~_seen(mask, rows, keys), lowest)
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys].expand(batch, -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(batch, mask.shape[1], -1, keys))
        return _zeros(~mask, lowest) if mask.dtype == torch.bool else mask.float().clamp(min=lowest)
    added = None
    if is_causal:
        last_seen = rows + (keys - query.shape[2] if cached is None else cached)  # (batch, rows)
        later = torch.arange(keys, device=key.device) > last_seen[:, :, None]
        added = _zeros(later, -torch.inf)[:, None]
    if mask is not None:
        padding = ~mask.bool()[:, None, None, :keys]
        added = _zeros(padding, lowest) if added is None else added.masked_fill_(padding, lowest)
    return added


def _zeros(hidden: Tensor, fill: float) -> Tensor:
    """Float32 zeros, but for `fill` where `hidden` (bool) is True."""
    return torch.where(hidden, fill, torch.zeros((), dtype=torch.float32, device=hidden.device))


def _seen(mask: BlockMask, rows: Tensor, keys: int) -> Tensor:
    """What some query rows (batch, rows) see by flex attention's mask, a function: (batch, 1, rows, keys)."""
    key = torch.arange(keys, device=rows.device)
    row = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    shape = (*rows.shape, keys)
    seen = mask.mask_mod(row, torch.zeros_like(row), rows[:, :, None], key.expand(shape))
    return seen.expand(shape)[:, None]


class Request:
    """What is wanted from one attention call; holds the answer afterwards."""

    result: Tensor | None = None
    filled: int | None = None  # tokens in a static cache, whose keys go on behind the new ones

    def cached(self, query: Tensor, key: Tensor) -> int:
        """How many keys stand in front of those of the queries."""
        most = key.shape[2] - query.shape[2]
        return most if self.filled is None else min(most, self.filled)  # a window shows the last ones only

    def read(self, rows_of: Callable[[Tensor], Tensor], query: Tensor, key: Tensor) -> None:
        """Compute `result`, with `rows_of(rows (batch, n)) -> (batch, heads, n, keys)` at hand."""
        raise NotImplementedError


class TextRows(Request):
    """Rows of new tokens over columns of new tokens: result (batch, heads, rows, columns) float32, or, with
    ``weights``, its mean over heads and weighted rows (batch, columns)."""

    def __init__(
        self, rows: Tensor, columns: Tensor, valid: Tensor, filled: int | None = None, weights: Tensor | None = None
    ) -> None:
        self.rows = rows  # (batch, rows) physical columns of this pass
        self.weights = weights  # (batch, rows) float32, see `row_weights`
        self.columns = columns  # (batch, columns) likewise
        self.valid = valid  # (batch, columns) bool: the others receive nothing
        self.filled = filled

    def read(self, rows_of: Callable[[Tensor], Tensor], query: Tensor, key: Tensor) -> None:
        rows = rows_of(self.rows.to(query.device))
        columns, cached = self.columns.to(query.device), self.cached(query, key)
        if cached:
            columns = columns + cached
        valid = self.valid.to(query.device)
        if self.weights is not None:
            received = weighted_rows(rows, self.weights.to(query.device))  # (batch, keys)
            self.result = torch.where(valid, received.gather(1, columns), 0)
            return
        columns = columns[:, None, None, :].expand(*rows.shape[:3], -1)
        self.result = torch.where(valid[:, None, None, :], rows.gather(3, columns), 0)


class VisionReceived(Request):
    """What each column receives, mean over heads: from row 0 (a CLS token), or from the average row.

    Result (batch, columns) float32.
    """

    def __init__(self, from_class_token: bool) -> None:
        self.from_class_token = from_class_token

    def read(self, rows_of: Callable[[Tensor], Tensor], query: Tensor, key: Tensor) -> None:
        batch, _, queries, _ = query.shape
        wanted = 1 if self.from_class_token else queries
        total = query.new_zeros((batch, key.shape[2]), dtype=torch.float32)
        for rows in torch.arange(wanted, device=query.device).split(_ROWS_AT_ONCE):
            total += rows_of(rows.expand(batch, -1)).mean(1).sum(1)
        self.result = total / wanted


class _Arming:
    """How many calls have one module armed; swaps its config for the first and back after the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: Counter[Probe] = Counter()  # armed and not disarmed, by whom; of all threads
        self.original: Any = None
        self.implementation = ""  # outlives `down`: another thread may still be inside a call that it armed
        self._armed: Any = None  # a copy of the config as it was when last armed
        self._settings: dict[str, Any] = {}

    def up(self, attention: nn.Module, probe: Probe) -> None:
        with self.lock:
            self.calls[probe] += 1
            if self.calls.total() == 1:
                self.original = attention.config
                settings = vars(self.original)
                if self._armed is None or settings != self._settings:
                    self._copy(settings)
                _put_config(attention, self._armed)

    def _copy(self, settings: dict[str, Any]) -> None:
        self.implementation = self.original._attn_implementation
        self._armed = copy.copy(self.original)
        # not through the public setter: that one also writes to the shared configs inside
        self._armed._attn_implementation_internal = _NAME
        self._settings = dict(settings)

    def down(self, attention: nn.Module, probe: Probe, *, all_of_it: bool = False) -> None:
        with self.lock:
            calls = self.calls[probe] if all_of_it else 1
            self.calls -= Counter({probe: calls})  # which leaves nothing of it behind at 0
            if calls and not self.calls:
                _put_config(attention, self.original)


def _put_config(attention: nn.Module, config: Any) -> None:
    """Without nn.Module's own way of setting attributes, whose questions take longer than all else here."""
    attention.__dict__["config"] = config


_armings: weakref.WeakKeyDictionary[nn.Module, _Arming] = weakref.WeakKeyDictionary()


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
        _requests().setdefault(id(self.attention), []).append(request)
        self._arming.up(self.attention, self)

    def answer(self) -> Tensor | None:
        """What the armed call has read so far, in this thread."""
        request: Request | None = getattr(self._own, "request", None)
        return None if request is None else request.result

    def disarm(self) -> Request | None:
        """Undo `arm`; the request with its answer, or None when this thread had not armed the module."""
        request: Request | None = getattr(self._own, "request", None)
        if request is not None:
            self._own.request = None
            _requests()[id(self.attention)].remove(request)
            self._arming.down(self.attention, self)
        return request

    def restore(self) -> None:
        """Put the config back whatever happened (an interrupt leaves no time to disarm)."""
        self.disarm()
        self._arming.down(self.attention, self, all_of_it=True)


def _requests() -> dict[int, list[Request]]:
    if not hasattr(_wanted, "requests"):
        _wanted.requests = {}
    return _wanted.requests


@torch.compiler.disable
def _scoring_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: reads what is wanted, then lets the real implementation run."""
    requests = _requests().get(id(module))
    if requests:
        scaling = kwargs.get("scaling")
        is_causal = kwargs.get("is_causal")

        def rows_of(request: Request, rows: Tensor) -> Tensor:
            return attention_rows(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                rows,
                is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
                cached=request.cached(query, key),
                softcap=kwargs.get("softcap"),
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
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise Unsupported(f"{type(module).__name__} has no eager attention to call; load the model with sdpa")
