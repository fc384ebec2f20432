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
- the vision encoder and the language-model head are counted apart: `vision_flops` and
  ``Breakdown.lm_head``.

Of a vision encoder (tower and projector) rotary tables and interpolated position embeddings are left out too.
Every layer of the tower counts, because stock transformers runs all of them even when the features are taken
from an earlier one. A pooling head after the tower is not counted: its output is not used.

Towers of a fixed image size (CLIP, SigLIP, InternViT, Idefics) cost the same for every image or tile. Towers
that take any image (Qwen-VL, GLM-V, Pixtral) are counted from the number of vision tokens that came out of
them, all images taken to be of one size, the windows of Qwen2.5-VL's attention to be full. LLaVA-NeXT and
LLaVA-OneVision cut padding away after the tower, and Idefics2 resamples every image to equally many tokens,
so tokens do not tell how much the tower saw: refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def kv_bytes(config: Any, n_vision: int, n_text: int, schedule: Schedule | None = None, dtype_bytes: float = 2) -> int:
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


_CLASS_TOKEN = frozenset({"clip_vision_model", "internvl_vision"})
_FIXED = frozenset(
    {"clip_vision_model", "siglip_vision_model", "internvl_vision", "idefics3_vision", "smolvlm_vision", "ovis2_vision"}
)
_GATED = frozenset({"pixtral", "qwen2_5_vl_vision", "qwen2_5_vl", "glm4v_vision", "glm4v_moe_vision", "ovis2_vision"})
_ANY_RESOLUTION = frozenset({"llava_next", "llava_next_video", "llava_onevision"})


def vision_flops(config: Any, n_images: int = 1, *, n_vision: int | None = None) -> float:
    """FLOPs of tower and projector over ``n_images`` images. No reduction changes it.

    Args:
        config: a model's config, object or dict.
        n_images: how many images there are; tiles, where an image is cut into tiles, unless ``n_vision`` says
            how many tiles that is.
        n_vision: how many vision tokens the images make together in the decoder. A tower that takes images of
            any size needs it.

    Raises:
        ThinsightError: no vision config, a tower that is not known, or one whose work the config and the
            number of vision tokens do not tell.
    """
    vision = _field(config, "vision_config")
    if vision is None:
        raise Unsupported("vision_flops needs a config with a vision_config; this one has none")
    if _field(config, "model_type") in _ANY_RESOLUTION and n_vision is not None:
        raise Unsupported(
            f"{_field(config, 'model_type')!r} cuts padding away after its vision tower: "
            "the number of vision tokens does not tell the tower's FLOPs"
        )
    tower, merged = _tower(vision), _merged(config, vision)
    if _field(vision, "model_type") in _FIXED or _field(vision, "model_type") is None:
        patches = _fixed_patches(vision)
        images = n_images if n_vision is None else n_vision * merged / patches
    elif n_vision is None:
        raise BadInput(
            "this vision tower takes images of any size: say n_vision, the number of vision tokens they make"
        )
    else:
        patches, images = n_vision * merged // n_images, n_images
    return images * (tower.flops(patches) + patches / merged * _projector(config, vision))


@dataclass(frozen=True)
class _Tower:
    """A stack of encoder layers over patches."""

    layer: DecoderShape
    embedding: float  # FLOPs of one patch's embedding
    class_tokens: int
    window: int | None = None  # patches that see each other in the layers without full attention
    full_layers: int = 0  # those that see all, where there is a window

    def flops(self, patches: int) -> float:
        """Over the patches of one image."""
        tokens = patches + self.class_tokens
        projections, attention, mlp = self.layer.layer_flops(tokens)
        layers = self.layer.num_layers
        if self.window is not None and self.window < tokens:
            attention *= (self.full_layers + (layers - self.full_layers) * self.window / tokens) / layers
        return patches * self.embedding + layers * (projections + attention + mlp)


def _tower(vision: Any) -> _Tower:
    kind = _field(vision, "model_type")
    width = _first_size(vision, "embed_dim", "hidden_size") if kind in _QWEN2 else _size(vision, "hidden_size")
    heads = _first_size(vision, "num_heads", "num_attention_heads")
    patch = _side(vision, "patch_size")
    channels = _field(vision, "num_channels") or _field(vision, "in_channels") or 3
    frames = _field(vision, "temporal_patch_size") or 1
    window = _field(vision, "window_size") if kind in ("qwen2_5_vl_vision", "qwen2_5_vl") else None
    return _Tower(
        layer=DecoderShape(
            num_layers=_first_size(vision, "depth", "num_hidden_layers"),
            hidden=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            intermediate=_intermediate(vision, width),
            vocab=0,
            gated=kind in _GATED,
        ),
        embedding=2.0 * channels * frames * patch * patch * width,
        class_tokens=1 if kind in _CLASS_TOKEN or kind is None else 0,
        window=None if window is None else (window // patch) ** 2,
        full_layers=len(_field(vision, "fullatt_block_indexes") or ()),
    )


_QWEN2 = frozenset({"qwen2_vl_vision", "qwen2_vl"})


def _intermediate(vision: Any, width: int) -> int:
    kind = _field(vision, "model_type")
    if kind in _QWEN2:
        return int(width * (_field(vision, "mlp_ratio") or 4))
    if kind in ("glm4v_vision", "glm4v_moe_vision"):
        return _size(vision, "out_hidden_size")
    return _size(vision, "intermediate_size")


def _merged(config: Any, vision: Any) -> int:
    """How many patches one vision token of the decoder stands for."""
    kind = _field(config, "model_type")
    if kind == "internvl":
        return round(1 / float(_field(config, "downsample_ratio") or 0.5)) ** 2
    if kind in ("idefics3", "smolvlm"):
        return _size(config, "scale_factor") ** 2
    if kind in ("aya_vision", "cohere2_vision"):
        return _size(config, "downsample_factor") ** 2
    if kind == "ovis2":
        return _size(vision, "hidden_stride") ** 2
    if kind == "gemma3":
        return _fixed_patches(vision) // _size(config, "mm_tokens_per_image")
    if kind in ("mistral3", "lighton_ocr"):
        return _size(config, "spatial_merge_size") ** 2
    return int(_field(vision, "spatial_merge_size") or 1) ** 2


def _projector(config: Any, vision: Any) -> float:
    """FLOPs that make one vision token of the decoder out of the tower's output."""
    kind = _field(config, "model_type")
    weights = _PROJECTORS.get(kind)
    if weights is None:
        raise Unsupported(f"the projector of {kind!r} is not known: its vision encoder is not counted")
    return 2.0 * weights(config, vision)


def _two_layers(config: Any, vision: Any) -> int:
    """LLaVA's: features of one or more layers, two matrices."""
    width = _size(text_config(config), "hidden_size")
    return (_features(config, vision) + width) * width


def _features(config: Any, vision: Any) -> int:
    layers = _field(config, "vision_feature_layer")
    return _size(vision, "hidden_size") * (len(layers) if isinstance(layers, (list, tuple)) else 1)


def _internvl(config: Any, vision: Any) -> int:
    width = _size(text_config(config), "hidden_size")
    return (_size(vision, "hidden_size") * _merged(config, vision) + width) * width


def _one_matrix(config: Any, vision: Any) -> int:
    merged = 1 if _field(config, "model_type") == "gemma3" else _merged(config, vision)  # Gemma 3 averages
    return _size(vision, "hidden_size") * merged * _size(text_config(config), "hidden_size")


def _aya(config: Any, vision: Any) -> int:
    width = _size(text_config(config), "hidden_size")
    middle = _field(config, "alignment_intermediate_size") or width
    return _size(vision, "hidden_size") * _merged(config, vision) * middle + middle // 2 * width


def _mistral3(config: Any, vision: Any) -> int:
    features = _features(config, vision)
    return features * _merged(config, vision) * features + _two_layers(config, vision)


def _patch_merger(config: Any, vision: Any) -> int:
    """Qwen-VL's: two matrices on merged patches; Qwen3-VL has one such merger more per deepstack layer."""
    kind = _field(vision, "model_type")
    width = _size(vision, "embed_dim" if kind in _QWEN2 else "hidden_size") * _merged(config, vision)
    out = _size(vision, "hidden_size" if kind in _QWEN2 else "out_hidden_size")
    mergers = 1 + len(_field(vision, "deepstack_visual_indexes") or ())
    return mergers * (width + out) * width


def _glm(config: Any, vision: Any) -> int:
    """A convolution that merges patches, then one matrix and a gated MLP."""
    out = _size(vision, "out_hidden_size")
    merging = _size(vision, "hidden_size") * _merged(config, vision) * out
    return merging + out * out + 3 * out * _size(vision, "intermediate_size")


def _ovis2(config: Any, vision: Any) -> int:
    """A head onto the visual vocabulary, then that vocabulary's embeddings."""
    entries, markers = _size(vision, "vocab_size"), _size(vision, "num_visual_indicator_tokens")
    head = _size(vision, "hidden_size") * _merged(config, vision) * (entries - markers)
    return head + entries * _size(text_config(config), "hidden_size")


_PROJECTORS: dict[Any, Callable[[Any, Any], int]] = {
    **dict.fromkeys(
        [None, "deepseek_vl", "llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava"],
        _two_layers,
    ),
    **dict.fromkeys(["gemma3", "paligemma", "idefics3", "smolvlm"], _one_matrix),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"], _patch_merger),
    **dict.fromkeys(["glm46v", "glm4v", "glm4v_moe"], _glm),
    "internvl": _internvl,
    **dict.fromkeys(["aya_vision", "cohere2_vision"], _aya),
    **dict.fromkeys(["mistral3", "lighton_ocr"], _mistral3),
    "ovis2": _ovis2,
}


def _fixed_patches(vision: Any) -> int:
    return (_side(vision, "image_size") // _side(vision, "patch_size")) ** 2


def _side(vision: Any, name: str) -> int:
    """A side in pixels, which some configs give as (height, width)."""
    value = _field(vision, name)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        return _size({name: value[0]}, name)
    return _size(vision, name)


def _first_size(vision: Any, *names: str) -> int:
    """The first of these sizes that the config has."""
    return _size(vision, next((name for name in names if _field(vision, name) is not None), names[-1]))
