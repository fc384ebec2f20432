"""Linear layers whose weights lie as the CPU's matrix kernels read them.

A plain linear layer has its weights reordered by the kernel in every call. For many tokens that is next to
nothing, but not for the few that enter the deep layers of a reduced model, nor for decoding.
Knows nothing about reductions: a packed model runs with and without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import BadInput, Unsupported
from .runtime import decoder_layers
from .runtime.families import unwrapped

SMALLEST = 2**19
"""Layers of fewer weights gain nothing (measured on AVX2, for 1 to 640 tokens)."""


def pack(model: Any, smallest: int = SMALLEST) -> PackedModel:
    """Reorder the weights of a model's decoder, once, into the order in which oneDNN's kernels read them.

    Worth it on a CPU at small batches, for prefill with few tokens and for decoding. Products are summed in
    another order than before, so logits may differ in their last bits. Weights are held once, not twice;
    ``state_dict``, ``save_pretrained``, pickling and copying give plain ones. The linear layers of the
    decoder's layers are packed, and the head where it shares its weights with nothing; subclasses of
    ``nn.Linear`` (quantised layers, adapters) stay as they are.

    Args:
        model: in eval mode, its decoder on the CPU in float32 (or bfloat16, where the CPU has instructions
            for it).
        smallest: layers of fewer weights than this stay as they are.

    Returns:
        A handle: ``unpack()``, or leaving its ``with`` block, puts the plain weights back, bit for bit.

    Raises:
        ThinsightError: training mode, another device or dtype, a torch without oneDNN, or nothing to pack.
    """
    model = unwrapped(model)
    if model.training:
        raise BadInput("the model is in training mode: packed weights cannot learn; call model.eval()")
    layers = [(name, layer) for name, layer in _linear_layers(model) if layer.weight.numel() >= smallest]
    if not layers:
        raise Unsupported(
            f"the model's decoder has no plain linear layer of {smallest} weights or more, and packing "
            "smaller ones gains nothing: leave pack out"
        )
    for name, layer in layers:
        _check(name, layer.weight)
    for _, layer in layers:
        _pack(layer)
    return PackedModel(model, [layer for _, layer in layers])


def packed_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a model that are packed."""
    return [module for module in model.modules() if isinstance(module, _PackedLinear)]


class PackedModel:
    """A model whose decoder is packed."""

    def __init__(self, model: PreTrainedModel, layers: list[nn.Linear]) -> None:
        self.model = model
        self._layers = layers

    def __repr__(self) -> str:
        return f"PackedModel({type(self.model).__name__}, {len(self._layers)} layers)"

    def unpack(self) -> None:
        """Put the plain weights back. Safe to call twice."""
        while self._layers:
            _unpack(self._layers[-1])
            self._layers.pop()  # only then, so that an interrupted call can go on

    def __enter__(self) -> PackedModel:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpack()


def _onednn(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return product


# Torch's compiler takes oneDNN's own operation for one whose weights are constants of the graph, and fails;
# and it takes packed weights for plain ones, so that it would leave `to_dense` out.
_compiled_product = torch.library.custom_op(
    "thinsight::packed_product",
    _onednn,
    mutates_args=(),
    schema="(Tensor input, Tensor packed, Tensor? bias) -> Tensor",
)
_compiled_plain = torch.library.custom_op(
    "thinsight::plain_weight", Tensor.to_dense, mutates_args=(), schema="(Tensor packed) -> Tensor"
)


@_compiled_product.register_fake
def _product_shape(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], packed.shape[0])


@_compiled_plain.register_fake
def _plain_shape(packed: Tensor) -> Tensor:
    return torch.empty_like(packed)


def _product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product = _compiled_product if torch.compiler.is_compiling() else _onednn
    return product(input, packed, bias)


def _plain(packed: Tensor) -> Tensor:
    plain: Tensor = _compiled_plain(packed) if torch.compiler.is_compiling() else packed.to_dense()
    return plain


class _Product(torch.autograd.Function):
    """oneDNN's product, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed, ctx.biased = packed, bias is not None
        return _product(input, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (gradient,) = gradients
        bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
        return gradient @ _plain(ctx.packed), None, bias


class _PackedLinear(nn.Linear):
    """What a linear layer is while packed: the same object, so its hooks stay."""

    packed: Tensor  # opaque

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            product: Tensor = _Product.apply(input, self.packed, self.bias)
            return product
        return _product(input, self.packed, self.bias)

    @property
    def weight(self) -> Tensor:
        """A plain copy."""
        return _plain(self.packed)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        raise BadInput("the model's weights are packed: call unpack() before loading others")

    def _apply(self, fn: Any, recurse: bool = True) -> _PackedLinear:
        probe = torch.empty(0, dtype=self.packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise BadInput(
                f"the model's weights are packed for {probe.dtype} on the CPU: call unpack() before moving "
                f"it to {moved.dtype} on {moved.device}"
            )
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "packed": _reordered(state["packed"])})


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers of the decoder with their names, each once, and the head if its weights are its
    own."""
    names = {module: name for name, module in model.named_modules()}
    candidates = [module for layer in decoder_layers(model) for module in layer.modules()]
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(embeddings, "weight", None):
        candidates.append(head)
    for module in dict.fromkeys(candidates):
        if type(module) is nn.Linear:
            yield names[module], module


def _check(name: str, weight: Tensor) -> None:
    where = f"{name} is {weight.dtype} on {weight.device}"
    if weight.device.type != "cpu":
        raise Unsupported(f"{where}: weights are packed for the CPU alone; leave pack out")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"{where}: load the model in float32 to pack it, or leave pack out")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise Unsupported("this torch has no oneDNN, whose kernels packed weights are for: leave pack out")
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise BadInput(f"{where}, for which this CPU has no instructions: load the model in float32")


def _reordered(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _pack(layer: nn.Linear) -> None:
    packed = _reordered(layer.weight)
    learns = layer.weight.requires_grad
    del layer.weight
    layer.__dict__.update(packed=packed, learns=learns)
    layer.__class__ = _PackedLinear


def _unpack(layer: nn.Linear) -> None:
    if isinstance(layer, _PackedLinear):
        weight = nn.Parameter(layer.weight, requires_grad=layer.__dict__["learns"])
        layer.__class__ = nn.Linear
        layer.register_parameter("weight", weight)
        del layer.__dict__["packed"], layer.__dict__["learns"]
