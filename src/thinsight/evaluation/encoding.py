"""Prompts: an example becomes the token ids that a model reads, and several become one left-padded batch.

Knows the processor only through its public call. Knows nothing about reductions, answers or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ThinsightError
from ..runtime import vision_token_mask
from .examples import Example, open_image

__all__ = ["Prompt", "PromptBatch", "encode_prompt", "image_token", "pad_batch", "prompt_text"]

_PLAIN_PROMPT = "USER: {images}{question} ASSISTANT:"  # LLaVA-1.5's own format


@dataclass(frozen=True)
class Prompt:
    """One example's prompt: token ids, int64, shape (seq,), on the CPU; and how many are vision tokens."""

    input_ids: torch.Tensor
    n_vision: int

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def n_text(self) -> int:
        return len(self) - self.n_vision


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts: ``input_ids`` and ``attention_mask`` int64, shape (batch, seq)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def width(self) -> int:
        return int(self.input_ids.shape[1])


def image_token(processor: Any) -> str:
    """The text that stands for an image in the processor's prompts, "<image>" for LLaVA."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise ThinsightError(
        f"the processor {type(processor).__name__} has no image token: pass the model's own processor"
    )


def prompt_text(processor: Any, example: Example) -> str:
    """The prompt as text, with one image token per image, ending where the model's answer begins.

    The processor's chat template where it has one, else ``USER: <image>\\n{question} ASSISTANT:``. A question
    that holds image tokens itself keeps them where they are; otherwise the images come first.

    Raises:
        ThinsightError: the question holds a different number of image tokens than the example has images.
    """
    token = image_token(processor)
    placed = example.question.count(token)
    if placed not in (0, len(example.images)):
        raise ThinsightError(
            f"example {example.id!r} has {len(example.images)} images but its question has {placed} "
            f"{token!r} tokens: give one per image, or none to put the images first"
        )
    if getattr(processor, "chat_template", None):
        images = [] if placed else [{"type": "image"} for _ in example.images]
        content = [*images, {"type": "text", "text": example.question}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    images_first = "" if placed else f"{token}\n" * len(example.images)
    return _PLAIN_PROMPT.format(images=images_first, question=example.question)


def encode_prompt(model: Any, processor: Any, example: Example) -> Prompt:
    """The example's prompt as token ids, each image token expanded to the image's vision tokens.

    Raises:
        ThinsightError: the prompt has no image token where an image belongs, or none that the model knows.
    """
    text, images = prompt_text(processor, example), [open_image(image) for image in example.images]
    try:
        inputs = processor(text=[text], images=images, return_tensors="pt")
    except ValueError as error:  # the processor's own check of images against image tokens
        raise ThinsightError(
            f"the prompt of example {example.id!r} does not fit its {len(images)} images ({error}): "
            f"the chat template must put {image_token(processor)!r} where an image belongs"
        ) from error
    input_ids = inputs["input_ids"]  # (1, seq)
    n_vision = int(vision_token_mask(model, input_ids).sum())
    if n_vision == 0:
        raise ThinsightError(
            f"the prompt of example {example.id!r} has no image token that {type(model).__name__} knows: "
            "pass the processor that belongs to the model"
        )
    return Prompt(input_ids=input_ids[0], n_vision=n_vision)


def pad_batch(prompts: Sequence[Prompt], pad_token_id: int) -> PromptBatch:
    """Prompts side by side, padded on the left so that all end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt.input_ids
        attention_mask[row, width - len(prompt) :] = 1
    return PromptBatch(input_ids, attention_mask)
