"""What is known of every family of models: one row each, and the one place that says how families differ.

A family joins by its row, from outside as an entry point of the group ``thinsight.families``. Knows nothing about
torch; where the parts of a loaded model are is `runtime/anatomy.py`'s subject.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from operator import attrgetter
from typing import Any, Literal

from .errors import BadInput, Unsupported
from .registry import Registry

OLDEST, UNTESTED = (5, 19), (5, 25)
"""The first transformers that can be used, and the first that nobody has tested; as in pyproject.toml."""

NOT_KNOWN: Literal["not known"] = "not known"
"""Stands for a fact that nobody has found out: what needs it is refused, nothing is guessed."""

Merge = Callable[[Any, Any], int]
"""Of a model's config and its vision config: how many patches one vision token of the decoder stands for."""

Projector = Callable[[Any, Any, int], int]
"""Of a config, its vision config and `Merge`'s number: multiply-adds from the tower's output to one vision token."""


# -- reading a config, object or dict ------------------------------------------------------------------------


def field_of(config: Any, name: str) -> Any:
    """A field's value; None where the config has none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def size_of(config: Any, *names: str) -> int:
    """The first of these sizes that the config has; a side in pixels may be (height, width).

    Raises BadInput where none is a positive whole number.
    """
    name = next((name for name in names if field_of(config, name) is not None), names[-1])
    value = field_of(config, name)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise BadInput(f"the config's {name} must be a positive integer, got {value!r}")
    return value


def text_config(config: Any) -> Any:
    """The decoder's part of a model config: its ``text_config``, or the config itself."""
    inner = field_of(config, "text_config")
    return config if inner is None else inner


def patches_of(vision: Any) -> int:
    """Patches of an image or tile of the one size that a vision config says."""
    return (size_of(vision, "image_size") // size_of(vision, "patch_size")) ** 2


# -- how patches become vision tokens ------------------------------------------------------------------------


def square(name: str) -> Merge:
    """A token stands for a square of patches, whose side the vision config or the config says under this name."""
    return lambda config, vision: size_of(vision if field_of(vision, name) is not None else config, name) ** 2


def spatial_merge(config: Any, vision: Any) -> int:
    """A square as the vision config says it, or a patch alone."""
    return int(field_of(vision, "spatial_merge_size") or 1) ** 2


def one_to_one(config: Any, vision: Any) -> int:
    return 1


def merged_twice(config: Any, vision: Any) -> int:
    """MiniCPM-V's: windows of patches inside the tower, unless its mode leaves them, then the merger's squares."""
    window = field_of(vision, "window_kernel_size") or (2, 2)
    kernel = field_of(config, "merge_kernel_size") or (2, 2)
    inside = 1 if field_of(config, "downsample_mode") == "4x" else int(window[0] * window[1])
    return inside * int(kernel[0] * kernel[1]) ** int(field_of(config, "merger_times") or 1)


def windows(config: Any, vision: Any) -> int:
    """Granite Vision's: queries of each window of patches, so many per side."""
    queries, patches = (int(side) for side in str(field_of(config, "downsample_rate")).split("/"))
    if patches % queries:
        raise Unsupported(f"downsample_rate {queries}/{patches} makes no whole number of patches a token")
    return (patches // queries) ** 2


def shuffled(config: Any, vision: Any) -> int:
    return round(1 / float(field_of(config, "downsample_ratio") or 0.5)) ** 2


def kernel(config: Any, vision: Any) -> int:
    """A block of patches whose sides the vision config says."""
    height, width = field_of(vision, "merge_kernel_size")
    return int(height * width)


def halved_twice(config: Any, vision: Any) -> int:
    """Two convolutions, each of every second row and column."""
    return 4**2


def ratio(config: Any, vision: Any) -> int:
    return round(1 / float(field_of(vision, "pixel_shuffle_ratio") or 0.5)) ** 2


def averaged(config: Any, vision: Any) -> int:
    return patches_of(vision) // size_of(config, "mm_tokens_per_image")


def _width(config: Any) -> int:
    return size_of(text_config(config), "hidden_size")


def _features(config: Any, vision: Any) -> int:
    """Numbers per patch: of one layer of the tower, or of several side by side."""
    layers = field_of(config, "vision_feature_layer")
    return size_of(vision, "hidden_size") * (len(layers) if isinstance(layers, (list, tuple)) else 1)


def two_matrices(config: Any, vision: Any, merged: int) -> int:
    """LLaVA's: from the features to the decoder's width, and once more."""
    return (_features(config, vision) + _width(config)) * _width(config)


def one_matrix(config: Any, vision: Any, merged: int) -> int:
    """From merged patches to the decoder's width."""
    return size_of(vision, "hidden_size") * merged * _width(config)


def pooled_matrix(config: Any, vision: Any, merged: int) -> int:
    """From the average of merged patches to the decoder's width."""
    return size_of(vision, "hidden_size") * _width(config)


def shuffled_matrices(config: Any, vision: Any, merged: int) -> int:
    return (size_of(vision, "hidden_size") * merged + _width(config)) * _width(config)


def adapter_and_matrix(config: Any, vision: Any, merged: int) -> int:
    """Llama 4's: two matrices on merged patches, then one to the decoder's width."""
    middle, out = size_of(vision, "projector_input_dim"), size_of(vision, "projector_output_dim")
    adapter = size_of(vision, "intermediate_size") * middle + out * out
    return adapter + size_of(vision, "vision_output_dim") * _width(config)


def gated_matrices(config: Any, vision: Any, merged: int) -> int:
    middle = field_of(config, "alignment_intermediate_size") or _width(config)
    return size_of(vision, "hidden_size") * merged * middle + middle // 2 * _width(config)


def merged_matrices(config: Any, vision: Any, merged: int) -> int:
    features = _features(config, vision)
    return features * merged * features + two_matrices(config, vision, merged)


def patch_merger(config: Any, vision: Any, merged: int) -> int:
    """Qwen-VL's: two matrices on merged patches; Qwen3-VL has one such merger more per deepstack layer."""
    tower = tower_of(config)
    width = size_of(vision, tower.width) * merged
    return (1 + len(field_of(vision, "deepstack_visual_indexes") or ())) * (width + size_of(vision, tower.out)) * width


def pixels_matrices(config: Any, vision: Any, merged: int) -> int:
    """From the pixels of a merged patch to the decoder's width, with one width between."""
    side = size_of(vision, "patch_size") * size_of(vision, "pooling_kernel_size")
    return 3 * side**2 * size_of(vision, "mm_embed_dim") + size_of(vision, "output_proj_dims") * _width(config)


def convolution(config: Any, vision: Any, merged: int) -> int:
    """A convolution that merges patches, then one matrix and a gated MLP."""
    return _convolution(vision, merged, size_of(vision, "intermediate_size"))


def narrow_convolution(config: Any, vision: Any, merged: int) -> int:
    """GLM-OCR's: the MLP is as many times as wide as its input as the image has channels."""
    return _convolution(vision, merged, size_of(vision, "out_hidden_size") * size_of(vision, "in_channels"))


def _convolution(vision: Any, merged: int, middle: int) -> int:
    out = size_of(vision, "out_hidden_size")
    return size_of(vision, "hidden_size") * merged * out + out * out + 3 * out * middle


def paths(config: Any, vision: Any, merged: int) -> int:
    """Granite Docling's coarse path: a matrix from merged patches and one as wide as the decoder, and two for each
    layer of the tower that DeepStack taps."""
    features, out = size_of(vision, "hidden_size") * merged, size_of(vision, "out_hidden_size")
    return (1 + len(field_of(vision, "deepstack_visual_indexes"))) * (features + out) * out


def merged_in_time(config: Any, vision: Any, merged: int) -> int:
    """ERNIE 4.5 VL's: two matrices on merged patches, two on pairs of these, which an image's are with themselves, and
    one to the decoder's width."""
    features = size_of(vision, "hidden_size") * merged
    return features * (5 * features + _width(config))


def wide_matrices(config: Any, vision: Any, merged: int) -> int:
    """From merged patches to as many numbers, and to the decoder's width."""
    features = size_of(vision, "hidden_size") * merged
    return features * (features + _width(config))


def patch_merger_and_matrix(config: Any, vision: Any, merged: int) -> int:
    """Qwen-VL's merger as part of a tower, and one matrix from there to another decoder's width."""
    return patch_merger(config, vision, merged) + size_of(vision, "out_hidden_size") * _width(config)


def aligner(config: Any, vision: Any, merged: int) -> int:
    """Janus: one matrix to the projection's width, and the others of its depth."""
    width = size_of(vision, "projection_dim")
    return (size_of(vision, "hidden_size") + (size_of(vision, "depth") - 1) * width) * width


def middle_matrices(config: Any, vision: Any, merged: int) -> int:
    """From merged patches to the projector's width and on to the decoder's."""
    middle = size_of(config, "projector_hidden_size")
    return middle * (size_of(vision, "hidden_size") * merged + _width(config))


def three_matrices(config: Any, vision: Any, merged: int) -> int:
    """`middle_matrices` with one more between them."""
    return middle_matrices(config, vision, merged) + size_of(config, "projector_hidden_size") ** 2


def twice_two_matrices(config: Any, vision: Any, merged: int) -> int:
    """Two matrices on each patch, and two on the merged patches."""
    middle, width = size_of(config, "projector_hidden_size"), _width(config)
    return middle * (merged * (size_of(vision, "hidden_size") + width) + width * merged + width)


def neck(vision: Any) -> int:
    """SAM's, per patch: a matrix and a convolution of 3 x 3."""
    out = size_of(vision, "output_channels")
    return size_of(vision, "hidden_size") * out + 9 * out * out


def two_convolutions(config: Any, vision: Any, merged: int) -> int:
    """GOT-OCR 2.0: two of 3 x 3, each of every second row and column, and a matrix."""
    channels, width = size_of(vision, "output_channels"), _width(config)
    return 4 * 9 * channels * 2 * channels + 9 * 2 * channels * width + width * width


def two_towers(config: Any, vision: Any, merged: int) -> int:
    """DeepSeek-VL's SAM gives two maps, one through the neck a second time; both through two convolutions; then a half
    of the decoder's width from each tower, and one matrix."""
    high, width = field_of(config, "high_res_vision_config"), _width(config)
    channels = size_of(high, "output_channels")
    maps = 2 * (4 * 9 * channels * 2 * channels + 9 * 2 * channels * 4 * channels)
    # the neck runs on SAM's patches, of which there are so many per vision token
    again = neck(high) * patches_of(high) // patches_of(vision)
    return maps + again + (size_of(vision, "hidden_size") + 4 * channels) * (width // 2) + width * width


def visual_words(config: Any, vision: Any, merged: int) -> int:
    """A head onto the visual vocabulary, then that vocabulary's embeddings."""
    entries, markers = size_of(vision, "vocab_size"), size_of(vision, "num_visual_indicator_tokens")
    return size_of(vision, "hidden_size") * merged * (entries - markers) + entries * _width(config)


# -- the rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower: what its FLOPs depend on, with the names of the sizes in its config."""

    images: str = NOT_KNOWN  # "fixed": all images or tiles have one size; "any": images of any size run as one sequence
    class_token: bool = False
    gated: bool = False  # the MLP has three matrices, not two
    windowed: bool = False  # some layers attend within windows
    relative: bool = False  # SAM's: windows are filled up, and attention adds relative positions of its own
    pools: bool = False  # averages patches by a product with a matrix of patches x tokens
    bare: bool = False  # no layers at all: the projector reads pixels
    unread: str = ""  # why its attention cannot be read for a ranker
    width: str = "hidden_size"
    mlp: str = "intermediate_size"  # or "mlp_ratio", times the width
    out: str = "out_hidden_size"  # of a patch merger


_FILLED = "its vision tower fills all images up to one number of patches, which is not what its tokens are made of"
_NO_TOWER = "it has no vision tower whose attention could be read: its projector reads pixels"
_CROPS = "its vision tower reads crops that overlap, and a token is made of patches of several"
_QUERIED = "its tokens are queries of its vision tower, each of which has looked at all of a view"
_VIEWS = "its vision tower runs an overview and tiles of another size one after the other"
_CLS_LAST = "its vision tower's CLS token stands behind the patches, and tokens are made of blocks of them"
_SEVERAL = "its tokens are made of several of its vision tower's layers, and padding is cut away"
_TIMM = "its vision tower is one of the package timm, whose attention cannot be read here"
_CLIP, _FIXED = Tower("fixed", class_token=True), Tower("fixed")
_QWEN2 = Tower("any", width="embed_dim", mlp="mlp_ratio", out="hidden_size")
_QWEN2_5, _QWEN3 = Tower("any", gated=True, windowed=True), Tower("any")
_GLM4V = Tower("any", gated=True, mlp="out_hidden_size")
_PLAIN = Tower("any")
_SAM = Tower("fixed", relative=True, mlp="mlp_dim")

TOWERS: dict[str | None, Tower] = {
    None: _CLIP,  # a config that does not say
    "clip_vision_model": _CLIP,
    **dict.fromkeys(("internvl_vision", "qianfan_ocr_vision"), _CLIP),
    **dict.fromkeys(("siglip_vision_model", "idefics3_vision", "smolvlm_vision"), _FIXED),
    "granite_docling_vision": _FIXED,
    "step3p5_vision": Tower("fixed", unread=_VIEWS),
    "deepseek_ocr2_vision": Tower("fixed", unread=_QUERIED),
    "llama4_vision_model": Tower("fixed", class_token=True, unread=_CLS_LAST),
    "ovis2_vision": Tower("fixed", gated=True),
    **dict.fromkeys(("pixtral", "glm_ocr_vision"), Tower("any", gated=True)),
    **dict.fromkeys(("paddleocr_vl_vision", "video_llama_3_vision", "kimi_k25_vision"), _PLAIN),
    **dict.fromkeys(("cosmos3_edge_vision", "minimax_m3_vl_vision", "hunyuan_vl_vision"), _PLAIN),
    "ernie4_5_vl_moe_vision": _PLAIN,
    **dict.fromkeys(("gemma3n_vision", "timm_wrapper"), Tower("fixed", unread=_TIMM)),
    "muse_glimmer_vision": Tower("any", windowed=True),
    **dict.fromkeys(("sam_vision_model", "got_ocr2_vision", "pp_chart2table_vision"), _SAM),
    "janus_vision_model": Tower("fixed", mlp="mlp_ratio"),
    "gemma4_vision": Tower("any", gated=True, pools=True, unread=_FILLED),
    "molmo2_vision": Tower("fixed", unread=_CROPS),
    **dict.fromkeys(("qwen2_5_omni_vision_encoder",), Tower("any", windowed=True, gated=True)),
    **dict.fromkeys(("qwen3_omni_moe_vision_encoder",), Tower("any")),
    "gemma4_unified_vision": Tower("any", bare=True, unread=_NO_TOWER),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_vision"), _QWEN2),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_vision", "exaone4_5_vision"), _QWEN2_5),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision"), _QWEN3),
    **dict.fromkeys(("qwen3_5_vision", "qwen3_5_moe_vision"), _QWEN3),
    **dict.fromkeys(("glm4v_vision", "glm4v_moe_vision"), _GLM4V),
    # how their FLOPs add up is not known: rows with them leave the projector out
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"), Tower("any")),
    **dict.fromkeys(("lfm3_vl_vision", "siglip2_vision_model"), Tower("any")),
}
"""By the vision config's model_type."""

Tiles = Literal["whole", "lines", "overview first", "overview last", "views", "unpadded", "resampled", "pooled"]


@dataclass(frozen=True)
class SupportedModel:
    """A family of models that runs under a reduction, as people know it."""

    model_type: str  # of its config
    model_class: str  # of transformers; from `models()` "" if the installed version lacks it
    name: str
    modalities: tuple[str, ...] = ("image",)  # "image", "video": what `generate` takes by arguments of their own
    notes: str = ""  # what of it is refused, or needs a step of its own
    needs: tuple[str, ...] = ()  # packages that its processor or its tower needs beside thinsight's own


@dataclass(frozen=True)
class Family(SupportedModel):
    """A row: all that is known of a family. What it leaves out is as most families have it.

    `tiles` says how an image becomes vision tokens: "whole", in "lines" with tokens of its own at the ends, or cut into
    tiles with the "overview first" or "overview last" among them, or with tiles of another size ("views"); "unpadded"
    is an overview, then tiles whose padding was cut away after the tower (LLaVA-NeXT); "resampled" tokens have each
    looked at all of the image, "pooled" ones are made of patches of crops that overlap.
    """

    since: tuple[int, int] = OLDEST  # the first transformers that has it, of those that can be used
    image_placeholder: str = "image_token_id"  # of its config: the token that images stand behind
    video_placeholder: str | None = "video_token_id"  # None: videos stand behind the images' one
    runs: bool = False  # an image is a run of vision tokens: the encoder lists tiles, or a row's images as one
    strips: bool = False  # pixels of several images are one strip of patches, joined in the last dimension
    both_ways: bool = False  # a prompt's tokens see those behind them
    tiles: Tiles = "whole"
    tower: Tower | None = None  # None: what `TOWERS` has for the vision config's model_type
    merge: Merge = spatial_merge
    projector: Projector | Literal["not known"] = NOT_KNOWN
    makes_cache: bool = True  # a forward pass makes itself a cache where it is given none
    second_tower: str = ""  # of its config: where that of a tower beside the first is
    bare_processor: str = ""  # its processor's class, if a prompt without a chat template names no roles
    flat_processor: str = ""  # its processor's class, if it takes a prompt's images without a list of their own


_BOTH, _VISION = ("image", "video"), ("torchvision",)
_WINDOWS = "static caches are refused: the text model's windowed layers keep theirs in a ring"
_SHARED = (
    "no tokens can be left out of layers that read another layer's keys: each has those of the last one before them"
)
_CHUNKS = "static caches are refused: the text model's chunked layers keep theirs in a ring"
_MISTRAL = "static caches are refused on Mistral 7B v0.1 text"
_STATES = "later turns whose rows keep different numbers of tokens are refused: some layers carry a state"
_PLACES = "images in a later turn on a cache: say position_ids, which transformers gets wrong"
_CONVERT = "original checkpoints: `thinsight convert`"

# What rows share, and what makes a family's own kind.
_llava = partial(Family, projector=two_matrices)
_unpadded = partial(_llava, tiles="unpadded")
_tiled = partial(Family, tiles="overview last")
_cohere = partial(_tiled, notes=_WINDOWS, merge=square("downsample_factor"), projector=gated_matrices)
_idefics = partial(_tiled, runs=True, merge=square("scale_factor"), projector=one_matrix)
_resampled = partial(Family, runs=True, tiles="resampled", projector=NOT_KNOWN)
_internvl = partial(_tiled, needs=_VISION, runs=True, merge=shuffled, projector=shuffled_matrices)
_gemma = partial(Family, merge=averaged, projector=pooled_matrix)
_gemma4 = partial(Family, notes=f"{_WINDOWS}; {_SHARED}", merge=square("pooling_kernel_size"), projector=pooled_matrix)
_unified = partial(_gemma4, merge=one_to_one, projector=pixels_matrices)
_llama4 = partial(Family, notes=_CHUNKS, runs=True, tiles="overview last", merge=ratio, projector=adapter_and_matrix)
_paligemma = partial(Family, both_ways=True, projector=one_matrix, bare_processor="PaliGemmaProcessor")
_pixtral = partial(Family, merge=square("spatial_merge_size"), projector=merged_matrices)
_ovis = partial(Family, tiles="overview first", merge=square("hidden_stride"), projector=visual_words)
_molmo = partial(
    Family, image_placeholder="image_patch_id", video_placeholder=None, tiles="pooled", projector=NOT_KNOWN
)
_qwen = partial(Family, modalities=_BOTH, needs=_VISION, projector=patch_merger)
_glm = partial(_qwen, projector=convolution, video_placeholder=None)
_hybrid = partial(Family, projector=two_towers, second_tower="high_res_vision_config")
_sam = partial(Family, merge=halved_twice, projector=two_convolutions)
_minicpm = partial(
    Family, modalities=_BOTH, needs=_VISION, strips=True, tiles="overview first", merge=merged_twice, notes=_STATES
)

_ROWS = (
    _resampled("aria", "AriaForConditionalGeneration", "Aria", runs=False),
    _cohere("aya_vision", "AyaVisionForConditionalGeneration", "Aya Vision"),
    _cohere("cohere2_vision", "Cohere2VisionForConditionalGeneration", "Command A Vision", needs=_VISION, runs=True),
    _qwen(
        *("cosmos3_edge", "Cosmos3EdgeForConditionalGeneration", "Cosmos3 Edge"),
        notes=_PLACES,
        projector=middle_matrices,
    ),
    _resampled("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", "DeepSeek-OCR 2", runs=False),
    _llava("deepseek_vl", "DeepseekVLForConditionalGeneration", "DeepSeek-VL"),
    _hybrid("deepseek_vl_hybrid", "DeepseekVLHybridForConditionalGeneration", "DeepSeek-VL Hybrid"),
    _qwen(*("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", "ERNIE 4.5 VL"), projector=merged_in_time),
    _qwen("exaone4_5", "Exaone4_5_ForConditionalGeneration", "EXAONE 4.5", notes=_WINDOWS),
    Family("fast_vlm", "FastVlmForConditionalGeneration", "FastVLM", needs=("timm",)),
    _gemma("gemma3", "Gemma3ForConditionalGeneration", "Gemma 3", notes=_WINDOWS),
    Family("gemma3n", "Gemma3nForConditionalGeneration", "Gemma 3n", notes=f"{_WINDOWS}; {_SHARED}", needs=("timm",)),
    _gemma4("gemma4", "Gemma4ForConditionalGeneration", "Gemma 4", _BOTH, needs=_VISION),
    _unified("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", "Gemma 4 Unified", _BOTH, needs=_VISION),
    _glm("glm46v", "Glm46VForConditionalGeneration", "GLM-4.6V"),
    _glm("glm4v", "Glm4vForConditionalGeneration", "GLM-4.1V"),
    _glm("glm4v_moe", "Glm4vMoeForConditionalGeneration", "GLM-4.5V"),
    _glm("glm_ocr", "GlmOcrForConditionalGeneration", "GLM-OCR", projector=narrow_convolution),
    _glm("glmga", "Glm46VForConditionalGeneration", "Glmga"),
    _sam(
        *("got_ocr2", "GotOcr2ForConditionalGeneration", "GOT-OCR 2.0"),
        bare_processor="GotOcr2Processor",
        flat_processor="GotOcr2Processor",
    ),
    Family(
        *("granite4_vision", "Granite4VisionForConditionalGeneration", "Granite 4 Vision"),
        tiles="unpadded",
        tower=Tower("fixed", unread=_SEVERAL),
        merge=windows,
        makes_cache=False,
    ),
    _idefics(
        *("granite_docling", "GraniteDoclingForConditionalGeneration", "Granite Docling"),
        notes="costs are those of the coarse path",
        projector=paths,
    ),
    Family(
        *("hunyuan_vl", "HunYuanVLForConditionalGeneration", "HunYuan-VL, HunyuanOCR"),
        notes="answers hang on the batch, whose images transformers numbers on from row to row; images in a later turn "
        "on a cache: say position_ids, which it gets wrong",
        tiles="lines",
    ),
    _qwen(
        *("hyperclovax_vision_v2", "HyperCLOVAXVisionV2ForConditionalGeneration", "HyperCLOVA X Vision 2"),
        projector=patch_merger_and_matrix,
    ),
    _resampled("idefics2", "Idefics2ForConditionalGeneration", "Idefics2"),
    _idefics("idefics3", "Idefics3ForConditionalGeneration", "Idefics3"),
    _internvl("internvl", "InternVLForConditionalGeneration", "InternVL 2, 2.5, 3 and 3.5", notes=_CONVERT),
    Family("janus", "JanusForConditionalGeneration", "Janus", notes="answers in text", projector=aligner),
    Family(
        *("kimi_k25", "Kimi_K25ForConditionalGeneration", "Kimi K2.5 and later"),
        notes="videos of several frames fail in transformers",
        needs=_VISION,
        merge=kernel,
        projector=wide_matrices,
    ),
    Family(
        *("lfm2_vl", "Lfm2VlForConditionalGeneration", "LFM2-VL"),
        needs=_VISION,
        tiles="overview last",
        merge=square("downsample_factor"),
        notes=_STATES,
    ),
    Family(
        *("lfm3_vl", "Lfm3VlForConditionalGeneration", "LFM3-VL", _BOTH),
        needs=_VISION,
        since=(5, 23),
        notes=f"{_WINDOWS}; {_STATES}",
    ),
    _pixtral("lighton_ocr", "LightOnOcrForConditionalGeneration", "LightOnOCR"),
    _llama4("llama4", "Llama4ForConditionalGeneration", "Llama 4", needs=_VISION),
    _llava("llava", "LlavaForConditionalGeneration", "LLaVA-1.5 and its like, Pixtral", notes=_MISTRAL),
    _unpadded("llava_next", "LlavaNextForConditionalGeneration", "LLaVA-NeXT (1.6)"),
    _unpadded("llava_next_video", "LlavaNextVideoForConditionalGeneration", "LLaVA-NeXT-Video", _BOTH, needs=_VISION),
    _unpadded("llava_onevision", "LlavaOnevisionForConditionalGeneration", "LLaVA-OneVision", _BOTH, needs=_VISION),
    _minicpm("minicpm_ocr", "MiniCPMOcrForConditionalGeneration", "MiniCPM-OCR", since=(5, 21)),
    _minicpm("minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration", "MiniCPM-V 4.6"),
    _minicpm(*("minicpmv4_7", "MiniCPMV4_7ForConditionalGeneration", "MiniCPM-V 4.7"), notes=f"{_STATES}; {_PLACES}"),
    _qwen(
        *("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", "MiniMax-M3"),
        notes="layers with a sparse index are refused",
        projector=twice_two_matrices,
    ),
    _pixtral("mistral3", "Mistral3ForConditionalGeneration", "Mistral Small 3.1 and later", needs=_VISION),
    _molmo("molmo2", "Molmo2ForConditionalGeneration", "Molmo2", _BOTH, needs=_VISION, since=(5, 20)),
    _qwen(
        *("muse_glimmer", "MuseGlimmerForConditionalGeneration", "Muse Glimmer"),
        notes=_WINDOWS,
        merge=square("merge_size"),
        projector=three_matrices,
    ),
    _ovis("ovis2", "Ovis2ForConditionalGeneration", "Ovis2"),
    Family("paddleocr_vl", "PaddleOCRVLForConditionalGeneration", "PaddleOCR-VL", projector=wide_matrices),
    _paligemma("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemma 1 and 2"),
    Family(
        *("perception_lm", "PerceptionLMForConditionalGeneration", "PerceptionLM", _BOTH),
        notes="images of a batch have one number of tiles",
        needs=(*_VISION, "timm"),
        tiles="overview first",
    ),
    _sam("pp_chart2table", "GotOcr2ForConditionalGeneration", "PP-Chart2Table"),
    _internvl("qianfan_ocr", "QianfanOCRForConditionalGeneration", "Qianfan-OCR", needs=()),
    _qwen("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL"),
    _qwen("qwen2_5_omni_thinker", "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2.5-Omni thinker"),
    _qwen("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2-VL"),
    _qwen("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3.5", notes=_STATES),
    _qwen("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "Qwen3.5 MoE", notes=_STATES),
    _qwen("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3-Omni thinker"),
    _qwen("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3-VL"),
    _qwen("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "Qwen3-VL MoE"),
    _gemma(
        *("shieldgemma2", "Gemma3ForConditionalGeneration", "ShieldGemma 2"),
        notes=f"{_WINDOWS}; loads as ShieldGemma2ForImageClassification, whose `model` it is; its own processor asks "
        "about its policies alone: evaluate with Gemma3Processor",
    ),
    _idefics("smolvlm", "SmolVLMForConditionalGeneration", "SmolVLM 1 and 2", needs=(*_VISION, "num2words")),
    Family(*("step3p7", "Step3p7ForConditionalGeneration", "Step 3.7"), notes=_WINDOWS, needs=_VISION, tiles="views"),
    _llava("video_llama_3", "VideoLlama3ForConditionalGeneration", "VideoLLaMA 3", _BOTH, needs=_VISION),
    _llava("video_llava", "VideoLlavaForConditionalGeneration", "Video-LLaVA", _BOTH, needs=_VISION),
    _llava("vipllava", "VipLlavaForConditionalGeneration", "VipLLaVA"),
)
FAMILIES: Registry[Family] = Registry("family", "thinsight.families", code=attrgetter("model_class"), key="model_type")
"""By model_type."""
for _row in _ROWS:
    FAMILIES.register(_row)


# -- those that cannot ---------------------------------------------------------------------------------------

_IN_FRONT = "puts an image's features in front of the text itself: no tokens of its prompt stand for them"
_QUERIES = (
    "hands its text model the few query tokens of a Q-Former in place of an image's patches, and that model may be an "
    "encoder-decoder"
)
_WORDS = "turns an image into words of its own vocabulary, which it writes itself, too: no tokens are vision alone"
_SPEAKS = "is a whole of a model that reads and one that speaks; load the reading part, its thinker, alone"
_CROSSES = "reads images by cross-attention: its decoder's input has no vision tokens to drop"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("blip", "idefics"), _CROSSES),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _QUERIES),
    **dict.fromkeys(("chameleon", "emu3"), _WORDS),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), _SPEAKS),
    "diffusion_gemma": "writes whole blocks by diffusion, again and again over all of the prompt, not token by token",
    "evolla": "reads proteins, by cross-attention, and no images",
    "git": _IN_FRONT,
    "kosmos-2": "lays an image's features over places that an argument names, not over tokens of its own",
    "kosmos-2.5": "lays an image's features over places that an argument names, not over tokens of its own",
    "mistral4": "is a text model without a vision encoder; inside a model of type 'mistral3' it runs",
    "phi4_multimodal": "reads pixels inside its embedding, by arguments of its own, and swaps adapters for them",
    "pi0": "moves a robot: an action expert reads the keys of all layers, and no text is written",
}
"""Model types that cannot run under a reduction, each with what holds for it; encoder-decoders, cross-attention and
layers of other kinds are told by the config."""

_INDEXED = (
    "choose the keys that a token sees by a sparse index over all of the sequence: tokens left out would move all that "
    "stand behind them"
)
LAYERS: dict[str, str] = {
    "indexed_attention": _INDEXED,
    "minimax_m3_sparse": _INDEXED,
    "reference_sliding_attention": "keep the prompt and a window of what follows in a cache of their own",
}
"""Of `layer_types`: kinds of layers in which a token cannot be left out, and why; others carry a state along."""


# -- looking one up ------------------------------------------------------------------------------------------


def family_of(config: Any) -> Family:
    """The row of a model's config, object or dict; of a family without one, what holds for most.

    A config that does not say its model_type is read as LLaVA's.
    """
    kind = field_of(config, "model_type") or "llava"
    return FAMILIES[kind] if kind in FAMILIES else Family(kind, "", kind)


def tower_of(config: Any) -> Tower:
    """The kind of a config's vision tower; of one that is not known, its `images` are `NOT_KNOWN`."""
    kind = field_of(field_of(config, "vision_config"), "model_type")
    return family_of(config).tower or TOWERS.get(kind) or Tower()


def has_roles(processor: Any) -> bool:
    """Whether a prompt of a processor without a chat template says who speaks."""
    return type(processor).__name__ not in {row.bare_processor for row in FAMILIES.values()}


def nests_images(processor: Any) -> bool:
    """Whether a processor takes the images of each prompt in a list of their own."""
    return type(processor).__name__ not in {row.flat_processor for row in FAMILIES.values()}


def models() -> tuple[SupportedModel, ...]:
    """All families of models that run under a reduction, by model_type."""
    installed = tuple(int(part) for part in metadata.version("transformers").split(".")[:2])
    rows = sorted(FAMILIES.values(), key=lambda row: row.model_type)
    return tuple(
        SupportedModel(
            row.model_type,
            row.model_class if row.since <= installed else "",
            *(row.name, row.modalities, row.notes, row.needs),
        )
        for row in rows
    )
