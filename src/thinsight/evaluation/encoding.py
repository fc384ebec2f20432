"""Prompts: an example becomes the token ids that a model reads, and several become one left-padded batch.

Knows the processor only through its public call. Knows nothing about reductions, answers or scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

import torch

from ..errors import BadInput
from ..runtime import vision_token_mask
from ..runtime.families import base_model
from .examples import Example, open_image

__all__ = [
    "Prompt",
    "PromptBatch",
    "encode_prompt",
    "image_token",
    "pad_batch",
    "process",
    "prompt_text",
    "typical_batch",
]

_PLAIN_PROMPT = "USER: {images}{question} ASSISTANT:"  # LLaVA-1.5's own format
_WITHOUT_ROLES = frozenset({"PaliGemmaProcessor"})  # a task and nothing else follows the image
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Prompt:
    """One example's prompt, on the CPU: all that the model takes except the pixels."""

    input_ids: torch.Tensor  # (seq,) int64
    n_vision: int  # how many of them are vision tokens
    per_token: Mapping[str, torch.Tensor] = field(default_factory=dict)  # token types: (seq,)
    per_image: Mapping[str, torch.Tensor] = field(default_factory=dict)  # sizes, grids: (images, ...)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def n_text(self) -> int:
        return len(self) - self.n_vision

    @property
    def size(self) -> tuple[int, int]:
        """By which prompts of like length stand together: all tokens, and vision tokens."""
        return len(self), self.n_vision


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts."""

    input_ids: torch.Tensor  # (batch, seq) int64
    attention_mask: torch.Tensor  # (batch, seq) int64
    per_token: Mapping[str, torch.Tensor] = field(default_factory=dict)  # (batch, seq), 0 at padding
    per_image: Mapping[str, torch.Tensor] = field(default_factory=dict)  # (images of all prompts, ...)

    @property
    def width(self) -> int:
        return int(self.input_ids.shape[1])


def image_token(processor: Any) -> str:
    """The text that stands for an image in the processor's prompts, "<image>" for LLaVA."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise BadInput(
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
        raise BadInput(
            f"example {example.id!r} has {len(example.images)} images but its question has {placed} "
            f"{token!r} tokens: give one per image, or none to put the images first"
        )
    if getattr(processor, "chat_template", None):
        images = [] if placed else [{"type": "image"} for _ in example.images]
        content = [*images, {"type": "text", "text": example.question}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if type(processor).__name__ in _WITHOUT_ROLES:
        return ("" if placed else token * len(example.images)) + example.question
    images_first = "" if placed else f"{token}\n" * len(example.images)
    return _PLAIN_PROMPT.format(images=images_first, question=example.question)


def process(processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """What the processor makes of the examples' prompts and images: one left-padded batch.

    Raises:
        ThinsightError: a question with too many or too few image tokens.
        ValueError: the processor's own words, where the prompt's image tokens do not fit the images.
    """
    texts = [prompt_text(processor, example) for example in examples]
    images = [[open_image(image) for image in example.images] for example in examples]
    options: dict[str, Any] = {"padding": True} if len(examples) > 1 else {}
    start = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if start and all(text.startswith(start) for text in texts):
        options["add_special_tokens"] = False  # the chat template has written them already
    return dict(processor(text=texts, images=images, return_tensors="pt", **options))


def encode_prompt(model: Any, processor: Any, example: Example) -> Prompt:
    """The example's prompt as token ids, each image token expanded to the image's vision tokens.

    Raises:
        ThinsightError: the prompt has no image token where an image belongs, or none that the model knows.
    """
    try:
        inputs = process(processor, [example])
    except ValueError as error:  # the processor's own check of images against image tokens
        raise BadInput(
            f"the prompt of example {example.id!r} does not fit its {len(example.images)} images ({error}): "
            f"the chat template must put {image_token(processor)!r} where an image belongs"
        ) from error
    input_ids = inputs["input_ids"]  # (1, seq)
    n_vision = int(vision_token_mask(model, input_ids).sum())
    if n_vision == 0:
        raise BadInput(
            f"the prompt of example {example.id!r} has no image token that {type(model).__name__} knows: "
            "pass the processor that belongs to the model"
        )
    taken = {**inspect.signature(base_model(model).forward).parameters}
    rest = {
        name: value for name, value in inputs.items() if name in taken and isinstance(value, torch.Tensor)
    }
    return Prompt(
        input_ids=input_ids[0],
        n_vision=n_vision,
        per_token={name: rest[name][0] for name in _TOKEN_TYPES if name in rest},
        per_image={
            name: value
            for name, value in rest.items()
            if name not in (*_TOKEN_TYPES, "input_ids", "attention_mask") and not name.startswith("pixel_")
        },
    )


def pad_batch(prompts: Sequence[Prompt], pad_token_id: int) -> PromptBatch:
    """Prompts side by side, padded on the left so that all end in the last column."""
    return PromptBatch(
        _pad([prompt.input_ids for prompt in prompts], pad_token_id),
        _pad([torch.ones_like(prompt.input_ids) for prompt in prompts], 0),
        {name: _pad([prompt.per_token[name] for prompt in prompts], 0) for name in prompts[0].per_token},
        {name: torch.cat([prompt.per_image[name] for prompt in prompts]) for name in prompts[0].per_image},
    )


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """(seq,) each -> (batch, longest seq)."""
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=value) for row in rows])


def typical_batch(processor: Any, examples: Sequence[Example], batch: int) -> dict[str, Any]:
    """One left-padded batch of the examples whose prompts are closest to the median length.

    When there are fewer examples than ``batch`` they are repeated. Tensors as the processor gives them, on
    the CPU.
    """
    texts = [prompt_text(processor, example) for example in examples]
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    middle = median_low(lengths)
    order = sorted(range(len(examples)), key=lambda i: (abs(lengths[i] - middle), i))
    chosen = [order[i % len(order)] for i in range(batch)]
    return process(processor, [examples[i] for i in chosen])
