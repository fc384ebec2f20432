"""A forward pass in two parts: what enters one layer is kept, and a later pass over the same inputs begins
there.

Reductions that agree above a layer share all that is computed above it. Knows nothing about who asks for it,
or when it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import BadInput
from .cache import Kept, ThinnedLayer, cache_of, thin
from .families import decoder_layers, sliding_layers
from .handle import Handle
from .layout import Columns
from .reducer import PassState

Mapped = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class _CacheLayer:
    """What one layer of a dynamic cache held, and of a thinned one what it knew."""

    keys: Tensor
    values: Tensor
    dropped: int
    kept: Kept | None
    thinned: bool


@dataclass(frozen=True)
class Snapshot:
    """All that the layers from ``layer`` on need of those before it, for one batch of inputs.

    Attributes:
        layer: the first layer that has not run.
        states: (batch, physical, hidden), what enters it.
        state: which vision tokens are there, and what was read to rank them.
        cache: keys and values of the layers before; None where the pass kept none.
        outputs: how many outputs a layer has, 0 for a bare tensor.
    """

    layer: int
    states: Tensor
    state: PassState
    cache: tuple[_CacheLayer, ...] | None
    outputs: int

    def to(self, device: torch.device | str) -> Snapshot:
        """On another device."""
        return self.mapped(lambda _, tensor: tensor.to(device))

    def mapped(self, function: Mapped) -> Snapshot:
        """With every tensor replaced by ``function(name, tensor)``."""
        cache = self.cache
        if cache is not None:
            cache = tuple(
                replace(
                    held,
                    keys=function(f"keys.{number}", held.keys),
                    values=function(f"values.{number}", held.values),
                    kept=_mapped_kept(f"kept.{number}", held.kept, function),
                )
                for number, held in enumerate(cache)
            )
        return replace(
            self, states=function("states", self.states), state=_mapped_state(self.state, function), cache=cache
        )


def _mapped_columns(name: str, columns: Columns | None, function: Mapped) -> Columns | None:
    if columns is None:
        return None
    valid = None if columns.valid is None else function(f"{name}.valid", columns.valid)
    return Columns(function(f"{name}.index", columns.index), valid)


def _mapped_kept(name: str, kept: Kept | None, function: Mapped) -> Kept | None:
    if kept is None:
        return None
    columns = _mapped_columns(name, kept.columns, function)
    assert columns is not None
    return Kept(columns, kept.covered)


def _mapped_state(state: PassState, function: Mapped) -> PassState:
    def optional(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(name, tensor)

    return replace(
        state,
        alive=function("alive", state.alive),
        columns=_mapped_columns("columns", state.columns, function),
        take=optional("take", state.take),
        kept=_mapped_kept("record", state.kept, function),
        attention=optional("attention", state.attention),
        scores=optional("scores", state.scores),
        trace=tuple((start, function(f"trace.{start}", alive)) for start, alive in state.trace),
    )


def can_share(model: Any) -> bool:
    """Whether passes of a model can be cut in two.

    Not where layers have a sliding window, whose caches hold more than keys and values, nor where they are on
    several devices.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(devices) <= 1 and not sliding_layers(model)


@contextmanager
def snapshotting(handle: Handle, layer: int) -> Iterator[list[Snapshot]]:
    """The next pass with vision tokens leaves a snapshot of what enters ``layer``, before it is reduced.

    Yields:
        A list that then holds it. It stays empty where the pass's cache is of a kind that is not kept.

    Raises:
        ThinsightError: ``layer`` is not from 1 to L - 1.
    """
    layers = decoder_layers(handle.model)
    if not 1 <= layer < len(layers):
        raise BadInput(f"layer is {layer}; it must be from 1 to {len(layers) - 1}")
    taken: list[Snapshot] = []
    outputs = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal outputs
        outputs = len(output) if isinstance(output, tuple) else 0

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        state = handle.state()
        if state is None or taken:
            return
        cache = cache_of(kwargs)
        held = None if cache is None else _cache_layers(cache, layer)
        if cache is None or held is not None:
            states = args[0] if args else kwargs["hidden_states"]
            taken.append(Snapshot(layer, states.detach(), state, held, outputs))

    hooks = [
        layers[layer - 1].register_forward_hook(count),
        # before the handle's own, which reduces
        layers[layer].register_forward_pre_hook(take, with_kwargs=True, prepend=True),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _cache_layers(cache: Cache, count: int) -> tuple[_CacheLayer, ...] | None:
    found = []
    for held in cache.layers[:count]:
        if type(held) not in (DynamicLayer, ThinnedLayer):
            return None
        thinned = isinstance(held, ThinnedLayer)
        dropped, kept = (held.dropped, held.kept) if thinned else (0, None)
        found.append(_CacheLayer(held.keys, held.values, dropped, kept, thinned))
    return tuple(found)


@contextmanager
def resuming(handle: Handle, snapshot: Snapshot) -> Iterator[None]:
    """The next pass with vision tokens begins at the snapshot's layer.

    It must be over the inputs of the pass that left the snapshot, under a reduction of the same ranker and
    the same rates before that layer; nothing of this can be checked here. Leave the context before tokens
    are decoded: while it lasts, the layers before do nothing, in any thread.

    Args:
        handle: of a reduction that is on.
        snapshot: on the model's device.
    """
    layers = decoder_layers(handle.model)
    skipped = layers[: snapshot.layer]
    own = [layer.__dict__.get("forward") for layer in skipped]  # device maps put one there

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not handle.restore(snapshot.state):
            return None
        cache = cache_of(kwargs)
        if cache is not None:
            _fill(cache, snapshot, handle)
        if args:
            return (snapshot.states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": snapshot.states}

    def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (snapshot.outputs - 1)) if snapshot.outputs else hidden_states

    hook = layers[snapshot.layer].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with handle.starting_at(snapshot.layer):
            for layer in skipped:
                layer.forward = pass_on
            yield
    finally:
        _restore_forwards(skipped, own)
        hook.remove()


def _restore_forwards(layers: Sequence[Any], own: Sequence[Any]) -> None:
    for layer, forward in zip(layers, own, strict=True):
        layer.__dict__.pop("forward", None)
        if forward is not None:
            layer.forward = forward


def _fill(cache: Cache, snapshot: Snapshot, handle: Handle) -> None:
    """Give an empty cache the layers of the snapshot."""
    assert snapshot.cache is not None
    for number, stored in enumerate(snapshot.cache):
        while number >= len(cache.layers):
            assert cache.layer_class_to_replicate is not None
            cache.layers.append(cache.layer_class_to_replicate())  # a lazily built cache
        if stored.thinned:
            thinned = thin(cache, number, handle.schedule)
            thinned.dropped, thinned.kept = stored.dropped, stored.kept
        held: Any = cache.layers[number]
        held.lazy_initialization(stored.keys, stored.values)
        held.keys, held.values = stored.keys, stored.values
