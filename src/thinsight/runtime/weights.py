"""What a model's weights are known by: a few of their numbers, in whatever dtype, place or wrapper they are loaded.

Files would tell checkpoints apart too, but a reduction meets a model in memory: cast, quantised, sharded, with an
adapter beside its layers. Knows nothing about reductions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import decoder_layers

_NUMBERS = 2  # of each weight
_WEIGHTS = 16  # of each layer that is looked at: a mixture may have thousands
_ROUNDING = 2.0**-8  # the most by which bfloat16 changes a number, as a share of it
_SMALL = 1e-4  # below it float16 changes more than that
_PLAIN = (Tensor, torch.nn.Parameter)


def weights_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a later load of these weights is recognised by, as JSON values.

    Returns:
        revision: the commit on the Hub that they came from, or None.
        dtype: that they are in now.
        numbers: by weight, numbers of it: of some weights of the first, the middle and the last decoder layer.
            Quantised ones and those on the meta device are left out, as are adapters'.
    """
    picked = dict(_picked(model))
    numbers = torch.stack([*picked.values()]).tolist() if picked else []
    return {
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "numbers": {name: [float(f"{n:.6g}") for n in own] for name, own in zip(picked, numbers, strict=True)},
    }


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether weights of the decoder's layers are integers, of 8 bits or less, or tensors of a quantiser's own type."""
    return any(
        weight.ndim > 1
        and weight.dtype != torch.bool
        and (weight.dtype.itemsize == 1 or not weight.is_floating_point() or type(weight) not in _PLAIN)
        for layer in decoder_layers(model)
        for weight in (*layer.parameters(), *layer.buffers())
    )


def _picked(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(`_NUMBERS`,) float32 on the CPU of each weight that is looked at, by its name behind the layer's number."""
    layers = decoder_layers(model)
    for number in sorted({0, len(layers) // 2, len(layers) - 1}):
        own = {name.replace(".base_layer", ""): weight for name, weight in layers[number].named_parameters()}
        usable = [name for name, weight in sorted(own.items()) if _is_plain(name, weight)]
        for name in usable[:: -(-len(usable) // _WEIGHTS) or 1]:
            flat = own[name].detach().flatten()
            places = torch.arange(_NUMBERS, device=flat.device) * (len(flat) - 1) // max(1, _NUMBERS - 1)
            yield f"{number}.{name}", flat[places].float().cpu()


def _is_plain(name: str, weight: Tensor) -> bool:
    known = (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype in known and weight.device.type != "meta" and weight.numel() > 0 and "lora_" not in name


def difference(model: PreTrainedModel, known: Mapping[str, Any]) -> str | None:
    """In what a model's weights are not those that `weights_of` gave; None where nothing speaks against it.

    Numbers may differ by what a change of dtype does to them. Where both are in one dtype they must be the same.
    """
    here = weights_of(model)
    same = here["dtype"] == known["dtype"]
    off = [
        name
        for name, numbers in known["numbers"].items()
        if name in here["numbers"]
        and any(_differ(a, b, same) for a, b in zip(numbers, here["numbers"][name], strict=False))
    ]
    if off:
        ours, theirs = here["numbers"][off[0]], list(known["numbers"][off[0]])
        shared = sum(name in here["numbers"] for name in known["numbers"])
        return f"{len(off)} of {shared} weights differ, such as {off[0]}: {ours[0]:g} here, {theirs[0]:g} there"
    return None


def _differ(one: float, other: float, same: bool) -> bool:
    if same:
        return one != other
    return abs(one - other) > _ROUNDING * max(abs(one), abs(other), _SMALL)
