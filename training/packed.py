"""One image, many questions: the training forward pass, over the weights of the stock model.

The questions of an image are packed behind it, each sees the image and itself only and restarts its
positions, so one pass over the vision tokens pays for all of them. Computes the same function as the stock
model (`tests/test_training.py` holds it to that), and the losses. Knows nothing about optimisers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from training.assets import Assets
from training.model import BOS, EOS, IMAGE, MEAN, PAD, STD, VOCABULARY
from training.questions import ASKED, DIRECTIONS, Question, ask
from training.scenes import PATCH_LABELS, draw_scene, thing_labels

QUESTIONS, LENGTH = 12, 15  # questions behind an image, tokens of each (padded)
PREFIX = [BOS, VOCABULARY["user"], VOCABULARY[":"]]
VISION = 256
FIRST_VISION, START = len(PREFIX), len(PREFIX) + VISION  # the questions start at START


@dataclass
class Batch:
    """B images, Q questions of T tokens each."""

    pixels: Tensor  # (B, 3, 224, 224) float32, normalised
    patch_labels: Tensor  # (B, 6, 256) int64
    tokens: Tensor  # (B, Q, T) int64
    targets: Tensor  # (B, Q, T) int64: the next token where it is part of an answer, else -100
    prompt: Tensor  # (B, Q, T) bool: rows of the prompt
    last: Tensor  # (B, Q) int64: the prompt's last row
    about: Tensor  # (B, Q, 256) bool: patches that hold the answer
    points: Tensor  # (B, Q, T, 256) bool: patches of what a word names; no patch at most words
    named: Tensor  # (B, Q, T, 6) int64: classes of the one thing that a word names, else -100
    compared: Tensor  # (B, Q, T, 6) int64: classes of the thing that a word's is compared with, else -100
    asked: Tensor  # (B, Q) int64: what is asked for
    direction: (
        Tensor  # (B, Q, T) int64: the answer, at the word by which two things can be compared, else -100
    )


def encode_question(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the prompt after the image, and of the answer with its end."""
    prompt = [VOCABULARY[word] for word in f"{question.text} assistant :".split()]
    return prompt, [VOCABULARY[word] for word in question.answer.split()] + [EOS]


def normalise(pixels: np.ndarray) -> Tensor:
    """(B, 224, 224, 3) uint8 -> (B, 3, 224, 224) float32."""
    x = torch.from_numpy(pixels).float().div_(255).permute(0, 3, 1, 2)
    return ((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).contiguous()


def make_batch(
    rng: np.random.Generator,
    assets: Assets,
    size: int,
    weights: dict[str, float],
    with_questions: bool = True,
) -> Batch:
    scenes = [draw_scene(rng, assets) for _ in range(size)]
    tokens = np.full((size, QUESTIONS, LENGTH), PAD, dtype=np.int64)
    targets = np.full_like(tokens, -100)
    prompt = np.zeros(tokens.shape, dtype=bool)
    last = np.zeros((size, QUESTIONS), dtype=np.int64)
    about = np.zeros((size, QUESTIONS, VISION), dtype=bool)
    points = np.zeros((size, QUESTIONS, LENGTH, VISION), dtype=bool)
    named = np.full((size, QUESTIONS, LENGTH, len(PATCH_LABELS)), -100, dtype=np.int64)
    compared = named.copy()
    kind = np.zeros((size, QUESTIONS), dtype=np.int64)
    direction = np.full_like(tokens, -100)
    for b, scene in enumerate(scenes if with_questions else []):
        for q, question in enumerate(ask(rng, scene, QUESTIONS, weights)):
            asked, answer = encode_question(question)
            ids = (asked + answer)[:-1]  # the end is only predicted
            tokens[b, q, : len(ids)] = ids
            targets[b, q, len(asked) - 1 : len(ids)] = answer
            prompt[b, q, : len(asked)] = True
            last[b, q] = len(asked) - 1
            about[b, q] = scene.patches(list(question.about))
            for word, things in question.points:
                points[b, q, word] = scene.patches(list(things))
                if len(things) == 1:
                    named[b, q, word] = thing_labels(scene.things[things[0]])
            kind[b, q] = ASKED.index(question.asked or question.task)
            if question.compared is not None:
                word, thing = question.compared
                compared[b, q, word] = thing_labels(scene.things[thing])
                direction[b, q, word] = DIRECTIONS.index(question.answer)
    patches = np.stack([s.labels() for s in scenes])
    arrays = (patches, tokens, targets, prompt, last, about, points, named, compared, kind, direction)
    return Batch(normalise(np.stack([s.pixels for s in scenes])), *map(torch.from_numpy, arrays))


class AuxiliaryHead(nn.Module):
    """Linear probes that only training needs.

    They name what each patch shows, from the projected vision features; what the image shows, from CLS; and
    from hidden states halfway up the decoder: what a word of the question refers to, what it is compared
    with, and what is asked for; further up, what the comparison says.
    """

    def __init__(self, width: int, vision_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(PATCH_LABELS.values()))
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
        logits = self.patch(self.norm(features.float())).split(list(PATCH_LABELS.values()), -1)
        losses = []
        for i, part in enumerate(logits):
            label = labels[:, i].reshape(-1)
            weight = torch.where(label == 0, 0.25, 1.0)  # most patches show nothing
            each = F.cross_entropy(part.reshape(len(label), -1), label, reduction="none")
            losses.append((each * weight).sum() / weight.sum())
        kinds = F.one_hot(labels[:, 0], PATCH_LABELS["kind"]).amax(1)
        colors = F.one_hot(labels[:, 1], PATCH_LABELS["color"]).amax(1)
        present = torch.cat([kinds, colors], -1).float()
        seen = F.binary_cross_entropy_with_logits(self.image(cls.float()), present)
        return torch.stack(losses).mean() * 3 + seen


def _thing_loss(probe: nn.Linear, states: Tensor, things: Tensor) -> Tensor:
    """Mean cross-entropy of the six classes of a thing; things: (B, Q, T, 6) int64, -100 at most words."""
    refers = things[..., 0] != -100
    logits = probe(states[refers]).float().split(list(PATCH_LABELS.values()), -1)
    labels = things[refers].unbind(-1)
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).mean()


def _clip_block(layer: nn.Module, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    q, k, v = (
        projection(h).view(batch, length, attention.num_heads, -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    h = _attend(q, k, v, None)[0].transpose(1, 2).reshape(batch, length, width)
    x = x + attention.out_proj(h)
    return x + layer.mlp(layer.layer_norm2(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain attention and its weights: on CPUs, compiled, it trains faster than the fused kernel."""
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return weights.to(v.dtype) @ v, weights


def _attend_text(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Question rows over the prefix and their own question; also the weights over the prefix.

    q, k, v: (B, heads, START + Q*T, head_dim) -> (B, heads, Q*T, head_dim), (B, heads, Q*T, START)
    """
    batch, heads, _, dim = q.shape
    q, scale = q[:, :, START:], dim**-0.5
    k_own, v_own, q_own = (
        x.reshape(batch, heads, QUESTIONS, LENGTH, dim) for x in (k[:, :, START:], v[:, :, START:], q)
    )
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    own = (q_own @ k_own.transpose(-1, -2)).float().masked_fill(future, -1e9).flatten(2, 3)
    logits = torch.cat(((q @ k[:, :, :START].transpose(-1, -2)).float(), own), -1) * scale
    weights = logits.softmax(-1)  # (B, heads, Q*T, START + T)
    prefix = weights[..., :START]
    from_own = weights[..., START:].to(v.dtype).unflatten(2, (QUESTIONS, LENGTH)) @ v_own
    return prefix.to(v.dtype) @ v[:, :, :START] + from_own.flatten(2, 3), prefix


def _llama_block(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, rows: bool
) -> tuple[Tensor, Tensor | None]:
    """One decoder layer. With ``rows``: also the head-mean attention of the question rows (B, Q*T, 256)."""
    batch, length, width = x.shape
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    image, _ = _attend(q[:, :, :START], k[:, :, :START], v[:, :, :START], mask)
    text, weights = _attend_text(q, k, v)
    h = torch.cat((image, text), 2).transpose(1, 2).reshape(batch, length, width)
    x = x + attention.o_proj(h)
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, weights[..., FIRST_VISION:].mean(1) if rows else None


class Packed:
    """The packed forward pass of one model."""

    def __init__(self, model: LlavaForConditionalGeneration, head: AuxiliaryHead, compiled: bool) -> None:
        self.model, self.head = model, head
        wrap = functools.partial(torch.compile, dynamic=False) if compiled else (lambda f: f)
        self.clip_block, self.llama_block = wrap(_clip_block), wrap(_llama_block)
        self.mask = torch.zeros(START, START).masked_fill(torch.ones(START, START).triu(1).bool(), -1e9)
        positions = torch.cat((torch.arange(START), (START + torch.arange(LENGTH)).repeat(QUESTIONS)))
        cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), positions[None])
        self.cos, self.sin = cos[0], sin[0]  # (START + Q*T, head_dim)

    def vision(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, 256, width) and the CLS row (B, vision width)."""
        tower = self.model.model.vision_tower
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        cls = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat((cls.to(patches.dtype), patches), 1) + tower.embeddings.position_embedding.weight
        x = tower.pre_layrnorm(x)
        for layer in tower.encoder.layers:
            x = self.clip_block(layer, x)
        return self.model.model.multi_modal_projector(x[:, 1:]), x[:, 0]

    def losses(self, batch: Batch, grounded: list[int]) -> dict[str, Tensor]:
        """``answer`` and ``patch`` losses, and ``grounding`` over the layers in ``grounded``; in nats."""
        features, cls = self.vision(batch.pixels)
        patch = self.head.patch_loss(features, cls, batch.patch_labels)
        hidden, inner, seen = self.decode(features, batch.tokens, grounded)
        halfway, above = (
            F.layer_norm(x[:, START:].float(), x.shape[-1:]).view(*batch.tokens.shape, -1) for x in inner
        )
        logits = self.model.lm_head(hidden[:, START:]).float()
        answer = F.cross_entropy(logits.flatten(0, 1), batch.targets.reshape(-1), ignore_index=-100)
        correct = (logits.argmax(-1).view_as(batch.targets) == batch.targets) | (batch.targets == -100)
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
            "exact": correct.all(-1).float().mean(),
        }

    def decode(
        self, features: Tensor, tokens: Tensor, grounded: list[int]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states at the end, those halfway and three quarters up, attention rows of ``grounded``."""
        language = self.model.model.language_model
        batch = len(features)
        prefix = language.embed_tokens(torch.tensor(PREFIX)).expand(batch, -1, -1)
        text = language.embed_tokens(tokens.flatten(1))
        x = torch.cat((prefix, features.to(prefix.dtype), text), 1)
        depth = len(language.layers)
        seen, inner = [], []
        for i, layer in enumerate(language.layers):
            x, rows = self.llama_block(layer, x, self.cos, self.sin, self.mask, i in grounded)
            if rows is not None:
                seen.append(rows)
            if i + 1 in (depth // 2, depth * 3 // 4):
                inner.append(x)
        return language.norm(x), inner, seen


def grounding_loss(rows: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy from the question's attention over the vision tokens to the patches it is about.

    ``rows``: (B, Q*T, 256). Both readings of "the question's attention" count: the mean of its rows, and
    its last row. Questions about nothing (a count of zero) are left out.
    """
    rows = rows.view(*batch.tokens.shape, VISION)
    prompt = batch.prompt.float()
    mean = (rows * prompt[..., None]).sum(2) / prompt.sum(2, keepdim=True)
    last = rows.gather(2, batch.last[..., None, None].expand(-1, -1, 1, VISION)).squeeze(2)
    return (_pointing_loss(mean, batch.about) + _pointing_loss(last, batch.about)) / 2


def naming_loss(rows: Tensor, batch: Batch) -> Tensor:
    """The same for single words: from the attention of a word that names something to the patches of it."""
    return _pointing_loss(rows.view(*batch.tokens.shape, VISION), batch.points)


def _pointing_loss(weights: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over the target patches, mean over rows that have any.

    weights: (..., 256) attention, any total; target: (..., 256) bool.
    """
    size = target.sum(-1)
    weights, target, size = weights[size > 0], target[size > 0], size[size > 0]
    log = torch.log(weights + 1e-9) - torch.log(weights.sum(-1, keepdim=True) + 1e-9)
    return (-(log * target).sum(-1) / size).mean()


assert IMAGE not in PREFIX
