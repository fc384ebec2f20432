"""The demo models and their processors: stock transformers classes, sized for two CPU cores.

Two architectures behind one interface, `Architecture`: what training needs to know of each is its prompt, its
vocabulary and how many patches one vision token covers. Knows nothing about training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.questions import WORDS
from training.scenes import PATCH, PATCHES, SIZE

WIDTH, HEADS, VISION_LAYERS, VISION_MLP, TEXT_MLP = 192, 3, 4, 768, 512
COMMON = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS = 0, 1, 2

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : "
    "{% for part in message['content'] if part['type'] == 'image' %}IMAGE {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% else %}assistant : "
    "{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


class Architecture(ABC):
    """One model class: its prompt, its sizes, its normalisation, and how to build it.

    ``side``: a vision token covers side x side patches. ``before`` and ``after``: the special tokens that the
    processor puts around the vision tokens. ``layers``: decoder layers unless a recipe says otherwise.
    """

    name: str
    layers: int
    side: int
    image_token: str
    special: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(COMMON + self.special + WORDS)}

    @property
    def chat_template(self) -> str:
        return _CHAT_TEMPLATE.replace("IMAGE", " ".join((*self.before, self.image_token, *self.after)))

    @property
    def grid(self) -> int:
        """Vision tokens a side."""
        return PATCHES // self.side

    @property
    def vision_tokens(self) -> int:
        return self.grid**2

    @property
    def prefix(self) -> list[int]:
        """Token ids of a prompt before the vision tokens."""
        return [BOS, *(self.vocabulary[word] for word in ("user", ":", *self.before))]

    @property
    def suffix(self) -> list[int]:
        """Token ids between the vision tokens and the question."""
        return [self.vocabulary[word] for word in self.after]

    @property
    def start(self) -> int:
        """The position at which a question starts."""
        return len(self.prefix) + self.vision_tokens + len(self.suffix)

    def per_token(self, patches: np.ndarray) -> np.ndarray:
        """(..., 256) of patches -> (..., vision tokens, patches of a token), in the decoder's order."""
        grid, side, lead = self.grid, self.side, patches.shape[:-1]
        split = np.moveaxis(patches.reshape(*lead, grid, side, grid, side), -3, -2)
        return split.reshape(*lead, grid**2, side**2)

    @abstractmethod
    def build_config(self, layers: int) -> PreTrainedConfig: ...

    @abstractmethod
    def _build(self, config: PreTrainedConfig) -> PreTrainedModel: ...

    def build_model(self, seed: int, layers: int | None = None) -> PreTrainedModel:
        """Random weights in float32."""
        torch.manual_seed(seed)
        model = self._build(self.build_config(layers or self.layers))
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = PAD
        return model

    def _text(self, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": WIDTH, "intermediate_size": TEXT_MLP, "num_hidden_layers": layers,
            "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": len(self.vocabulary),
            "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
        }  # fmt: skip

    def _vision(self) -> dict[str, Any]:
        return {
            "hidden_size": WIDTH, "intermediate_size": VISION_MLP, "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": HEADS, "image_size": SIZE, "patch_size": PATCH,
        }  # fmt: skip

    def build_processor(self) -> LlavaProcessor:
        """A prompt's image token becomes as many as the model has vision tokens.

        InternVL has it too: transformers cannot even load an `InternVLProcessor` where torchvision is
        missing, since its video half needs it, and for images of one tile the two do the same.
        """
        images = CLIPImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=self.mean,
            image_std=self.std,
        )
        return LlavaProcessor(
            image_processor=images, tokenizer=self._tokenizer(), patch_size=PATCH * self.side,
            vision_feature_select_strategy="default", chat_template=self.chat_template,
            image_token=self.image_token, num_additional_image_tokens=1,
        )  # fmt: skip

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel(self.vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
            unk_token="<unk>", additional_special_tokens=list(self.special), padding_side="left",
        )  # fmt: skip


class Llava(Architecture):
    """CLIP tower, two-layer projector, Llama decoder: a vision token for every patch."""

    name, layers, side = "llava", 12, 1
    image_token, special = "<image>", ("<image>",)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def build_config(self, layers: int) -> LlavaConfig:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(projection_dim=WIDTH, **self._vision()),
            text_config=LlamaConfig(**self._text(layers)),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_token_index=self.vocabulary[self.image_token],
            image_seq_length=self.vision_tokens,
        )

    def _build(self, config: PreTrainedConfig) -> LlavaForConditionalGeneration:
        return LlavaForConditionalGeneration(config)


class InternVL(Architecture):
    """InternViT tower, pixel shuffle, Qwen2 decoder: a vision token for every 2 x 2 patches."""

    name, layers, side = "internvl", 14, 2
    image_token = "<IMG_CONTEXT>"
    special = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    before, after = ("<img>",), ("</img>",)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def build_config(self, layers: int) -> InternVLConfig:
        # Layers start at full strength: 0.1, made for towers of 24 layers, holds one of 4 back.
        # The activation is the LLaVA tower's, so that a model can start from that.
        vision = InternVLVisionConfig(
            attention_bias=True, layer_scale_init_value=1.0, hidden_act="quick_gelu", **self._vision()
        )
        return InternVLConfig(
            vision_config=vision,
            text_config=Qwen2Config(**self._text(layers)),
            image_token_id=self.vocabulary[self.image_token],
            image_seq_length=self.vision_tokens,
            downsample_ratio=1 / self.side,
            tie_word_embeddings=False,
        )

    def _build(self, config: PreTrainedConfig) -> InternVLForConditionalGeneration:
        model = InternVLForConditionalGeneration(config)
        # Stock initialisation leaves positions at zero, from which patches can hardly be told apart.
        nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.02)
        return model


ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (Llava(), InternVL())}
