"""What a vision encoder costs: FLOPs of its tower and projector, from a model config alone.

Arithmetic only, in the manner of cost.py: one multiply-add is 2 FLOPs; norms, activations, rotary tables and
interpolated position embeddings are left out. Every layer of the tower counts, because stock transformers
runs all of them even when the features are taken from an earlier one. A pooling head after the tower is not
counted: its output is not used. Knows nothing about decoders, schedules or pixels.

Towers of a fixed image size (CLIP, SigLIP, InternViT, Idefics) cost the same for every image or tile. Towers
that take any image (Qwen-VL, GLM-V, Pixtral) are counted from the number of vision tokens that came out of
them, all images taken to be of one size, the windows of Qwen2.5-VL's attention to be full. LLaVA-NeXT and
LLaVA-OneVision cut padding away after the tower, and Idefics2 resamples every image to equally many tokens,
so tokens do not tell how much the tower saw: refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cost import DecoderShape, _field, _size, text_config
from .errors import BadInput, Unsupported

__all__ = ["vision_flops"]

_CLASS_TOKEN = frozenset({"clip_vision_model", "internvl_vision"})
_FIXED = frozenset(
    {
        "clip_vision_model",
        "siglip_vision_model",
        "internvl_vision",
        "idefics3_vision",
        "smolvlm_vision",
        "ovis2_vision",
    }
)
_GATED = frozenset(
    {"pixtral", "qwen2_5_vl_vision", "qwen2_5_vl", "glm4v_vision", "glm4v_moe_vision", "ovis2_vision"}
)
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
    width = (
        _first_size(vision, "embed_dim", "hidden_size") if kind in _QWEN2 else _size(vision, "hidden_size")
    )
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
        [
            None,
            "deepseek_vl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "video_llava",
            "vipllava",
        ],
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
