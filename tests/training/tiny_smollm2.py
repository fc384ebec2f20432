"""A random Llama of 2 layers and a byte-level tokenizer in SmolLM2's manner, made in memory.

Stands in for the pretrained model, which tests do without.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.questions import WORDS
from training.scenes import Scene
from training.smollm2 import Recipe, Trainer
from training.smollm2_data import ORDINALS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>")
VISION_WIDTH = 192


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the scenes is a token of its own, with and without a space before it."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [word for word in (*WORDS, *ORDINALS, "bar", "printed", "handwritten") if re.match("[a-z]", word)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[*SPECIAL], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([form for word in words for form in (word, f" {word}", " .")] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip


def tiny_smollm2(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain_tower(scenes: list[Scene]) -> Tensor:
    """(images, 256, 192): the first 192 values of every patch, as they stand in the picture."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).float()
    patches = pixels.reshape(-1, 16, 14, 16, 14 * 3).transpose(2, 3).reshape(len(scenes), 256, -1)
    return patches[..., :VISION_WIDTH]


RECIPE = Recipe(rank=4, naming_steps=3, naming_images=2, images=3, warmup=2)


def tiny_trainer(out: Path, recipe: Recipe = RECIPE, workers: int = 1, replan: bool = False) -> Trainer:
    """A run of a few seconds."""
    tokenizer = tiny_tokenizer()
    language = tiny_smollm2(tokenizer).model
    out.mkdir(exist_ok=True)
    return Trainer(recipe, out, language, tokenizer, plain_tower, workers, replan=replan)
