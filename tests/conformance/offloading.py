"""Offloaded caches without an accelerator: a layer that is offloaded really loses its keys and values.

Streams do nothing on one device, so they are stand-ins. Offloading is not: keys and values go to the "meta"
device, which has shapes but no numbers, and come back when the cache prefetches them; whoever reads a layer
that is away fails. Knows nothing about the library under test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.cache_utils import CacheLayerMixin


class _Stream:
    """A stream on which work is done at once."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        """Nothing is under way."""


def _offload(layer: Any, seen: Counter[str]) -> None:
    seen[type(layer).__name__] += 1
    layer.away = layer.keys, layer.values
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")


def _prefetch(layer: Any) -> None:
    if layer.is_initialized and layer.keys.is_meta:
        layer.keys, layer.values = layer.away
        del layer.away


@contextmanager
def offloading_on_cpu() -> Iterator[Counter[str]]:
    """While it lasts, caches offload as they do to another device; counts by class of layer how often."""
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", _Stream)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        patch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
        patch.setattr(CacheLayerMixin, "offload", lambda layer: _offload(layer, seen))
        patch.setattr(CacheLayerMixin, "prefetch", _prefetch)
        yield seen
