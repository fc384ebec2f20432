"""The demo model and its processor: stock transformers classes, sized for two CPU cores.

Knows sizes, vocabulary and chat template; knows nothing about training.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.questions import WORDS
from training.scenes import PATCH, SIZE

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
PAD, BOS, EOS, IMAGE = (VOCABULARY[t] for t in ("<pad>", "<bos>", "<eos>", "<image>"))
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : "
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% else %}assistant : "
    "{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_config(layers: int = 12) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3,
            image_size=SIZE, patch_size=PATCH, projection_dim=192,
        ),
        text_config=LlamaConfig(
            hidden_size=192, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=3,
            num_key_value_heads=3, vocab_size=len(VOCABULARY), max_position_embeddings=2048,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        ),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_token_index=IMAGE,
        image_seq_length=(SIZE // PATCH) ** 2,
    )  # fmt: skip


def build_model(seed: int, layers: int = 12) -> LlavaForConditionalGeneration:
    """Random weights in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(layers))
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def build_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
