"""What candidates of a search share: the layers above the one where they begin to differ, run once per batch.

Scores are the same with and without it, to the bit. Where keeping and reading snapshots takes longer than the
layers would (a fast device, a slow disk), it is given up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import StorageError
from ..ranking import TEXT_ATTENTION, get_ranker
from ..reduction import Reduction
from ..runtime import Handle, Snapshot, can_share, num_layers, resuming, snapshotting
from ..schedule import Schedule
from .store import DEFAULT_CACHE_GIB, Store

Batch = tuple[int, ...]
_PROBATION = 32  # passes that began at a snapshot, before it is judged whether that pays
_clock = time.perf_counter


class _Prefix(NamedTuple):
    """What decides whether a snapshot fits: the rates before a layer, the ranker and when it ranks."""

    rates: tuple[float, ...]
    ranker: str

    @classmethod
    def of(cls, reduction: Reduction, layer: int) -> _Prefix:
        ranker = json.dumps([reduction.ranker, reduction.rerank], sort_keys=True, default=repr)
        return cls(reduction.schedule.keep_rates[:layer], ranker)


class PrefixCache:
    """The latest snapshot of each batch, and from which layer the next candidates will differ.

    Args:
        model: a supported model; where its passes cannot be cut in two, nothing is ever shared.
        cache_gib: main memory for snapshots, in GiB; more goes into temporary files.
    """

    def __init__(self, model: Any, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        self._device = model.device
        self._possible = can_share(model)
        self._kept: Store[Snapshot] = Store(cache_gib)
        self._prefixes: dict[Batch, _Prefix] = {}
        self._announced: tuple[float, ...] = ()
        self._num_layers = num_layers(model)
        self._uses = 0
        self._spent = self._saved = 0.0  # seconds: keeping and reading snapshots, layers that did not run

    def share(self, schedule: Schedule, layer: int) -> None:
        """Say that the candidates to come have this schedule's rates before ``layer``; 0: nothing is kept any
        longer."""
        self._announced = schedule.keep_rates[:layer] if self._possible else ()
        if layer == 0:
            self._forget()

    def start(self, reduction: Reduction, batch: Sequence[int], cached: bool) -> int:
        """The layer at which a candidate's pass over a batch would begin: 0 where there is no snapshot for it.
        ``cached`` tells whether keys and values are needed after the pass."""
        known = self._prefixes.get(tuple(batch))
        if known is None or reduction.adaptive is not None:
            return 0
        layer = len(known.rates)
        if _Prefix.of(reduction, layer) != known:
            return 0
        snapshot = self._kept.outline(tuple(batch))
        assert snapshot is not None
        lacks_cache = cached and snapshot.cache is None
        lacks_attention = _by_attention(reduction) and _reduces(reduction, layer) and snapshot.state.attention is None
        return 0 if lacks_cache or lacks_attention else layer

    @contextmanager
    def scope(
        self, handle: Handle, reduction: Reduction, batch: Sequence[int], cached: bool
    ) -> Iterator[Callable[[Tensor], AbstractContextManager[None]]]:
        """A scope for a batch's first pass under a reduction, which `decode` takes as ``prompt_scope``: the pass
        begins where a snapshot is, and leaves one."""
        key, start = tuple(batch), self.start(reduction, batch, cached)
        # a snapshot is left where the announced rates end; attention is read only by a pass that reduces there, and
        # those to come will reduce there
        wanted = layer = len(self._announced)
        fits = reduction.adaptive is None and reduction.schedule.keep_rates[:layer] == self._announced
        if layer <= start or not fits or (_by_attention(reduction) and not _reduces(reduction, layer)):
            wanted = 0
        taken: list[Snapshot] = []

        @contextmanager
        def scope(prompt: Tensor) -> Iterator[None]:
            nonlocal taken
            with ExitStack() as stack:
                stack.enter_context(handle.prompt(prompt))
                if start:
                    began = self._now()
                    snapshot = self._kept.get(key)
                    assert snapshot is not None
                    snapshot = snapshot.to(self._device)
                    self._spent += self._now() - began
                    self._uses += 1
                    stack.enter_context(resuming(handle, snapshot))
                if wanted:
                    taken = stack.enter_context(snapshotting(handle, wanted))
                began = self._now()
                yield
                self._saved += (self._now() - began) * start / (self._num_layers - start)

        yield scope
        for snapshot in taken:
            began = self._now()
            try:
                self._kept.put(key, snapshot.to("cpu"))
            except StorageError:  # no room for a file: the search goes on without
                self._possible = False
                break
            self._prefixes[key] = _Prefix.of(reduction, wanted)
            self._spent += self._now() - began
        if self._uses >= _PROBATION and self._spent > self._saved:  # it costs more than it saves
            self._possible = False
        if not self._possible:
            self._forget()

    def _forget(self) -> None:
        self._announced = ()
        self._kept.clear()
        self._prefixes.clear()

    def _now(self) -> float:
        """Seconds, once the device has done what it was asked to."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return _clock()


def _by_attention(reduction: Reduction) -> bool:
    return TEXT_ATTENTION in get_ranker(reduction.ranker).needs


def _reduces(reduction: Reduction, layer: int) -> bool:
    rates = reduction.schedule.keep_rates
    return rates[layer] < rates[layer - 1]
