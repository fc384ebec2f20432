"""Small random checkpoints of the stock classes, each a folder with weights, config, tokenizer and processor, and the
inputs that its processor makes of some prompts.

Made in vLLM's environment, so that what both sides read is the same to the pixel: `python checkpoints.py FOLDER`. Head
size 32, the least that vLLM's attention on a CPU takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import SPECIALS, VOCABULARY, Prompt, inputs_file, prompts_of
from conformance import families as conformance
from conformance.family import draw_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

LAYERS = 6
NAMES = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>", "<start>", "<end>", "<break>", "<tile>"]
NAMES += [f"<special {i}>" for i in range(SPECIALS - len(NAMES))]
PAD, UNK, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, TILE = range(10)


def text(model_type: str, **more: Any) -> dict[str, Any]:
    """A text model's config."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    return conformance.text(model_type, **{**sizes, **more})


def mrope(model_type: str, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], **more.pop("rope", {})}
    return text(model_type, rope_parameters=rope, **more)


def tokenizer(names: Mapping[str, str] | None = None, **more: Any) -> PreTrainedTokenizerFast:
    """Words w20, w21, ... and special tokens, some of which a family calls by other names."""
    called = [(names or {}).get(name, name) for name in NAMES]
    vocabulary = {word: i for i, word in enumerate([*called, *(f"w{i}" for i in range(SPECIALS, VOCABULARY))])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=called[4:],
        **more,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A family as vLLM is to serve it."""

    name: str
    model_class: str
    config: Mapping[str, Any]
    processor: Callable[[], Any]
    placeholder: str = "<image>"  # of an image in a prompt's text
    video_placeholder: str = "<video>"  # the same of a video
    wants_times: bool = False  # vLLM is to be told of those of a video's frames
    sizes: tuple[tuple[int, int], ...] = ((56, 56),)  # (height, width) of images, in turn
    renames: tuple[tuple[str, str], ...] = ()  # key prefixes as vLLM knows them
    transposed: str = ""  # of which weights published checkpoints hold the last two dimensions the other way round
    title: str = ""  # of the family, where the class serves several

    def write(self, folder: Path, prompts: list[Prompt]) -> None:
        made = getattr(transformers, self.model_class)
        config = made.config_class(**json.loads(json.dumps(dict(self.config))))
        model = made._from_config(config, attn_implementation="eager")
        draw_weights(model, 0)
        model.save_pretrained(folder)
        processor = self.processor()
        processor.save_pretrained(folder)
        weights = folder / "model.safetensors"
        kept = load_file(weights)
        for old, new in self.renames:
            kept = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in kept.items()}
        if self.transposed:
            kept = {k: v.mT.contiguous() if self.transposed in k else v for k, v in kept.items()}
        save_file(kept, weights, metadata={"format": "pt"})
        (folder.parent / "inputs" / self.name).mkdir(parents=True, exist_ok=True)
        for prompt in prompts:
            kind: dict[str, Any] = {"images": self.images(prompt) or None}
            if prompt.videos:
                videos, about = zip(*(self.video(i) for i in prompt.images), strict=True)
                kind = {"videos": list(videos), "video_metadata": list(about), "do_sample_frames": False}
            given = processor(text=[self.text(prompt)], **kind, return_tensors="pt")
            tensors = {name: torch.as_tensor(value).contiguous() for name, value in given.items()}
            save_file(tensors, inputs_file(folder.parent, self.name, prompt))

    def images(self, prompt: Prompt) -> list[Image.Image]:
        return [image(i, self.sizes[i % len(self.sizes)]) for i in prompt.images]

    def video(self, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames (4, height, width, 3), and what is known of them."""
        size = self.sizes[number % len(self.sizes)]
        frames = np.stack([np.asarray(image(100 * number + i, size)) for i in range(4)])
        return frames, {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}

    def text(self, prompt: Prompt) -> str:
        first, *others = (" ".join(f"w{word}" for word in words) for words in prompt.words)
        mark = self.video_placeholder if prompt.videos else self.placeholder
        return f"<s> {first}" + "".join(f" {mark} {words}" for words in others)


def image(number: int, size: tuple[int, int]) -> Image.Image:
    """Random pixels, in blocks so that resizing leaves them apart."""
    draw = torch.Generator().manual_seed(number)
    blocks = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
    return Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST)


# -- processors ----------------------------------------------------------------------------------------------

SQUARE = {"height": 56, "width": 56}
LARGE = 196  # pixels, the least at which vLLM pools the patches of a LLaVA-NeXT-Video's frame
QWEN = {
    "<image>": "<|image_pad|>",
    "<video>": "<|video_pad|>",
    "<start>": "<|vision_start|>",
    "<end>": "<|vision_end|>",
}
GLM = {
    "<image>": "<|image|>",
    "<video>": "<|video|>",
    "<start>": "<|begin_of_image|>",
    "<end>": "<|end_of_image|>",
    "<break>": "<|begin_of_video|>",
    "<tile>": "<|end_of_video|>",
}
INTERNVL = {"<image>": "<IMG_CONTEXT>", "<start>": "<img>", "<end>": "</img>"}
PADDLE = {"<image>": "<|IMAGE_PLACEHOLDER|>", "<start>": "<|IMAGE_START|>", "<end>": "<|IMAGE_END|>"}
PIXTRAL = {"<image>": "[IMG]", "<break>": "[IMG_BREAK]", "<end>": "[IMG_END]"}
IDEFICS = {
    "<start>": "<fake_token_around_image>",
    "<end>": "<global-img>",
    "<break>": "<end_of_utterance>",
    "<special 0>": "<row_1_col_1>",
    "<special 1>": "<row_1_col_2>",
    "<special 2>": "<row_2_col_1>",
    "<special 3>": "<row_2_col_2>",
}


def _llava() -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    return transformers.LlavaProcessor(
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next() -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next_video() -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    side = {"height": LARGE, "width": LARGE}
    videos = transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": LARGE}, crop_size=side)
    return transformers.LlavaNextVideoProcessor(
        videos,
        images,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision() -> Any:
    images = transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _internvl() -> Any:
    side = {"height": 112, "width": 112}
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = transformers.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = transformers.InternVLVideoProcessor(size=side)
    return transformers.InternVLProcessor(
        images, tokenizer(INTERNVL, extra_special_tokens=named), videos, image_seq_length=16
    )


def _qwen(name: str, **more: Any) -> Any:
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 224}
    images = transformers.Qwen2VLImageProcessor(**limits, **more)
    video = transformers.Qwen3VLVideoProcessor if name == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{name}Processor")
    return processor(images, tokenizer(QWEN), video(**more))


def _glm() -> Any:
    limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 224 * 2}
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    images = transformers.Glm4vImageProcessor(size=limits, **patches)
    videos = transformers.Glm4vVideoProcessor(size=limits, **patches)
    return transformers.Glm4vProcessor(images, tokenizer(GLM), videos)


def _paddle() -> Any:
    limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 224}
    images = transformers.PaddleOCRVLImageProcessor(size=limits, patch_size=14, merge_size=2)
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    return transformers.PaddleOCRVLProcessor(images, tokenizer(PADDLE, extra_special_tokens=named))


def _mistral3() -> Any:
    images = transformers.PixtralImageProcessor(size={"longest_edge": 140}, patch_size={"height": 28, "width": 28})
    return transformers.PixtralProcessor(images, tokenizer(PIXTRAL), patch_size=14, spatial_merge_size=2)


def _pixtral() -> Any:
    images = transformers.PixtralImageProcessor(size={"longest_edge": 140}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(images, tokenizer(PIXTRAL), patch_size=14)


def _idefics(name: str) -> Any:
    images = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True
    )
    made = tokenizer(IDEFICS)
    if name == "SmolVLM":
        return transformers.SmolVLMProcessor(images, made, transformers.SmolVLMVideoProcessor(), image_seq_len=4)
    return transformers.Idefics3Processor(images, made, image_seq_len=4)


# -- the table -----------------------------------------------------------------------------------------------

PINPOINTS = [[112, 112], [56, 112], [112, 56]]
CLIP = conformance.tower("clip_vision_model", 56, 14, projection_dim=32)
SIGLIP = conformance.tower("siglip_vision_model", 56, 14, vision_use_head=False)
IDEFICS_TOWER = conformance.tower("idefics3_vision", 56, 14)
PATCHES = {**conformance.PATCH_TOWER, "patch_size": 14, "out_hidden_size": 128}
QWEN3_TOWER = {
    **PATCHES,
    "patch_size": 16,
    "depth": 4,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
CLIP_KEYS = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.", "model.vision_tower.vision_model."),
)
ANY = ((112, 112), (56, 112), (112, 56))
GRID = ((112, 112), (56, 140), (84, 112))
VIDEO_ID = {"video_token_id": VIDEO}
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"  # as processors look for it
GLM_IMAGE = "<|begin_of_image|> <|image|> <|end_of_image|>"

TABLE = (
    Checkpoint(
        "llava",
        "LlavaForConditionalGeneration",
        conformance.config(text("llama"), CLIP, image_seq_length=16),
        _llava,
        renames=CLIP_KEYS,
        title="LLaVA-1.5",
    ),
    Checkpoint(
        "llava-qwen2",
        "LlavaForConditionalGeneration",
        conformance.config(text("qwen2"), CLIP, image_seq_length=16),
        _llava,
        renames=CLIP_KEYS,
        title="LLaVA with Qwen2",
    ),
    Checkpoint(
        "pixtral",
        "LlavaForConditionalGeneration",
        conformance.config(
            text("mistral", sliding_window=None),
            conformance.tower("pixtral", 140, 14),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _pixtral,
        placeholder="[IMG]",
        sizes=((56, 56), (28, 70), (42, 56)),
        title="Pixtral",
    ),
    Checkpoint(
        "llava-next",
        "LlavaNextForConditionalGeneration",
        conformance.config(text("llama"), CLIP, image_grid_pinpoints=PINPOINTS),
        _llava_next,
        sizes=ANY,
        renames=CLIP_KEYS,
    ),
    Checkpoint(
        "llava-next-video",
        "LlavaNextVideoForConditionalGeneration",
        conformance.config(text("llama"), {**CLIP, "image_size": LARGE}, image_grid_pinpoints=PINPOINTS, **VIDEO_ID),
        _llava_next_video,
        renames=CLIP_KEYS,
    ),
    Checkpoint(
        "llava-onevision",
        "LlavaOnevisionForConditionalGeneration",
        conformance.config(text("qwen2"), SIGLIP, image_grid_pinpoints=PINPOINTS, **VIDEO_ID),
        _onevision,
        sizes=ANY,
        renames=CLIP_KEYS,
    ),
    Checkpoint(
        "internvl",
        "InternVLForConditionalGeneration",
        conformance.config(text("qwen2"), conformance.tower("internvl_vision", 112, 14), image_seq_length=16),
        _internvl,
        placeholder="<IMG_CONTEXT>",
        sizes=((112, 112), (112, 224)),
        title="InternVL 2, 2.5 and 3",
    ),
    Checkpoint(
        "internvl-qwen3",
        "InternVLForConditionalGeneration",
        conformance.config(text("qwen3"), conformance.tower("internvl_vision", 112, 14), image_seq_length=16),
        _internvl,
        placeholder="<IMG_CONTEXT>",
        sizes=((112, 112), (112, 224)),
        title="InternVL 3.5",
    ),
    Checkpoint(
        "qwen2-vl",
        "Qwen2VLForConditionalGeneration",
        conformance.config(
            mrope("qwen2_vl_text"),
            {**conformance.QWEN2_TOWER, "patch_size": 14, "hidden_size": 128},
            **conformance.MARKS,
        ),
        lambda: _qwen("Qwen2VL"),
        placeholder="<|vision_start|> <|image_pad|> <|vision_end|>",
        video_placeholder=QWEN_VIDEO,
        sizes=GRID,
    ),
    Checkpoint(
        "qwen2.5-vl",
        "Qwen2_5_VLForConditionalGeneration",
        conformance.config(
            mrope("qwen2_5_vl_text"), {**PATCHES, "window_size": 56, "fullatt_block_indexes": [1]}, **conformance.MARKS
        ),
        lambda: _qwen("Qwen2_5_VL"),
        placeholder="<|vision_start|> <|image_pad|> <|vision_end|>",
        video_placeholder=QWEN_VIDEO,
        wants_times=True,
        sizes=GRID,
    ),
    Checkpoint(
        "qwen3-vl",
        "Qwen3VLForConditionalGeneration",
        conformance.config(mrope("qwen3_vl_text", rope={"mrope_interleaved": True}), QWEN3_TOWER, **conformance.MARKS),
        lambda: _qwen("Qwen3VL", patch_size=16),
        placeholder="<|vision_start|> <|image_pad|> <|vision_end|>",
        sizes=((128, 128), (64, 160), (96, 128)),
    ),
    Checkpoint(
        "qwen3-vl-moe",
        "Qwen3VLMoeForConditionalGeneration",
        conformance.config(
            mrope(
                "qwen3_vl_moe_text", rope={"mrope_interleaved": True}, norm_topk_prob=True, **conformance.QWEN_EXPERTS
            ),
            QWEN3_TOWER,
            **conformance.MARKS,
        ),
        lambda: _qwen("Qwen3VL", patch_size=16),
        placeholder="<|vision_start|> <|image_pad|> <|vision_end|>",
        sizes=((128, 128), (64, 160), (96, 128)),
        transposed="mlp.experts",
    ),
    Checkpoint(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        conformance.config(
            text("mistral", sliding_window=None), conformance.tower("pixtral", 140, 14), spatial_merge_size=2
        ),
        _mistral3,
        placeholder="[IMG]",
        sizes=((112, 112), (56, 140), (84, 112)),
    ),
    Checkpoint(
        "glm4v",
        "Glm4vForConditionalGeneration",
        conformance.config(
            mrope("glm4v_text", attention_bias=True, rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}),
            {**PATCHES, "image_size": 112},
            **conformance.GLM_MARKS,
        ),
        _glm,
        placeholder=GLM_IMAGE,
        sizes=GRID,
    ),
    Checkpoint(
        "glm4v-moe",
        "Glm4vMoeForConditionalGeneration",
        conformance.config(
            mrope(
                "glm4v_moe_text",
                rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
                use_qk_norm=False,
                **conformance.GLM_EXPERTS,
            ),
            {**PATCHES, "image_size": 112},
            **conformance.GLM_MARKS,
        ),
        _glm,
        placeholder=GLM_IMAGE,
        sizes=GRID,
    ),
    Checkpoint(
        "paddleocr-vl",
        "PaddleOCRVLForConditionalGeneration",
        conformance.config(
            mrope("paddleocr_vl_text"),
            conformance.tower("paddleocr_vl_vision", 112, 14, spatial_merge_size=2),
            **conformance.MARKS,
        ),
        _paddle,
        placeholder="<|IMAGE_START|> <|IMAGE_PLACEHOLDER|> <|IMAGE_END|>",
        sizes=GRID,
    ),
    Checkpoint(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        conformance.config(text("llama"), IDEFICS_TOWER, scale_factor=2),
        lambda: _idefics("Idefics3"),
        sizes=((112, 112), (56, 112)),
    ),
    Checkpoint(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        conformance.config(text("llama"), {**IDEFICS_TOWER, "model_type": "smolvlm_vision"}, scale_factor=2),
        lambda: _idefics("SmolVLM"),
        sizes=((112, 112), (56, 112)),
    ),
)
CHECKPOINTS = {each.name: each for each in TABLE}

if __name__ == "__main__":
    for each in TABLE:
        if not sys.argv[2:] or each.name in sys.argv[2:]:
            (folder := Path(sys.argv[1]) / each.name).mkdir(parents=True, exist_ok=True)
            each.write(folder, prompts_of(each.name))
