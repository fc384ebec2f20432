"""One image, many questions: the training forward pass, over the weights of the stock model.

The questions of an image are packed behind it, each sees the image and itself only and restarts its
positions, so one pass over the vision tokens pays for all of them. Computes the same function as the stock
model (`tests/training/test_packed.py` holds it to that), and the losses. Knows nothing about optimisers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.assets import Assets
from training.model import EOS, PAD, Architecture
from training.questions import ASKED, DIRECTIONS, TASKS, Question, ask
from training.scenes import PATCH_LABELS, draw_scene, thing_labels
from training.towers import TOWERS, attend

QUESTIONS, LENGTH = 12, 13  # questions behind an image, tokens of each (padded)


@dataclass
class Batch:
    """B images, Q questions of T tokens each, N vision tokens that cover S patches each."""

    pixels: Tensor  # (B, 3, 224, 224) float32, normalised
    patch_labels: Tensor  # (B, 6, N, S) int64
    tokens: Tensor  # (B, Q, T) int64
    targets: Tensor  # (B, Q, T) int64: the next token where it is part of an answer, else -100
    prompt: Tensor  # (B, Q, T) bool: rows of the prompt
    last: Tensor  # (B, Q) int64: the prompt's last row
    about: Tensor  # (B, Q, N) bool: vision tokens that hold the answer
    points: Tensor  # (B, Q, T, N) bool: vision tokens of what a word names; none at most words
    named: Tensor  # (B, Q, T, 6) int64: classes of the one thing that a word names, else -100
    compared: Tensor  # (B, Q, T, 6) int64: classes of the thing that a word's is compared with, else -100
    asked: Tensor  # (B, Q) int64: what is asked for
    direction: Tensor  # (B, Q, T) int64: the answer, at the word by which two things can be compared, else -100
    tasks: Tensor  # (B, Q) int64: the question's task, as its place in TASKS


def encode_question(question: Question, vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt after the image, and of the answer with its end."""
    prompt = [vocabulary[word] for word in f"{question.text} assistant :".split()]
    return prompt, [vocabulary[word] for word in question.answer.split()] + [EOS]


def normalise(pixels: np.ndarray, architecture: Architecture) -> Tensor:
    """(B, 224, 224, 3) uint8 -> (B, 3, 224, 224) float32."""
    x = torch.from_numpy(pixels).float().div_(255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (architecture.mean, architecture.std))
    return ((x - mean) / std).contiguous()


def make_batch(
    rng: np.random.Generator,
    assets: Assets,
    size: int,
    weights: dict[str, float],
    architecture: Architecture,
    with_questions: bool = True,
) -> Batch:
    scenes = [draw_scene(rng, assets) for _ in range(size)]
    vision, names = architecture.vision_tokens, list(TASKS)
    tokens = np.full((size, QUESTIONS, LENGTH), PAD, dtype=np.int64)
    targets = np.full_like(tokens, -100)
    prompt = np.zeros(tokens.shape, dtype=bool)
    last = np.zeros((size, QUESTIONS), dtype=np.int64)
    about = np.zeros((size, QUESTIONS, vision), dtype=bool)
    points = np.zeros((size, QUESTIONS, LENGTH, vision), dtype=bool)
    named = np.full((size, QUESTIONS, LENGTH, len(PATCH_LABELS)), -100, dtype=np.int64)
    compared = named.copy()
    kind, tasks = np.zeros_like(last), np.zeros_like(last)
    direction = np.full_like(tokens, -100)
    for b, scene in enumerate(scenes if with_questions else []):
        for q, question in enumerate(ask(rng, scene, QUESTIONS, weights)):
            asked, answer = encode_question(question, architecture.vocabulary)
            ids = (asked + answer)[:-1]  # the end is only predicted
            tokens[b, q, : len(ids)] = ids
            targets[b, q, len(asked) - 1 : len(ids)] = answer
            prompt[b, q, : len(asked)] = True
            last[b, q] = len(asked) - 1
            about[b, q] = architecture.per_token(scene.patches(list(question.about))).any(-1)
            for word, things in question.points:
                points[b, q, word] = architecture.per_token(scene.patches(list(things))).any(-1)
                if len(things) == 1:
                    named[b, q, word] = thing_labels(scene.things[things[0]])
            kind[b, q] = ASKED.index(question.asked or question.task)
            tasks[b, q] = names.index(question.task)
            if question.compared is not None:
                word, thing = question.compared
                compared[b, q, word] = thing_labels(scene.things[thing])
                direction[b, q, word] = DIRECTIONS.index(question.answer)
    patches = architecture.per_token(np.stack([s.labels() for s in scenes]))
    arrays = (
        patches, tokens, targets, prompt, last, about, points, named, compared, kind, direction, tasks,
    )  # fmt: skip
    pixels = normalise(np.stack([s.pixels for s in scenes]), architecture)
    return Batch(pixels, *map(torch.from_numpy, arrays))


class AuxiliaryHead(nn.Module):
    """Linear probes that only training needs.

    They name what each patch shows, from the projected feature of the vision token that covers it; what the
    image shows, from CLS; and from hidden states halfway up the decoder: what a word of the question refers
    to, what it is compared with, and what is asked for; further up, what the comparison says.
    """

    def __init__(self, width: int, vision_width: int, patches: int) -> None:
        super().__init__()
        self.patches = patches  # that a vision token covers
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, patches * sum(PATCH_LABELS.values()))
        self.image = nn.Linear(vision_width, PATCH_LABELS["kind"] + PATCH_LABELS["color"])
        self.word = nn.Linear(width, sum(PATCH_LABELS.values()))
        self.other = nn.Linear(width, sum(PATCH_LABELS.values()))
        self.asked = nn.Linear(width, len(ASKED))
        self.direction = nn.Linear(width, len(DIRECTIONS))

    def reading_loss(self, states: Tensor, named: Tensor) -> Tensor:
        """From the words that name something, what they name. states: (B, Q, T, width), normed."""
        return _thing_loss(self.word, states, named)

    def context_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """From a word, what its thing is compared with; from the prompt's last row, what is asked for."""
        rows = batch.last[..., None, None].expand(-1, -1, 1, states.shape[-1])
        asked = self.asked(states.gather(2, rows).squeeze(2)).float()
        kind = F.cross_entropy(asked.flatten(0, 1), batch.asked.flatten())
        if bool((batch.compared == -100).all()):
            return kind
        return kind + _thing_loss(self.other, states, batch.compared)

    def comparing_loss(self, states: Tensor, direction: Tensor) -> Tensor:
        """From the word by which two things can be compared, the answer. states: (B, Q, T, width), normed."""
        logits = self.direction(states).float().flatten(0, 2)  # (B*Q*T, 4)
        total = F.cross_entropy(logits, direction.flatten(), ignore_index=-100, reduction="sum")
        return total / (direction != -100).sum().clamp(min=1)

    def patch_loss(self, features: Tensor, cls: Tensor, labels: Tensor) -> Tensor:
        """features: (B, N, width); cls: (B, vision width); labels: (B, 6, N, S)."""
        logits = self.patch(self.norm(features.float())).unflatten(-1, (self.patches, -1))
        losses = []
        for i, part in enumerate(logits.split(list(PATCH_LABELS.values()), -1)):
            label = labels[:, i].reshape(-1)
            weight = torch.where(label == 0, 0.25, 1.0)  # most patches show nothing
            each = F.cross_entropy(part.reshape(len(label), -1), label, reduction="none")
            losses.append((each * weight).sum() / weight.sum())
        kinds = F.one_hot(labels[:, 0].flatten(1), PATCH_LABELS["kind"]).amax(1)
        colors = F.one_hot(labels[:, 1].flatten(1), PATCH_LABELS["color"]).amax(1)
        present = torch.cat([kinds, colors], -1).float()
        seen = F.binary_cross_entropy_with_logits(self.image(cls.float()), present)
        return torch.stack(losses).mean() * 3 + seen


def _thing_loss(probe: nn.Linear, states: Tensor, things: Tensor) -> Tensor:
    """Mean cross-entropy of the six classes of a thing; things: (B, Q, T, 6) int64, -100 at most words."""
    refers = things[..., 0] != -100
    logits = probe(states[refers]).float().split(list(PATCH_LABELS.values()), -1)
    labels = things[refers].unbind(-1)
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).mean()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attend_text(q: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Question rows over the prefix and their own question; also the weights over the prefix.

    q, k, v: (B, heads, start + Q*T, head_dim) -> (B, heads, Q*T, head_dim), (B, heads, Q*T, start)
    """
    batch, heads, _, dim = q.shape
    q, scale = q[:, :, start:], dim**-0.5
    k_own, v_own, q_own = (
        x.reshape(batch, heads, QUESTIONS, LENGTH, dim) for x in (k[:, :, start:], v[:, :, start:], q)
    )
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    own = (q_own @ k_own.transpose(-1, -2)).float().masked_fill(future, -1e9).flatten(2, 3)
    logits = torch.cat(((q @ k[:, :, :start].transpose(-1, -2)).float(), own), -1) * scale
    weights = logits.softmax(-1)  # (B, heads, Q*T, start + T)
    prefix = weights[..., :start]
    from_own = weights[..., start:].to(v.dtype).unflatten(2, (QUESTIONS, LENGTH)) @ v_own
    return prefix.to(v.dtype) @ v[:, :, :start] + from_own.flatten(2, 3), prefix


def _text_block(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, rows: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    """One decoder layer, Llama's or Qwen2's; ``mask`` is that of the rows before the questions.

    With ``rows``, the first vision token and the one after the last: also the head-mean attention of the
    question rows over them, (B, Q*T, N).
    """
    batch, length, width = x.shape
    start, attention = len(mask), layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    image = attend(q[:, :, :start], k[:, :, :start], v[:, :, :start], mask)
    text, weights = _attend_text(q, k, v, start)
    h = torch.cat((image, text), 2).transpose(1, 2).reshape(batch, length, width)
    x = x + attention.o_proj(h)
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, weights[..., rows[0] : rows[1]].mean(1) if rows else None


class Packed:
    """The packed forward pass of one model."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, head: AuxiliaryHead, compiled: bool) -> None:
        self.model, self.architecture, self.head = model, architecture, head
        wrap = functools.partial(torch.compile, dynamic=False) if compiled else (lambda f: f)
        self.tower, block = TOWERS[architecture.name]
        self.vision_block, self.text_block = wrap(block), wrap(_text_block)
        first, self.start = len(architecture.prefix), architecture.start
        self.vision_rows = (first, first + architecture.vision_tokens)
        square = torch.zeros(self.start, self.start)
        self.mask = square.masked_fill(torch.ones_like(square).triu(1).bool(), -1e9)
        own = (self.start + torch.arange(LENGTH)).repeat(QUESTIONS)
        positions = torch.cat((torch.arange(self.start), own))
        cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), positions[None])
        self.cos, self.sin = cos[0], sin[0]  # (start + Q*T, head_dim)

    def vision(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, N, width) and the CLS row (B, vision width)."""
        return self.tower(self.model, pixels, self.vision_block)

    def patch_loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Of the vision tower alone. labels: (B, 6, N, S) int64."""
        return self.head.patch_loss(*self.vision(pixels), labels)

    def losses(self, batch: Batch, grounded: list[int]) -> dict[str, Tensor]:
        """Every loss, in nats, the attention losses over the layers in ``grounded``; and how many answers
        are ``exact``, 0 to 1.
        """
        features, cls = self.vision(batch.pixels)
        patch = self.head.patch_loss(features, cls, batch.patch_labels)
        hidden, inner, seen = self.decode(features, batch.tokens, grounded)
        halfway, above = (
            F.layer_norm(x[:, self.start :].float(), x.shape[-1:]).view(*batch.tokens.shape, -1) for x in inner
        )
        logits = self.model.lm_head(hidden[:, self.start :]).float()
        answer = F.cross_entropy(logits.flatten(0, 1), batch.targets.reshape(-1), ignore_index=-100)
        grounding = torch.stack([grounding_loss(rows, batch) for rows in seen]).mean()
        naming = torch.stack([naming_loss(rows, batch) for rows in seen]).mean()
        return {
            "answer": answer,
            "patch": patch,
            "grounding": grounding,
            "naming": naming,
            "reading": self.head.reading_loss(halfway, batch.named),
            "context": self.head.context_loss(halfway, batch),
            "comparing": self.head.comparing_loss(above, batch.direction),
            "exact": _exact(logits, batch).float().mean(),
        }

    @torch.no_grad()
    def exact(self, batch: Batch) -> Tensor:
        """(B, Q) bool: answers that greedy decoding would get right, their end included."""
        hidden, _, _ = self.decode(self.vision(batch.pixels)[0], batch.tokens, [])
        return _exact(self.model.lm_head(hidden[:, self.start :]), batch)

    def decode(
        self, features: Tensor, tokens: Tensor, grounded: list[int]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states at the end, those halfway and three quarters up, attention rows of ``grounded``."""
        language = self.model.model.language_model
        prefix, suffix = (
            language.embed_tokens(torch.tensor(ids, dtype=torch.long)).expand(len(features), -1, -1)
            for ids in (self.architecture.prefix, self.architecture.suffix)
        )
        text = language.embed_tokens(tokens.flatten(1))
        x = torch.cat((prefix, features.to(prefix.dtype), suffix, text), 1)
        depth = len(language.layers)
        seen, inner = [], []
        for i, layer in enumerate(language.layers):
            wanted = self.vision_rows if i in grounded else None
            x, rows = self.text_block(layer, x, self.cos, self.sin, self.mask, wanted)
            if rows is not None:
                seen.append(rows)
            if i + 1 in (depth // 2, depth * 3 // 4):
                inner.append(x)
        return language.norm(x), inner, seen


def _exact(logits: Tensor, batch: Batch) -> Tensor:
    """(B, Q) bool: every token of the answer has the highest logit. logits: (B, Q*T, vocabulary)."""
    chosen = logits.argmax(-1).view_as(batch.targets)
    return ((chosen == batch.targets) | (batch.targets == -100)).all(-1)


def grounding_loss(rows: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy from the question's attention over the vision tokens to the tokens it is about.

    ``rows``: (B, Q*T, N). Both readings of "the question's attention" count: the mean of its rows, and
    its last row. Questions about nothing (a count of zero) are left out.
    """
    rows = rows.view(*batch.tokens.shape, -1)
    prompt = batch.prompt.float()
    mean = (rows * prompt[..., None]).sum(2) / prompt.sum(2, keepdim=True)
    last = rows.gather(2, batch.last[..., None, None].expand(-1, -1, 1, rows.shape[-1])).squeeze(2)
    return (_pointing_loss(mean, batch.about) + _pointing_loss(last, batch.about)) / 2


def naming_loss(rows: Tensor, batch: Batch) -> Tensor:
    """The same for single words: from the attention of a word that names something to those of it."""
    return _pointing_loss(rows.view(*batch.tokens.shape, -1), batch.points)


def _pointing_loss(weights: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over the target tokens, mean over rows that have any.

    weights: (..., N) attention, any total; target: (..., N) bool.
    """
    size = target.sum(-1)
    weights, target, size = weights[size > 0], target[size > 0], size[size > 0]
    log = torch.log(weights + 1e-9) - torch.log(weights.sum(-1, keepdim=True) + 1e-9)
    return (-(log * target).sum(-1) / size).mean()
