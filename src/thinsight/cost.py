"""What a schedule costs: FLOPs of the decoder's prefill and bytes of its KV cache, from a model config alone.

Arithmetic only. Knows nothing about torch, models, rankers or clocks (measured time is timing.py's subject).

How it is counted, so that two figures can be compared:

- one multiply-add is 2 FLOPs; norms, activations, RoPE, softmax and the ranking itself are left out
  (together far below 1 %);
- layer i runs on t_i = n_text + count_i tokens, its *input*;
- projections count q, k, v and o with their true widths, so grouped-query attention is counted as it is;
- attention counts the full t_i x t_i square, as the field's formula (FastV, arXiv 2403.06764, section 4.3)
  and the paper (arXiv 2412.00556) do, although a causal kernel may skip half of it;
- the MLP has three matrices when it is gated (Llama, Mistral, Qwen2 ...) and two otherwise;
- the vision encoder and the language-model head are counted apart: ``vision_flops`` and
  ``Breakdown.lm_head``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ThinsightError
from .schedule import Schedule

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

    def layer_flops(self, tokens: int) -> tuple[float, float, float]:
        """(projections, attention, MLP) FLOPs of one layer over ``tokens`` positions."""
        query_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        projections = 2.0 * tokens * self.hidden * (2 * query_width + 2 * kv_width)  # q and o, k and v
        attention = 2.0 * 2.0 * tokens * tokens * query_width  # q k^T, then weights x v
        mlp = 2.0 * tokens * self.hidden * self.intermediate * (3 if self.gated else 2)
        return projections, attention, mlp

    def prefill_flops(self, n_vision: int, n_text: int, schedule: Schedule | None = None) -> float:
        """Decoder prefill FLOPs of one prompt, as ``flops`` counts them."""
        tokens = layer_tokens(self.num_layers, n_vision, n_text, schedule)
        return sum(sum(self.layer_flops(n)) for n in tokens)

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
    parts = [shape.layer_flops(n) for n in layer_tokens(shape.num_layers, n_vision, n_text, schedule)]
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
    tokens = sum(layer_tokens(shape.num_layers, n_vision, n_text, schedule))
    return round(tokens * shape.kv_bytes_per_token(dtype_bytes))


def layer_tokens(num_layers: int, n_vision: int, n_text: int, schedule: Schedule | None) -> tuple[int, ...]:
    """Tokens that enter each layer: the text and the vision tokens still kept."""
    if n_vision < 0 or n_text < 0:
        raise ThinsightError(f"n_vision and n_text must not be negative, got {n_vision} and {n_text}")
    if schedule is None:
        return (n_vision + n_text,) * num_layers
    if schedule.num_layers != num_layers:
        raise ThinsightError(
            f"the schedule has {schedule.num_layers} layers but the model has {num_layers}: "
            f"use schedule.resample({num_layers})"
        )
    return tuple(n_text + count for count in schedule.counts(n_vision))


def vision_flops(config: Any, n_images: int = 1) -> float:
    """FLOPs of a ViT encoder (patches, all its layers) and the two-matrix projector over ``n_images`` images.

    Counts what stock transformers runs for LLaVA: every layer of the tower, although the features may be
    taken from the last but one, and the projector on the patches without the class token. No reduction
    changes it.

    Raises ThinsightError when the config has no CLIP-like vision config.
    """
    vision = _field(config, "vision_config")
    text = text_config(config)
    if vision is None:
        raise ThinsightError("vision_flops needs a config with a vision_config; this one has none")
    hidden = _size(vision, "hidden_size")
    patch = _size(vision, "patch_size")
    patches = (_size(vision, "image_size") // patch) ** 2
    channels = _field(vision, "num_channels") or 3
    tokens = patches + (1 if "clip" in str(_field(vision, "model_type")) else 0)  # CLIP's class token
    heads = _size(vision, "num_attention_heads")
    tower = DecoderShape(
        num_layers=_size(vision, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=_size(vision, "intermediate_size"),
        vocab=0,
        gated=False,
    )
    embed = 2.0 * patches * channels * patch * patch * hidden
    layers = tower.num_layers * sum(tower.layer_flops(tokens))
    layers_used = _field(config, "vision_feature_layer")
    feature_width = hidden * (len(layers_used) if isinstance(layers_used, (list, tuple)) else 1)
    width = _size(text, "hidden_size")
    projector = 2.0 * patches * (feature_width * width + width * width)
    return n_images * (embed + layers + projector)


def text_config(config: Any) -> Any:
    """The decoder's part of a model config: its ``text_config``, or the config itself."""
    inner = _field(config, "text_config")
    return config if inner is None else inner


def decoder_shape(config: Any) -> DecoderShape:
    """The decoder's sizes out of a model config or a text config (object or dict).

    Raises ThinsightError when a size is missing, or for a mixture of experts, which this formula does not
    count.
    """
    text = text_config(config)
    for name in _EXPERT_FIELDS:
        if _field(text, name):
            raise ThinsightError(
                f"the text config has {name}={_field(text, name)}: experts are not counted here"
            )
    hidden = _size(text, "hidden_size")
    heads = _size(text, "num_attention_heads")
    return DecoderShape(
        num_layers=_size(text, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_field(text, "num_key_value_heads") or heads,
        head_dim=_field(text, "head_dim") or hidden // heads,
        intermediate=_size(text, "intermediate_size"),
        vocab=_size(text, "vocab_size"),
        gated=_field(text, "model_type") not in _UNGATED,
    )


def _field(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _size(config: Any, name: str) -> int:
    value = _field(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ThinsightError(f"the config's {name} must be a positive integer, got {value!r}")
    return value
