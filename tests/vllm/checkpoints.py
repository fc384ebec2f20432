"""Small random checkpoints of the stock classes, each a folder with weights, config, tokenizer and processor.

Head size 32, the least that vLLM's attention on a CPU takes. Written by the main environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from conformance import families as conformance
from conformance.family import draw_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

LAYERS = 6
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>", "<start>", "<end>", "<break>", "<tile>", "<a>", "<b>"]
PAD, UNK, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, TILE = range(10)
FIRST_WORD, VOCABULARY = len(SPECIALS), 128


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
    """Words w12, w13, ... and special tokens, some of which a family calls by other names."""
    called = [(names or {}).get(name, name) for name in SPECIALS]
    vocabulary = {word: i for i, word in enumerate([*called, *(f"w{i}" for i in range(FIRST_WORD, VOCABULARY))])}
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
    sizes: tuple[tuple[int, int], ...] = ((56, 56),)  # of images, in turn
    renames: tuple[tuple[str, str], ...] = ()  # key prefixes as vLLM knows them
    extra: Mapping[str, Any] = field(default_factory=dict)  # of config.json, for vLLM's older transformers

    def write(self, folder: Path) -> Any:
        """Make it, and give the model back."""
        made = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model = made._from_config(made.config_class(**json.loads(json.dumps(dict(self.config)))), attn_implementation="eager")
        draw_weights(model, 0)
        model.save_pretrained(folder)
        processor = self.processor()
        processor.save_pretrained(folder)
        weights = folder / "model.safetensors"
        kept = load_file(weights)
        for old, new in self.renames:
            kept = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in kept.items()}
        save_file(kept, weights, metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **self.extra}))
        return model.eval(), processor


def image(number: int, size: tuple[int, int]) -> Image.Image:
    """Random pixels, in blocks so that resizing leaves them apart."""
    draw = torch.Generator().manual_seed(number)
    blocks = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
    return Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST)


# -- the table -----------------------------------------------------------------------------------------------

CLIP = conformance.tower("clip_vision_model", 56, 14, projection_dim=32)


def _clip_processor(**more: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


CLIP_KEYS = (("vision_tower.", "vision_tower.vision_model."),)

TABLE = (
    Checkpoint(
        "llava",
        "LlavaForConditionalGeneration",
        conformance.config(text("llama"), CLIP, image_seq_length=16),
        _clip_processor,
        renames=CLIP_KEYS,
    ),
)
CHECKPOINTS = {each.name: each for each in TABLE}
