"""Image, video and prompt processing of the original code as a stock `InternVLProcessor`'s files.

The files are written rather than saved from an `InternVLProcessor`, since that one cannot be made where
torchvision is not installed. Knows nothing about weights.

Source: `load_image` of the model cards, `dynamic_preprocess` in internvl_chat/internvl/train/dataset.py of
github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..errors import BadInput
from .config import image_size_of
from .prompts import Conversation, chat_template

__all__ = ["stop_token_id", "write_generation_config", "write_processor"]

_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC = 3  # PIL's number


def write_processor(
    folder: Path,
    config: Mapping[str, Any],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    image_seq_length: int,
) -> None:
    """Write processor_config.json, chat_template.jinja and the tokenizer's files.

    Args:
        folder: where they go.
        config: the original config.json.
        conversation: the prompt's format.
        tokenizer: the converted one.
        image_seq_length: vision tokens of one tile.
    """
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": image_seq_length,
        "image_processor": _image_settings(config),
        "video_processor": _video_settings(config),
    }
    text = json.dumps(processor, indent=2, sort_keys=True) + "\n"
    (folder / "processor_config.json").write_text(text, encoding="utf-8")
    tokenizer.chat_template = chat_template(conversation)
    tokenizer.save_pretrained(folder)  # writes chat_template.jinja too


def stop_token_id(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> int:
    """The token at which the original's `chat` ends an answer.

    Raises:
        ThinsightError: the tokenizer lacks it.
    """
    number = tokenizer.convert_tokens_to_ids(conversation.stop_token)
    if number is None or number == tokenizer.unk_token_id:
        raise BadInput(
            f"the tokenizer has no {conversation.stop_token!r}, which ends a message in this checkpoint's "
            "template: they belong to different checkpoints"
        )
    return int(number)


def write_generation_config(folder: Path, stop: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write generation_config.json; ``stop`` is the token that ends an answer."""
    GenerationConfig(
        eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    ).save_pretrained(folder)


def _pixel_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    size = image_size_of(config)
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _IMAGENET_MEAN,
        "image_std": _IMAGENET_STD,
    }


def _image_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    tiled = bool(config.get("dynamic_image_size", False))
    return {
        **_pixel_settings(config),
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": tiled,
        "min_patches": int(config.get("min_dynamic_patch", 1)) if tiled else 1,
        # one patch is one whole image, which also holds where a processor turns cropping on by itself
        "max_patches": int(config.get("max_dynamic_patch", 6)) if tiled else 1,
    }


def _video_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_pixel_settings(config), "video_processor_type": "InternVLVideoProcessor"}
