"""Which models run under a reduction: what `thinsight.models()` and `thinsight models` list.

The list itself is `runtime.families.SUPPORTED`; this file adds the names that people use. Knows nothing about
how any of them runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from .runtime.families import SUPPORTED

IMAGE, BOTH = ("image",), ("image", "video")
_WINDOWS = "static caches are refused: the text model's windowed layers keep theirs in a ring"

# model_type: name, modalities, notes
_ABOUT: dict[str, tuple[str, tuple[str, ...], str]] = {
    "aya_vision": ("Aya Vision", IMAGE, _WINDOWS),
    "cohere2_vision": ("Command A Vision", IMAGE, _WINDOWS),
    "deepseek_vl": ("DeepSeek-VL", IMAGE, ""),
    "gemma3": ("Gemma 3", IMAGE, _WINDOWS),
    "glm46v": ("GLM-4.6V", BOTH, ""),
    "glm4v": ("GLM-4.1V", BOTH, ""),
    "glm4v_moe": ("GLM-4.5V", BOTH, ""),
    "idefics2": ("Idefics2", IMAGE, ""),
    "idefics3": ("Idefics3", IMAGE, ""),
    "internvl": ("InternVL 2, 2.5, 3 and 3.5", IMAGE, "original checkpoints: `thinsight convert`"),
    "lighton_ocr": ("LightOnOCR", IMAGE, ""),
    "llava": ("LLaVA-1.5 and its like, Pixtral", IMAGE, "static caches are refused on Mistral 7B v0.1 text"),
    "llava_next": ("LLaVA-NeXT (1.6)", IMAGE, ""),
    "llava_next_video": ("LLaVA-NeXT-Video", BOTH, ""),
    "llava_onevision": ("LLaVA-OneVision", BOTH, ""),
    "mistral3": ("Mistral Small 3.1 and later", IMAGE, ""),
    "ovis2": ("Ovis2", IMAGE, ""),
    "paligemma": ("PaliGemma 1 and 2", IMAGE, ""),
    "qwen2_5_vl": ("Qwen2.5-VL", BOTH, ""),
    "qwen2_vl": ("Qwen2-VL", BOTH, ""),
    "qwen3_vl": ("Qwen3-VL", BOTH, ""),
    "qwen3_vl_moe": ("Qwen3-VL MoE", BOTH, ""),
    "smolvlm": ("SmolVLM 1 and 2", IMAGE, ""),
    "video_llava": ("Video-LLaVA", BOTH, ""),
    "vipllava": ("VipLLaVA", IMAGE, ""),
}

# Packages that transformers' processors need beside thinsight's own: those that read video, and a few more.
_VISION = ("torchvision",)
_NEEDS: dict[str, tuple[str, ...]] = {
    "cohere2_vision": _VISION,
    "glm46v": _VISION,
    "glm4v": _VISION,
    "glm4v_moe": _VISION,
    "internvl": _VISION,
    "llava_next_video": _VISION,
    "llava_onevision": _VISION,
    "mistral3": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_vl": _VISION,
    "qwen3_vl": _VISION,
    "qwen3_vl_moe": _VISION,
    "smolvlm": (*_VISION, "num2words"),
    "video_llava": _VISION,
}


@dataclass(frozen=True)
class SupportedModel:
    """A family of models that runs under a reduction."""

    model_type: str  # of its config
    model_class: str  # of transformers; "" if the installed version lacks it
    name: str
    modalities: tuple[str, ...]  # "image", "video": what `generate` takes by arguments of their own
    notes: str  # what of it is refused, or needs a step of its own; "" if nothing
    needs: tuple[str, ...] = ()  # packages that its processor needs beside thinsight's own


def models() -> tuple[SupportedModel, ...]:
    """All families of models that run under a reduction, by model_type."""
    return tuple(
        SupportedModel(kind, CLASSES.get(kind, ""), *_ABOUT[kind], needs=_NEEDS.get(kind, ())) for kind in SUPPORTED
    )
