"""Between the first and the last decoder layer of a prefill nothing asks the device for a number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.family import IMAGES, PADDED, Family
from torch.utils._python_dispatch import TorchDispatchMode

from thinsight.runtime import apply, decoder_layers
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1, 0.7, 0.4, 0.2])
# what makes the host wait for the device: a number read, or a shape that depends on numbers
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}


class Watching(TorchDispatchMode):
    """Notes operations that wait, while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        if self.on and name in WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def inside_layers(model: Any, watching: Watching) -> Iterator[None]:
    """Watch from before the first layer's hooks until behind the last layer's."""
    layers = decoder_layers(model)

    def begin(*_: Any) -> None:
        watching.on = True

    def end(*_: Any) -> None:
        watching.on = False

    hooks = [layers[0].register_forward_pre_hook(begin, prepend=True), layers[-1].register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def waits(family: Family, specs: Any, **options: Any) -> list[str]:
    model = family.build()
    inputs = family.batch(family.rows(list(specs))).inputs
    watching = Watching()
    with apply(model, SCHEDULE, **options), inside_layers(model, watching), torch.no_grad(), watching:
        model(**inputs)
    return watching.found


@pytest.mark.parametrize("queries", ["instruction", "last"])
@pytest.mark.parametrize("per", ["image", "prompt"])
@for_each()
def test_layers_never_wait(family: Family, per: str, queries: str) -> None:
    assert waits(family, PADDED, per=per, ranker={"name": "text-attention", "queries": queries}) == []


@for_each()
def test_the_watch_would_see_it(family: Family) -> None:
    model = family.build()
    watching = Watching()

    def look(module: Any, args: Any, kwargs: Any) -> None:
        bool((args[0] if args else kwargs["hidden_states"]).sum() > 0)

    with inside_layers(model, watching), torch.no_grad(), watching:
        hook = decoder_layers(model)[2].register_forward_pre_hook(look, with_kwargs=True)
        model(**family.batch(family.rows(list(IMAGES))).inputs)
        hook.remove()
    assert watching.found == ["aten::_local_scalar_dense"]
