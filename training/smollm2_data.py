"""What SmolLM2 is trained on: prompts in its chat format, questions in chunks, and words for patches.

Knows scenes, questions and a tokenizer; knows nothing about models or optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from thinsight.smollm2_model import BETWEEN, END
from training.lora import IGNORED, Questions
from training.questions import NUMBERS, Question, ask
from training.scenes import PATCHES, Scene, Thing

VISION_TOKENS = PATCHES**2
CHUNKS, LENGTH = 3, 128  # an image's questions fill so many chunks of so many tokens
DRAWN = 48  # questions drawn for an image; as many as fit are asked, none twice
BEFORE, AFTER = "<|im_start|>user\n", f"{END}\n<|im_start|>assistant\n"
ORDINALS = ("", "first", "second", "third", "fourth")
NOTHING = " ."  # what a patch without a thing is called


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Asked:
    """The questions of one image: what is computed on, and the task of each, in reading order."""

    questions: Questions
    tasks: tuple[str, ...]


def encode_question(question: Question, tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """Token ids of the prompt behind the image, and of the answer with its end."""
    prompt = tokenizer.encode(f"{BETWEEN}{question.text}{AFTER}")
    return prompt, tokenizer.encode(f"{question.answer}{END}")


def pack(questions: list[Question], tokenizer: Encoder, chunks: int = CHUNKS, length: int = LENGTH) -> Asked:
    """Each question into the first chunk that has room for it; those without room are left out."""
    filling: list[list[tuple[Question, list[int], list[int]]]] = [[] for _ in range(chunks)]
    room = [length] * chunks
    for question in dict.fromkeys(questions):
        prompt, answer = encode_question(question, tokenizer)
        needed = len(prompt) + len(answer) - 1  # the end is only predicted
        fitting = next((i for i in range(chunks) if room[i] >= needed), None)
        if fitting is not None:
            filling[fitting].append((question, prompt, answer))
            room[fitting] -= needed
    shape = (chunks, length)
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    targets, segments = np.full(shape, IGNORED), np.full(shape, -1)
    tasks: list[str] = []
    for chunk, packed in enumerate(filling):
        at = 0
        for question, prompt, answer in packed:
            ids = (prompt + answer)[:-1]
            here = slice(at, at + len(ids))
            tokens[chunk, here], positions[chunk, here] = ids, np.arange(len(ids))
            targets[chunk, at + len(prompt) - 1 : at + len(ids)] = answer
            segments[chunk, here] = len(tasks)
            tasks.append(question.task)
            at += len(ids)
    arrays = (torch.from_numpy(x) for x in (tokens, targets, positions, segments))
    return Asked(Questions(*arrays), tuple(tasks))


def draw_questions(rng: np.random.Generator, scene: Scene, weights: dict[str, float], tokenizer: Encoder) -> Asked:
    return pack(ask(rng, scene, DRAWN, weights), tokenizer)


def right_answers(asked: Asked, right: Tensor) -> list[tuple[str, bool]]:
    """(task, all of the answer's tokens are right) of every question; right: per answer token."""
    answered = asked.questions.targets.flatten() != IGNORED
    segments = asked.questions.segments.flatten()[answered]
    return [(task, bool(right[segments == i].all())) for i, task in enumerate(asked.tasks)]


def names_of(thing: Thing) -> list[str]:
    """What SmolLM2 would call a thing, each one token of its own; rows and columns by different words."""
    if thing.group == "shape":
        place = [f" {NUMBERS[thing.row + 1]}", f" {ORDINALS[thing.column + 1]}"]
        return [f" {thing.kind}", f" {thing.color}", *place]
    if thing.group == "bar":
        return [" bar", f" {thing.color}", f" {NUMBERS[thing.height]}"]
    return [thing.kind, f" {thing.group}", f" {ORDINALS[thing.slot]}"]


def named_patches(scene: Scene, tokenizer: Encoder, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """(256, width): the sum of the embeddings of what is in a patch; (256,) bool: patches with a thing."""

    def total(names: list[str]) -> Tensor:
        ids = [tokenizer.encode(name) for name in names]
        assert all(len(one) == 1 for one in ids), names
        return embeddings[[one[0] for one in ids]].sum(0)

    rows = torch.stack([*(total(names_of(thing)) for thing in scene.things), total([NOTHING])])
    owner = torch.from_numpy(scene.owner.reshape(-1))
    return rows[owner], owner >= 0
