"""What a schedule costs: FLOPs of the decoder's prefill and bytes of its KV cache, from a model config alone.

How it is counted, so that two figures can be compared:

- one multiply-add is 2 FLOPs; norms, activations, RoPE, softmax and the ranking itself are left out (together far below
  1 %), and so is DeepStack's addition of vision features inside the decoder (Qwen3-VL);
- layer i runs on t_i = n_text + count_i tokens, its *input*;
- projections count q, k, v and o with their true widths, so grouped-query attention is counted as it is;
- attention counts the full t_i x t_i square, as the field's formula (FastV, arXiv 2403.06764, section 4.3) and the
  paper (arXiv 2412.00556) do, although a causal kernel may skip half of it;
- a layer that carries a state along the tokens in place of attending (Qwen3.5's Gated DeltaNet, arXiv 2412.06464; the
  short convolutions of LFM2) counts its projections as such, and as attention what each token does to the state: its
  convolution, and per value head three products with a matrix of key by value dimension (read the value, write the
  correction, read the output), as decoding computes it. Kernels that take prompts in chunks compute more. Its state
  does not grow with tokens, and is not among the cache's bytes;
- an output gate of attention (Qwen3.5, LFM3) is one more projection;
- a layer with a sliding window of w (Gemma 3, Cohere 2) counts t_i x min(t_i, w), and caches at most w - 1 positions;
  what is dropped inside the window makes both figures upper bounds;
- the MLP has three matrices when it is gated (Llama, Mistral, Qwen2 ...) and two otherwise;
- a layer that attends within chunks (Llama 4) counts as one with a window of that size;
- a mixture of experts (GLM-4.5V) counts what a token runs through: the router, its top-k routed experts and the shared
  ones; some of its layers may be dense. Llama 4 runs every token through all experts, and is counted so;
- multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, section 2.1.1) counts the matrices of its low ranks, and
  caches the latent and the one rotated key that stock transformers caches, not the heads made of them;
- vision tokens that have experts of their own (ERNIE 4.5 VL) count those;
- a gate on what attention gives (Muse Glimmer; Step 3.7, whose layers differ in heads) counts as the matrix it is;
- a layer that reads another layer's keys and values (Gemma 3n, Gemma 4) has neither projections nor a cache of its own,
  and as many tokens as the last layer that has; Gemma 4 runs it on the last position only, as `generate` does;
- per-layer inputs, LAuReL and AltUp's coefficients count with the projections (Gemma 3n, Gemma 4);
- the vision encoder and the language-model head are counted apart: `vision_flops` and ``Breakdown.lm_head``.

Of a vision encoder (tower and projector) rotary tables, interpolated position embeddings and a pooling head, whose
output is not used, are left out. Every layer of the tower counts, because stock transformers runs all of them even when
the features are taken from an earlier one.

Towers of a fixed image size (CLIP, SigLIP, InternViT, Idefics, SAM) cost the same for every image or tile. Towers that
take any image (Qwen-VL, GLM-V, Pixtral) are counted from the number of vision tokens that came out of them, all images
taken to be of one size, the windows of Qwen2.5-VL's attention to be full; VideoLLaMA 3, which merges the patches of
videos alone, is counted as for images. LLaVA-NeXT and LLaVA-OneVision cut padding away after the tower, and Aria and
Idefics2 resample every image to so many tokens, so tokens do not tell how much the tower saw: refused.
DeepSeek-OCR 2's do not tell either, for its overview and its tiles have sizes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from .errors import BadInput, Unsupported
from .families import NOT_KNOWN, TOWERS, Tower, family_of, field_of, neck, patches_of, size_of, text_config, tower_of
from .schedule import Schedule

STATE_LAYERS = frozenset({"conv", "linear_attention"})
"""Of a text config's `layer_types`: layers that carry a state along the tokens in place of attending."""
# Text models whose attention has an output gate as wide as its queries.
_OUTPUT_GATE = frozenset({"muse_glimmer_text", "qwen3_5_text", "qwen3_5_moe_text"})
# Text models whose attention gates each head by one number, and whose layers may differ in heads.
_GATED_HEADS = frozenset({"step3p5"})
# Text models whose MLP is two matrices (up, down) rather than three (gate, up, down).
_UNGATED = frozenset({"opt", "phi", "gpt2", "gpt_neox", "starcoder2", "bloom", "falcon", "cosmos3_edge_text"})
# Text models of experts whose intermediate_size is that of one expert.
_WIDTH_OF_EXPERTS = frozenset({"aria_text", "minimax_m3_vl_text"})
# A positive number under one of these names means a mixture of experts.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Of a family's `tiles`: why the number of vision tokens does not tell what the vision tower did.
_UNTOLD = {
    "unpadded": "cuts padding away after its vision tower",
    "lines": "adds tokens at the ends of lines of patches, which differ in length",
    "views": "has tiles of another size than its overview",
}


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
        """All FLOPs."""
        return self.projections + self.attention + self.mlp


@dataclass(frozen=True)
class Experts:
    """A mixture of gated experts in place of an MLP."""

    routed: int
    active: int  # of the routed ones, per token
    width: int  # of one routed expert
    shared_width: int  # of all shared experts together
    dense: frozenset[int]  # layers that have an ordinary MLP
    shared_gates: int = 0  # numbers that say how much of the shared experts counts
    vision_width: int | None = None  # of one routed expert for vision tokens, which have their own (ERNIE 4.5 VL)

    def flops(self, tokens: int, hidden: int, n_vision: int = 0) -> float:
        """Router, active and shared experts over ``tokens`` positions, so many of which are vision tokens."""
        width = self.active * self.width + self.shared_width
        own = 0 if self.vision_width is None else n_vision * self.active * (self.vision_width - self.width)
        return 2.0 * hidden * (tokens * (self.routed + self.shared_gates + 3 * width) + 3 * own)


@dataclass(frozen=True)
class Mixer:
    """What a layer that carries a state has in place of attention: multiply-adds per token."""

    projections: int
    state: int  # the convolution, and what the token reads of the state and writes to it


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are made of a latent of low rank that is cached in their place."""

    query_rank: int | None  # None: queries are made by one matrix
    rank: int  # of the latent
    plain: int  # of a key head, the part without positions
    rotated: int  # of a key head, the part with them, which all heads share
    values: int  # of a value head

    def projections(self, hidden: int, heads: int) -> int:
        """Multiply-adds of one token."""
        queries, keys = heads * (self.plain + self.rotated), heads * (self.plain + self.values)
        asked = hidden * queries if self.query_rank is None else self.query_rank * (hidden + queries)
        return asked + hidden * (self.rank + self.rotated) + self.rank * keys + heads * self.values * hidden


@dataclass(frozen=True)
class LayerShape:
    """How one layer is unlike the others; 0 as they are."""

    head_dim: int = 0
    heads: int = 0
    kv_heads: int = 0
    intermediate: int = 0
    kv_matrices: int = 2  # 1: its values are its keys; 0: both are another layer's
    source: int | None = None  # the layer whose keys it reads


_ALIKE = LayerShape()


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass(frozen=True, repr=False)
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
    latent: Latent | None = None  # in place of `kv_heads` and `head_dim`
    gate: int = 0  # width of attention's output gate
    gated_heads: bool = False  # of one number per head, in place of `gate`
    mixers: Mapping[int, Mixer] = field(default_factory=dict)  # of the layers that do not attend
    layers: Mapping[int, LayerShape] = field(default_factory=dict)  # those that are unlike the others
    beside: int = 0  # multiply-adds of a token in each layer beside attention and MLP
    around: int = 0  # and before the first layer and behind the last
    readers_last_only: bool = False  # layers that read another's keys run on the last position alone

    def __repr__(self) -> str:
        """In one line: what has its default is left out."""
        told = [each for each in fields(self) if each.default is MISSING and each.default_factory is MISSING]
        rest = [each for each in fields(self) if each not in told and getattr(self, each.name) != _default(each)]
        return f"DecoderShape({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in [*told, *rest])})"

    def layer_flops(
        self, tokens: int, layer: int = 0, keys: int | None = None, n_vision: int = 0
    ) -> tuple[float, float, float]:
        """(projections, attention, MLP) FLOPs of one layer over ``tokens`` positions, ``n_vision`` of them vision
        tokens, which see ``keys``, or each other."""
        own, around = self.layers.get(layer, _ALIKE), self.around if layer == 0 else 0
        head_dim = own.head_dim or self.head_dim
        heads = own.heads or self.heads
        query_width, kv_width = heads * head_dim, (own.kv_heads or self.kv_heads) * head_dim
        gate = heads if self.gated_heads else self.gate
        matrices = 2 * query_width + own.kv_matrices * kv_width + gate  # q and o, k and v
        projections = 2.0 * tokens * (self.hidden * matrices + self.beside + around)
        keys = tokens if keys is None else keys
        seen = min(keys, self.windows.get(layer, keys))
        attention = 2.0 * 2.0 * tokens * seen * query_width  # q k^T, then weights x v
        if self.latent is not None:
            projections = 2.0 * tokens * self.latent.projections(self.hidden, self.heads)
            head = self.latent.plain + self.latent.rotated + self.latent.values
            attention = 2.0 * tokens * seen * self.heads * head
        if layer in self.mixers:
            mixer = self.mixers[layer]
            projections, attention = 2.0 * tokens * mixer.projections, 2.0 * tokens * mixer.state
        if self.experts is not None and layer not in self.experts.dense:
            return projections, attention, self.experts.flops(tokens, self.hidden, n_vision)
        mlp = 2.0 * tokens * self.hidden * (own.intermediate or self.intermediate) * (3 if self.gated else 2)
        return projections, attention, mlp

    def per_layer(self, n_vision: int, n_text: int, schedule: Schedule | None) -> list[tuple[float, float, float]]:
        """`layer_flops` of each layer's positions in a prefill."""
        tokens = layer_tokens(self.num_layers, n_vision, n_text, schedule)
        sources = [self.layers.get(layer, _ALIKE).source for layer in range(self.num_layers)]
        last = tokens[max(layer for layer, source in enumerate(sources) if source is None)]
        read = min(last, 1) if self.readers_last_only else last
        return [
            self.layer_flops(n, layer, n_vision=n - n_text)
            if source is None
            else self.layer_flops(read, layer, tokens[source])
            for layer, (n, source) in enumerate(zip(tokens, sources, strict=True))
        ]

    def prefill_flops(
        self, n_vision: int, n_text: int, schedule: Schedule | None = None, first_layer: int = 0
    ) -> float:
        """Decoder prefill FLOPs of one prompt, as ``flops`` counts them, from a layer on."""
        return sum(map(sum, self.per_layer(n_vision, n_text, schedule)[first_layer:]))

    def cached(self, tokens: int, layer: int) -> int:
        """How many of ``tokens`` positions one layer's cache holds after prefill."""
        if layer in self.mixers or self.layers.get(layer, _ALIKE).source is not None:
            return 0
        return min(tokens, self.windows[layer] - 1) if layer in self.windows else tokens

    def kv_bytes_per_token(self, dtype_bytes: float, layer: int = 0) -> float:
        """Bytes that one position adds to one layer's keys and values."""
        if self.latent is not None:
            return (self.latent.rank + self.latent.rotated) * dtype_bytes
        own = self.layers.get(layer, _ALIKE)
        return 2.0 * (own.kv_heads or self.kv_heads) * (own.head_dim or self.head_dim) * dtype_bytes


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
    parts = shape.per_layer(n_vision, n_text, schedule)
    return Breakdown(
        projections=sum(p[0] for p in parts),
        attention=sum(p[1] for p in parts),
        mlp=sum(p[2] for p in parts),
        lm_head=2.0 * shape.hidden * shape.vocab,
        per_layer=tuple(sum(p) for p in parts),
    )


def kv_bytes(config: Any, n_vision: int, n_text: int, schedule: Schedule | None = None, dtype_bytes: float = 2) -> int:
    """Bytes of keys and values that one prompt leaves in the cache after prefill.

    ``dtype_bytes`` is the size of one cached number: 2 for float16 and bfloat16, 4 for float32.
    Raises as ``flops`` does.
    """
    shape = decoder_shape(config)
    entering = layer_tokens(shape.num_layers, n_vision, n_text, schedule)
    cached = (shape.cached(n, layer) * shape.kv_bytes_per_token(dtype_bytes, layer) for layer, n in enumerate(entering))
    return round(sum(cached))


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


def decoder_shape(config: Any) -> DecoderShape:
    """The decoder's sizes out of a model config or a text config (object or dict).

    Raises ThinsightError when a size is missing, or for a mixture of experts whose sizes are not told.
    """
    text = _plain(text_config(config))
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, hidden, heads = (size_of(text, name) for name in sizes)
    head_dim, experts = field_of(text, "head_dim") or hidden // heads, _experts(text, layers)
    return DecoderShape(
        num_layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=field_of(text, "num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate=0 if experts is not None and _experts_alone(text, experts) else _intermediate(text),
        vocab=size_of(text, "vocab_size"),
        gated=field_of(text, "model_type") not in _UNGATED,
        windows=windows_of(text, layers),
        experts=experts,
        latent=_latent(text),
        gate=_gate(text, heads, head_dim),
        gated_heads=field_of(text, "model_type") in _GATED_HEADS,
        mixers={layer: _mixer(text, layer) for layer in states_of(text, layers)},
        layers=_unlike(text, layers),
        beside=_beside(text, hidden),
        around=_around(text, layers, hidden),
        readers_last_only=str(field_of(text, "model_type")).startswith("gemma4"),
    )


def _latent(text: Any) -> Latent | None:
    """Multi-head latent attention, where the text config has it."""
    if not field_of(text, "kv_lora_rank"):
        return None
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Latent(field_of(text, "q_lora_rank"), *(size_of(text, name) for name in sizes))


def _plain(text: Any) -> Any:
    """A text config, as a dict where it has values by layer: as an object it refuses to tell those of the others."""
    return text.to_dict() if field_of(text, "per_layer_config") and hasattr(text, "to_dict") else text


def _intermediate(text: Any) -> int:
    """The MLP's width, or of several by layer the first one's."""
    given = field_of(text, "intermediate_size")
    if isinstance(given, (list, tuple)):
        return int(given[0])
    width = size_of(text, "intermediate_size_mlp", "dense_intermediate_size", "intermediate_size")
    if not field_of(text, "block_auto_adjust_ff_dim"):
        return width
    # LFM2 takes two thirds of what its config says, and rounds up
    width = int(2 * width / 3)
    if field_of(text, "block_ffn_dim_multiplier") is None:
        return width
    multiple = size_of(text, "block_multiple_of")
    return -(-int(field_of(text, "block_ffn_dim_multiplier") * width) // multiple) * multiple


def _unlike(text: Any, layers: int) -> dict[int, LayerShape]:
    """The layers that are unlike the others."""
    given = {int(layer): sizes for layer, sizes in (field_of(text, "per_layer_config") or {}).items()}
    sources, found = shared_keys_of(text, layers), {}
    widths = field_of(text, "intermediate_size")
    wide = 2 * _intermediate(text) if field_of(text, "use_double_wide_mlp") else 0
    types = field_of(text, "layer_types") or [""] * layers
    for layer in range(layers):
        source = sources.get(layer)
        values_are_keys = bool(field_of(text, "attention_k_eq_v")) and types[layer] == "full_attention"
        found[layer] = LayerShape(
            head_dim=field_of(given.get(layer, {}), "head_dim") or 0,
            heads=field_of(given.get(layer, {}), "num_attention_heads") or 0,
            kv_heads=field_of(given.get(layer, {}), "num_key_value_heads") or 0,
            intermediate=widths[layer] if isinstance(widths, (list, tuple)) else wide if source is not None else 0,
            kv_matrices=0 if source is not None else 1 if values_are_keys else 2,
            source=source,
        )
    return {layer: shape for layer, shape in found.items() if shape != _ALIKE}


def _beside(text: Any, hidden: int) -> int:
    """Multiply-adds of a token in each layer for what Gemma 3n and Gemma 4 put beside attention and MLP."""
    per_layer = 2 * hidden * (field_of(text, "hidden_size_per_layer_input") or 0)
    laurel = 2 * hidden * (field_of(text, "laurel_rank") or 0)
    streams = field_of(text, "altup_num_inputs") or 0
    altup = 2 * hidden * streams + streams**3 + streams**2 + hidden * streams**2
    return per_layer + laurel + altup


def _around(text: Any, layers: int, hidden: int) -> int:
    """Multiply-adds of a token outside the layers: per-layer inputs are projected, AltUp's streams made and joined."""
    per_layer = layers * hidden * (field_of(text, "hidden_size_per_layer_input") or 0)
    return per_layer + 2 * max(0, (field_of(text, "altup_num_inputs") or 0) - 1) * hidden**2


def _gate(text: Any, heads: int, head_dim: int) -> int:
    """Width of attention's output gate: a number per channel (Qwen3.5), per head (LFM3), or none."""
    if field_of(text, "model_type") in _OUTPUT_GATE:
        return heads * head_dim
    return heads if field_of(text, "use_attention_gate") else 0


def _experts_alone(text: Any, experts: Experts) -> bool:
    """Whether every layer has experts, and the config no width of an MLP."""
    return field_of(text, "intermediate_size") is None and not experts.dense


def states_of(text: Any, layers: int) -> frozenset[int]:
    """The decoder layers that carry a state along the tokens in place of attending, from a text config."""
    types = field_of(text, "layer_types") or ()
    return frozenset(layer for layer, kind in enumerate(types[:layers]) if kind in STATE_LAYERS)


def _mixer(text: Any, layer: int) -> Mixer:
    """A layer's convolution (LFM2), or Gated DeltaNet (Qwen3.5)."""
    hidden = size_of(text, "hidden_size")
    if field_of(text, "layer_types")[layer] == "conv":
        # to two gates and a value, and back
        return Mixer(4 * hidden * hidden, hidden * size_of(text, "conv_L_cache"))
    if field_of(text, "linear_key_head_dim") is None:
        kind = field_of(text, "model_type")
        raise Unsupported(f"linear attention of the kind that {kind!r} has is not counted: no FLOPs can be stated")
    key_dim, value_dim = size_of(text, "linear_key_head_dim"), size_of(text, "linear_value_head_dim")
    heads = size_of(text, "linear_num_value_heads")
    keys, values = size_of(text, "linear_num_key_heads") * key_dim, heads * value_dim
    # q, k and v; the output's gate; per head how much is kept and how much is written; the output
    projections = hidden * (2 * keys + values + values + 2 * heads + values)
    convolution = (2 * keys + values) * size_of(text, "linear_conv_kernel_dim")
    return Mixer(projections, convolution + 3 * heads * key_dim * value_dim)


def windows_of(text: Any, layers: int) -> dict[int, int]:
    """The window of each decoder layer that has a sliding one, or sees chunks of such a size (Llama 4); from a text
    config, object or dict."""
    window = field_of(text, "sliding_window") or field_of(text, "attention_chunk_size")
    if not window or field_of(text, "use_sliding_window") is False:
        return {}
    types = field_of(text, "layer_types")
    pattern = field_of(text, "sliding_window_pattern")  # every so many layers one sees everything
    if types is not None:
        return {layer: window for layer, kind in enumerate(types[:layers]) if kind.startswith(("sliding", "chunked"))}
    return {layer: window for layer in range(layers) if not pattern or (layer + 1) % pattern}


def shared_keys_of(text: Any, layers: int) -> dict[int, int]:
    """The decoder layers without keys and values of their own, each with the one whose keys it reads: the last of its
    kind before them (Gemma 3n, Gemma 4). From a text config, object or dict."""
    first, types = layers - (field_of(text, "num_kv_shared_layers") or 0), field_of(text, "layer_types")
    if first == layers or types is None:
        return {}
    return {i: max(j for j in range(first) if types[j] == types[i]) for i in range(first, layers)}


def _experts(text: Any, layers: int) -> Experts | None:
    """The mixture of experts; None when every MLP is dense."""
    name = next((name for name in _EXPERT_FIELDS if field_of(text, name)), None)
    if name is None:
        return None
    if field_of(text, "model_type") == "llama4_text":
        return _llama4_experts(text, layers)
    beside = _intermediate(text) if field_of(text, "enable_moe_block") else 0  # Gemma 4: a dense MLP beside them
    wide, kind = field_of(text, "model_type") in _WIDTH_OF_EXPERTS, field_of(text, "model_type")
    width = field_of(text, "intermediate_size" if wide else "moe_intermediate_size")
    width, vision_width = width if isinstance(width, (list, tuple)) else (width, None)
    gated = field_of(text, "shared_expert_intermediate_size")  # of shared experts that a number weighs
    if not width or (gated and kind not in _OUTPUT_GATE):
        raise Unsupported(
            f"the text config has {name}={field_of(text, name)} experts of a kind that is not counted: "
            "no FLOPs can be stated for this model"
        )
    shared = field_of(text, "n_shared_experts") or field_of(text, "moe_num_shared_experts") or 0
    shared_width = field_of(text, "shared_intermediate_size") or field_of(text, "share_expert_dim")
    sparse_step = field_of(text, "decoder_sparse_step") or 1
    first = field_of(text, "first_k_dense_replace") or 0
    named = field_of(text, "mlp_only_layers") or ()
    kinds = field_of(text, "mlp_layer_types") or ()
    named = {*named, *(layer for layer, kind in enumerate(kinds) if kind == "dense")}
    dense = {i for i in range(layers) if i < first or i in named or (i + 1) % sparse_step}
    return Experts(
        routed=size_of(text, name),
        active=size_of(text, "top_k_experts") if beside else size_of(text, "num_experts_per_tok", "moe_topk", "moe_k"),
        width=width,
        shared_width=beside or gated or shared_width or width * shared,
        shared_gates=1 if gated else 0,
        dense=frozenset(dense),
        vision_width=vision_width,
    )


def _llama4_experts(text: Any, layers: int) -> Experts:
    width, routed = size_of(text, "intermediate_size"), size_of(text, "num_local_experts")
    every = field_of(text, "interleave_moe_layer_step") or 1
    sparse = field_of(text, "moe_layers") or range(every - 1, layers, every)
    return Experts(routed, routed, width, width, frozenset(set(range(layers)) - set(sparse)))


def vision_flops(config: Any, n_images: int = 1, *, n_vision: int | None = None) -> float:
    """FLOPs of tower and projector over ``n_images`` images. No reduction changes it.

    Args:
        config: a model's config, object or dict.
        n_images: how many images there are; tiles, where an image is cut into tiles, unless ``n_vision`` says
            how many tiles that is.
        n_vision: how many vision tokens the images make together in the decoder. A tower that takes images of
            any size needs it.

    Raises:
        ThinsightError: no vision config, a tower or projector that is not known, or a tower whose work the
            config and the number of vision tokens do not tell.
    """
    vision = field_of(config, "vision_config")
    if vision is None:
        raise Unsupported("vision_flops needs a config with a vision_config; this one has none")
    family, tower = family_of(config), tower_of(config)
    why = _UNTOLD.get(family.tiles)
    if why is not None and (n_vision is not None or family.tiles != "unpadded"):
        raise Unsupported(f"{family.model_type!r} {why}: the number of vision tokens does not tell the tower's FLOPs")
    if isinstance(family.projector, str):
        raise Unsupported(f"the projector of {family.model_type!r} is not known: its vision encoder is not counted")
    if tower.images == NOT_KNOWN:
        kind = field_of(vision, "model_type")
        raise Unsupported(f"the vision tower {kind!r} of {family.model_type!r} is not known: it is not counted")
    merged = family.merge(config, vision)
    if tower.bare:
        return float(n_vision or 0) * 2.0 * family.projector(config, vision, 1)
    if tower.images == "fixed":
        patches = patches_of(vision)
        images = n_images if n_vision is None else n_vision * merged / patches
    elif n_vision is None:
        raise BadInput(
            "this vision tower takes images of any size: say n_vision, the number of vision tokens they make"
        )
    else:
        patches, images = n_vision * merged // n_images, n_images
    projector = 2.0 * family.projector(config, vision, merged)
    if tower.pools:  # by a product of all patches with all tokens
        projector += 2.0 * patches * size_of(vision, tower.width)
    second = field_of(config, family.second_tower) if family.second_tower else None
    beside = 0.0 if second is None else _tower_flops(TOWERS[field_of(second, "model_type")], second, patches_of(second))
    return images * (_tower_flops(tower, vision, patches) + beside + patches / merged * projector)


def _tower_flops(tower: Tower, vision: Any, patches: int) -> float:
    """FLOPs over the patches of one image: their embedding, and a stack of encoder layers like a decoder's."""
    width = size_of(vision, tower.width)
    heads = size_of(vision, "num_heads", "num_attention_heads")
    patch = size_of(vision, "patch_size")
    ratio = tower.mlp == "mlp_ratio"
    shape = DecoderShape(
        num_layers=size_of(vision, "num_hidden_layers", "depth"),
        hidden=width,
        heads=heads,
        kv_heads=field_of(vision, "num_key_value_heads") or heads,
        head_dim=width // heads,
        intermediate=int(width * (field_of(vision, "mlp_ratio") or 4)) if ratio else size_of(vision, tower.mlp),
        vocab=0,
        gated=tower.gated,
    )
    channels = field_of(vision, "num_channels") or field_of(vision, "in_channels") or 3
    frames = field_of(vision, "temporal_patch_size") or field_of(vision, "patch_temporal") or 1
    embedding = 2.0 * channels * frames * patch * patch * width
    if tower.relative:
        return patches * embedding + _sam_flops(shape, vision, patches)
    tokens = patches + tower.class_token
    projections, attention, mlp = shape.layer_flops(tokens)
    window = _window(vision) if tower.windowed else tokens
    if window < tokens:
        kinds = field_of(vision, "layer_types") or ()
        full = len(field_of(vision, "fullatt_block_indexes") or ()) or list(kinds).count("full_attention")
        attention *= (full + (shape.num_layers - full) * window / tokens) / shape.num_layers
    return patches * embedding + shape.num_layers * (projections + attention + mlp)


def _window(vision: Any) -> int:
    """Patches of a window, whose side a config says in pixels, or (Muse Glimmer) as the patches of its positions."""
    side = field_of(vision, "window_size")
    return int(side // size_of(vision, "patch_size") if side else size_of(vision, "pos_emb_height")) ** 2


def _sam_flops(shape: DecoderShape, vision: Any, patches: int) -> float:
    """SAM's encoder (arXiv 2304.02643) and its neck over the patches of one image. Layers that attend within windows
    fill the image up to whole windows, and each query meets a position per row and column that it can see."""
    side, own = math.isqrt(patches), set(field_of(vision, "global_attn_indexes") or ())
    total = 0.0
    for layer in range(shape.num_layers):
        window = side if layer in own or not field_of(vision, "window_size") else size_of(vision, "window_size")
        tokens = (-(-side // window) * window) ** 2
        relative = 2 * window if field_of(vision, "use_rel_pos") else 0
        total += 2.0 * tokens * shape.hidden * (4 * shape.hidden + 2 * window**2 + relative)
        total += 2.0 * patches * shape.hidden * 2 * shape.intermediate
    return total + 2.0 * patches * neck(vision)
