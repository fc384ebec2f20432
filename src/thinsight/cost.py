"""What a schedule costs: FLOPs of the decoder's prefill and bytes of its KV cache, from a model config alone.

Arithmetic only. Knows nothing about torch, models, rankers or clocks (measured time is timing.py's subject).

How it is counted, so that two figures can be compared:

- one multiply-add is 2 FLOPs; norms, activations, RoPE, softmax and the ranking itself are left out
  (together far below 1 %);
- layer i runs on t_i = n_text + count_i tokens, its *input*;
- projections count q, k, v and o with their true widths, so grouped-query attention is counted as it is;
- attention counts the full t_i x t_i square, as the field's formula (FastV, arXiv 2403.06764, section 4.3)
  and the paper (arXiv 2412.00556) do, although a causal kernel may skip half of it;
- a layer with a sliding window of w (Gemma 3, Cohere 2) counts t_i x min(t_i, w), and caches at most w - 1
  positions; what is dropped inside the window makes both figures upper bounds;
- the MLP has three matrices when it is gated (Llama, Mistral, Qwen2 ...) and two otherwise;
- a mixture of experts (GLM-4.5V) counts what a token runs through: the router, its top-k routed experts and
  the shared ones; its first layers may be dense;
- DeepStack's addition of vision features inside the decoder (Qwen3-VL) is left out, as all additions are;
- the vision encoder and the language-model head are counted apart: ``vision_flops`` (vision_cost.py) and
  ``Breakdown.lm_head``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadInput, Unsupported
from .schedule import Schedule

__all__ = [
    "Breakdown",
    "DecoderShape",
    "Experts",
    "breakdown",
    "decoder_shape",
    "flops",
    "kv_bytes",
    "layer_tokens",
    "text_config",
    "vision_flops",
]

# Text models whose MLP is two matrices (up, down) rather than three (gate, up, down).
_UNGATED = frozenset({"opt", "phi", "gpt2", "gpt_neox", "starcoder2", "bloom", "falcon"})
# A positive number under one of these names means a mixture of experts.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Breakdown:
    """Decoder prefill FLOPs of one prompt by part; ``total`` leaves the head out.

    ``lm_head`` is the head at the last position only, which is all that generation needs.
    """

    projections: float
    attention: float
    mlp: float
    lm_head: float
    per_layer: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp


@dataclass(frozen=True)
class Experts:
    """A mixture of gated experts in place of an MLP."""

    routed: int
    active: int  # of the routed ones, per token
    width: int  # of one routed expert
    shared_width: int  # of all shared experts together
    dense: frozenset[int]  # layers that have an ordinary MLP

    def flops(self, tokens: int, hidden: int) -> float:
        """Router, active and shared experts over ``tokens`` positions."""
        width = self.active * self.width + self.shared_width
        return 2.0 * tokens * hidden * (self.routed + 3 * width)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-like decoder that its cost depends on."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool
    windows: Mapping[int, int] = field(default_factory=dict)  # of the layers that have a sliding one
    experts: Experts | None = None

    def layer_flops(self, tokens: int, layer: int = 0) -> tuple[float, float, float]:
        """(projections, attention, MLP) FLOPs of one layer over ``tokens`` positions."""
        query_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        projections = 2.0 * tokens * self.hidden * (2 * query_width + 2 * kv_width)  # q and o, k and v
        seen = min(tokens, self.windows.get(layer, tokens))
        attention = 2.0 * 2.0 * tokens * seen * query_width  # q k^T, then weights x v
        if self.experts is not None and layer not in self.experts.dense:
            return projections, attention, self.experts.flops(tokens, self.hidden)
        mlp = 2.0 * tokens * self.hidden * self.intermediate * (3 if self.gated else 2)
        return projections, attention, mlp

    def prefill_flops(
        self, n_vision: int, n_text: int, schedule: Schedule | None = None, first_layer: int = 0
    ) -> float:
        """Decoder prefill FLOPs of one prompt, as ``flops`` counts them, from a layer on."""
        tokens = layer_tokens(self.num_layers, n_vision, n_text, schedule)
        return sum(sum(self.layer_flops(n, layer)) for layer, n in enumerate(tokens) if layer >= first_layer)

    def cached(self, tokens: int, layer: int) -> int:
        """How many of ``tokens`` positions one layer's cache holds after prefill."""
        return min(tokens, self.windows[layer] - 1) if layer in self.windows else tokens

    def kv_bytes_per_token(self, dtype_bytes: float) -> float:
        """Bytes that one position adds to one layer's keys and values."""
        return 2.0 * self.kv_heads * self.head_dim * dtype_bytes


def flops(config: Any, *, n_vision: int, n_text: int, schedule: Schedule | None = None) -> float:
    """Decoder prefill FLOPs of one prompt with ``n_vision`` vision tokens and ``n_text`` other tokens.

    ``config`` is a model's config (its text config is found) or a text config, as an object or a dict;
    ``schedule`` None means the full model. The vision encoder and the head are not in the figure.

    Raises ThinsightError for a schedule of another depth, negative sizes, or a config without the sizes
    of a Llama-like decoder.
    """
    return decoder_shape(config).prefill_flops(n_vision, n_text, schedule)


def breakdown(config: Any, *, n_vision: int, n_text: int, schedule: Schedule | None = None) -> Breakdown:
    """As ``flops``, split into projections, attention, MLP and head, and by layer."""
    shape = decoder_shape(config)
    tokens = layer_tokens(shape.num_layers, n_vision, n_text, schedule)
    parts = [shape.layer_flops(n, layer) for layer, n in enumerate(tokens)]
    return Breakdown(
        projections=sum(p[0] for p in parts),
        attention=sum(p[1] for p in parts),
        mlp=sum(p[2] for p in parts),
        lm_head=2.0 * shape.hidden * shape.vocab,
        per_layer=tuple(sum(p) for p in parts),
    )


def kv_bytes(
    config: Any, n_vision: int, n_text: int, schedule: Schedule | None = None, dtype_bytes: float = 2
) -> int:
    """Bytes of keys and values that one prompt leaves in the cache after prefill.

    ``dtype_bytes`` is the size of one cached number: 2 for float16 and bfloat16, 4 for float32.
    Raises as ``flops`` does.
    """
    shape = decoder_shape(config)
    entering = layer_tokens(shape.num_layers, n_vision, n_text, schedule)
    cached = sum(shape.cached(tokens, layer) for layer, tokens in enumerate(entering))
    return round(cached * shape.kv_bytes_per_token(dtype_bytes))


def layer_tokens(num_layers: int, n_vision: int, n_text: int, schedule: Schedule | None) -> tuple[int, ...]:
    """Tokens that enter each layer: the text and the vision tokens still kept."""
    if n_vision < 0 or n_text < 0:
        raise BadInput(f"n_vision and n_text must not be negative, got {n_vision} and {n_text}")
    if schedule is None:
        return (n_vision + n_text,) * num_layers
    if schedule.num_layers != num_layers:
        raise BadInput(
            f"the schedule has {schedule.num_layers} layers but the model has {num_layers}: "
            f"use schedule.resample({num_layers})"
        )
    return tuple(n_text + count for count in schedule.counts(n_vision))


def vision_flops(config: Any, n_images: int = 1, *, n_vision: int | None = None) -> float:
    """FLOPs of the vision encoder and projector over ``n_images`` images; see vision_cost.py.

    Raises ThinsightError when the config does not tell.
    """
    from .vision_cost import vision_flops as count

    return count(config, n_images, n_vision=n_vision)


def text_config(config: Any) -> Any:
    """The decoder's part of a model config: its ``text_config``, or the config itself."""
    inner = _field(config, "text_config")
    return config if inner is None else inner


def decoder_shape(config: Any) -> DecoderShape:
    """The decoder's sizes out of a model config or a text config (object or dict).

    Raises ThinsightError when a size is missing, or for a mixture of experts whose sizes are not told.
    """
    text = text_config(config)
    layers = _size(text, "num_hidden_layers")
    hidden = _size(text, "hidden_size")
    heads = _size(text, "num_attention_heads")
    return DecoderShape(
        num_layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_field(text, "num_key_value_heads") or heads,
        head_dim=_field(text, "head_dim") or hidden // heads,
        intermediate=_size(text, "intermediate_size"),
        vocab=_size(text, "vocab_size"),
        gated=_field(text, "model_type") not in _UNGATED,
        windows=_windows(text, layers),
        experts=_experts(text, layers),
    )


def _windows(text: Any, layers: int) -> dict[int, int]:
    """The window of each layer that has a sliding one."""
    window = _field(text, "sliding_window")
    if not window or _field(text, "use_sliding_window") is False:
        return {}
    types = _field(text, "layer_types")
    pattern = _field(text, "sliding_window_pattern")  # every so many layers one sees everything
    if types is not None:
        return {layer: window for layer, kind in enumerate(types[:layers]) if "sliding" in kind}
    return {layer: window for layer in range(layers) if not pattern or (layer + 1) % pattern}


def _experts(text: Any, layers: int) -> Experts | None:
    """The mixture of experts; None when every MLP is dense."""
    name = next((name for name in _EXPERT_FIELDS if _field(text, name)), None)
    if name is None:
        return None
    if not _field(text, "moe_intermediate_size") or _field(text, "shared_expert_intermediate_size"):
        raise Unsupported(
            f"the text config has {name}={_field(text, name)} experts of a kind that is not counted: "
            "no FLOPs can be stated for this model"
        )
    width = _size(text, "moe_intermediate_size")
    sparse_step = _field(text, "decoder_sparse_step") or 1
    first = _field(text, "first_k_dense_replace") or 0
    named = _field(text, "mlp_only_layers") or ()
    dense = {i for i in range(layers) if i < first or i in named or (i + 1) % sparse_step}
    return Experts(
        routed=_size(text, name),
        active=_size(text, "num_experts_per_tok"),
        width=width,
        shared_width=width * (_field(text, "n_shared_experts") or 0),
        dense=frozenset(dense),
    )


def _field(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _size(config: Any, name: str) -> int:
    value = _field(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise BadInput(f"the config's {name} must be a positive integer, got {value!r}")
    return value
