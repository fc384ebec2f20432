"""A forward pass in two parts: what enters one layer is kept, and a later pass over the same inputs begins there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import BadInput
from .anatomy import decoder_layers, sliding_layers, state_layers
from .cache import Kept, ThinnedLayer, cache_of, lazy_layer, thin
from .handle import Handle
from .reducer import PassState
from .tensors import Mapped


@dataclass(frozen=True)
class _CacheLayer:
    """What one layer of a dynamic cache held, and of a thinned one what it knew."""

    keys: Tensor
    values: Tensor
    dropped: int
    kept: Kept | None


@dataclass(frozen=True)
class Snapshot(Mapped):
    """All that the layers from ``layer`` on need of those before it, for one batch of inputs."""

    layer: int  # the first one that has not run
    states: Tensor  # (batch, physical, hidden): what enters it
    state: PassState  # which vision tokens are there, and what was read to rank them
    cache: tuple[_CacheLayer, ...] | None  # keys and values of the layers before; None where the pass kept none
    outputs: int  # how many a layer has, 0 for a bare tensor


def can_share(model: Any) -> bool:
    """Whether passes of a model can be cut in two: not where layers have a sliding window, or carry a state, whose
    caches hold more than keys and values, nor where they are on several devices."""
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(devices) <= 1 and not sliding_layers(model) and not state_layers(model)


@contextmanager
def snapshotting(handle: Handle, layer: int) -> Iterator[list[Snapshot]]:
    """The next pass with vision tokens leaves a snapshot of what enters ``layer``, before it is reduced, in the list
    yielded; none where the pass's cache is of a kind that is not kept."""
    layers = decoder_layers(handle.model)
    if not 1 <= layer < len(layers):
        raise BadInput(f"layer is {layer}; it must be from 1 to {len(layers) - 1}")
    taken: list[Snapshot] = []
    outputs = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal outputs
        outputs = len(output) if isinstance(output, tuple) else 0

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run, cache = handle.local.run, cache_of(kwargs)
        if run is None or taken:
            return
        held = None if cache is None else _cache_layers(cache, layer)
        if cache is None or held is not None:
            states = args[0] if args else kwargs["hidden_states"]
            taken.append(Snapshot(layer, states.detach(), run.state(), held, outputs))

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
        dropped, kept = (held.dropped, held.kept) if isinstance(held, ThinnedLayer) else (0, None)
        found.append(_CacheLayer(held.keys, held.values, dropped, kept))
    return tuple(found)


@contextmanager
def resuming(handle: Handle, snapshot: Snapshot) -> Iterator[None]:
    """The next pass with vision tokens begins at the snapshot's layer.

    It must be over the inputs of the pass that left the snapshot, under a reduction of the same ranker and
    the same rates before that layer; nothing of this can be checked here. Leave the context before tokens
    are decoded: while it lasts, the layers before do nothing, in any thread. The snapshot is on the model's device.
    """
    layers = decoder_layers(handle.model)
    skipped = layers[: snapshot.layer]
    # The model's loop over its layers stays: those before get a forward that passes on what it is given, which
    # `enter` then replaces. So masks and rotary tables are made as ever, and no family needs to be known here.
    own = [layer.__dict__.get("forward") for layer in skipped]  # device maps put one there

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run, cache = handle.local.run, cache_of(kwargs)
        if run is None:
            return None
        run.restore(snapshot.state)
        if cache is not None:
            _fill(cache, snapshot, handle)
        if args:
            return (snapshot.states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": snapshot.states}

    def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (snapshot.outputs - 1)) if snapshot.outputs else hidden_states

    hook = layers[snapshot.layer].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with handle.local.having(first=snapshot.layer):
            for layer in skipped:
                layer.forward = pass_on
            yield
    finally:
        for layer, forward in zip(skipped, own, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
        hook.remove()


def _fill(cache: Cache, snapshot: Snapshot, handle: Handle) -> None:
    """Give an empty cache the layers of the snapshot."""
    assert snapshot.cache is not None
    for number, stored in enumerate(snapshot.cache):
        held: Any = lazy_layer(cache, number)
        if stored.kept is not None:
            held = thin(cache, number, handle.schedule)
            held.dropped, held.kept = stored.dropped, stored.kept
        held.lazy_initialization(stored.keys, stored.values)
        held.keys, held.values = stored.keys, stored.values
