"""Small random models and inputs for the tests, built in memory in milliseconds.

Knows nothing about what is tested with them: no schedule, ranker or evaluator appears here.
Use from any test file as ``from tiny import tiny_llava, tiny_processor, tiny_inputs, tiny_images``.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE = 28  # pixels
PATCH_SIZE = 7  # pixels
GRID = IMAGE_SIZE // PATCH_SIZE
VISION_TOKENS = GRID * GRID  # N = 16 per image
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
PAD, UNK, BOS, EOS, IMAGE = range(5)
TEXT = (
    "USER: ASSISTANT: what which color shape is are the a in of on left right above below how many number "
    "red green blue yellow black white circle square triangle star yes no zero one two three four five six "
    "seven eight nine 0 1 2 3 4 5 6 7 8 9 written chart bar highest lowest top bottom answer object ? . ,"
)
WORDS = TEXT.split()
VOCABULARY = len(SPECIALS) + len(WORDS)


def tiny_llava(
    attn: str = "sdpa", layers: int = 4, seed: int = 0, *, kv_heads: int = 2
) -> LlavaForConditionalGeneration:
    """A random LLaVA: CLIP tower with a CLS token (28 px, 16 vision tokens), Llama decoder, float32, eval
    mode.

    Weights are drawn wide enough that attention is far from flat, so that rankings do not hang on rounding.
    """
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    model = LlavaForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
            elif parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
            elif "class_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    return model


def tiny_processor() -> LlavaProcessor:
    """A LlavaProcessor with a word-level tokenizer (left padding) and CLIP preprocessing at 28 px, no
    files."""
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def tiny_images(count: int, seed: int = 0, size: int = IMAGE_SIZE) -> list[Image.Image]:
    """`count` RGB images of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def tiny_inputs(
    rows: list[list[int]], *, seed: int = 0, padding: str = "left", vision_tokens: int = VISION_TOKENS
) -> dict[str, torch.Tensor]:
    """A batch of token ids, attention mask and pixels.

    Each row lists the lengths of its text pieces, with one image between neighbours: ``[3, 5]`` is 3 text
    tokens, an image, 5 text tokens; ``[3, 2, 4]`` has two images; ``[6]`` is text only. Returns input_ids and
    attention_mask (batch, seq) int64 and, if there is an image, pixel_values (images, 3, 28, 28).
    """
    draw = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    images = 0
    for pieces in rows:
        sequence = [BOS]
        for index, length in enumerate(pieces):
            if index > 0:
                sequence += [IMAGE] * vision_tokens
                images += 1
            sequence += torch.randint(len(SPECIALS), VOCABULARY, (length,), generator=draw).tolist()
        sequences.append(sequence)
    width = max(map(len, sequences))
    input_ids = torch.full((len(rows), width), PAD)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if padding == "left" else slice(0, len(sequence))
        input_ids[row, where] = torch.tensor(sequence)
        attention_mask[row, where] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        batch["pixel_values"] = torch.randn((images, 3, IMAGE_SIZE, IMAGE_SIZE), generator=draw)
    return batch
