"""A frozen Llama with low-rank additions (LoRA), and the packed pass that trains them.

One image stands first, as vision tokens; behind it stand chunks of questions. A question sees the image and
itself only and its positions start right after the image, so one pass over the vision tokens pays for all of
them. The one loss is that of the answers' tokens. Computes what the stock model with the additions merged
computes (`tests/training/test_lora.py` holds it to that). Knows nothing about scenes, tasks or optimisers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinsight.smollm2_model import MATRICES, matrix_names, merge_lora

__all__ = ["IGNORED", "Adapted", "Questions", "initial_lora", "matrix_names", "merge_lora"]
IGNORED = -100


@dataclass
class Questions:
    """The questions behind one image, in C chunks of T tokens.

    ``segments`` tells the questions apart, -1 is padding; ``targets`` holds the next token where it is part
    of an answer, else -100.
    """

    tokens: Tensor  # (C, T) int64
    targets: Tensor  # (C, T) int64
    positions: Tensor  # (C, T) int64, counted from the first token behind the image
    segments: Tensor  # (C, T) int64


def initial_lora(language: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """Float32 factors ``<linear>.A`` (rank, in) and ``<linear>.B`` (out, rank) that add nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name in matrix_names(len(language.layers)):
        linear = language.get_submodule(name)
        inputs, outputs = linear.in_features, linear.out_features
        lora[f"{name}.A"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        lora[f"{name}.B"] = torch.zeros(outputs, rank)
    return lora


def _linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, a), b)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: Tensor, own: Tensor) -> Tensor:
    """Image rows over those before them; question rows over the image and their own question.

    Written out: compiled, it trains in half the time of the fused kernel. Query heads that share a key head
    are rows of one product.

    q: (heads, rows, dim); k, v: (key heads, rows, dim); causal: (start, start) and own: (C, T, T), added to
    the logits.
    """
    heads, rows, dim = q.shape
    keys, start, (chunks, length, _) = len(k), len(causal), own.shape
    q = (q * dim**-0.5).view(keys, -1, rows, dim)

    def by_chunk(x: Tensor) -> Tensor:
        """(key heads, group, C*T, n) -> (key heads, C, group*T, n)"""
        return x.unflatten(2, (chunks, length)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(2, 3)

    before = (q.flatten(1, 2) @ k[:, :start].transpose(1, 2)).view(keys, -1, rows, start).float()
    k_own, v_own = (x[:, start:].unflatten(1, (chunks, length)) for x in (k, v))
    inside = (by_chunk(q[:, :, start:]) @ k_own.transpose(-1, -2)).float()
    inside = (inside.unflatten(2, (-1, length)) + own[:, None]).flatten(2, 3)
    image = (before[:, :, :start] + causal).softmax(-1).to(v.dtype)
    text = torch.cat((before[:, :, start:], by_row(inside)), -1).softmax(-1).to(v.dtype)
    weights = torch.cat((image, text[..., :start]), 2).flatten(1, 2)
    seen = (weights @ v[:, :start]).view(keys, -1, rows, dim)
    read = by_row(by_chunk(text[..., start:]) @ v_own)
    return torch.cat((seen[:, :, :start], seen[:, :, start:] + read), 2).view(heads, rows, dim)


def _block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    causal: Tensor,
    own: Tensor,
    weights: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    dim: int,
    epsilon: float,
) -> Tensor:
    """One decoder layer.

    x: (start + C*T, width); weights: of two norms and seven matrices; factors: A and B of each matrix.
    """
    before, after, *matrices = weights
    low = list(zip(matrices, factors[::2], factors[1::2], strict=True))
    h = _norm(x, before, epsilon)
    q, k, v = (_linear(h, *low[i]).view(len(x), -1, dim).transpose(0, 1) for i in range(3))
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    h = _attend(q, k, v, causal, own)
    x = x + _linear(h.transpose(0, 1).flatten(1), *low[3])
    h = _norm(x, after, epsilon)
    return x + _linear(F.silu(_linear(h, *low[4])) * _linear(h, *low[5]), *low[6])


class Adapted:
    """The packed pass over a frozen `LlamaModel` whose word embeddings are its output head too."""

    def __init__(self, language: nn.Module, prefix: list[int], vision_tokens: int, compiled: bool) -> None:
        self.language = language.requires_grad_(False)
        self.prefix = torch.tensor(prefix)
        self.start = len(prefix) + vision_tokens
        self.dtype = language.embed_tokens.weight.dtype
        self.causal = _blocked(torch.ones(self.start, self.start).tril().bool())
        self.block: Callable[..., Tensor] = torch.compile(_block, dynamic=False) if compiled else _block
        self.weights = [
            (
                layer.input_layernorm.weight,
                layer.post_attention_layernorm.weight,
                *(layer.get_submodule(matrix).weight for matrix in MATRICES),
            )
            for layer in language.layers
        ]

    def hidden(self, features: Tensor, questions: Questions, lora: list[Tensor]) -> Tensor:
        """The last hidden states of the question rows, (C*T, width).

        features: (vision tokens, width); lora: A and B of every matrix, in the order of `matrix_names`.
        """
        config, each = self.language.config, 2 * len(MATRICES)
        embed = self.language.embed_tokens
        parts = (embed(self.prefix), features.to(self.dtype), embed(questions.tokens.flatten()))
        x = torch.cat(parts)
        positions = torch.cat((torch.arange(self.start), self.start + questions.positions.flatten()))
        cos, sin = self.language.rotary_emb(x[None], positions[None])
        own = own_question(questions.segments)
        for i, weights in enumerate(self.weights):
            factors = tuple(lora[i * each : (i + 1) * each])
            x = self.block(x, cos[0], sin[0], self.causal, own, weights, factors, config.head_dim, config.rms_norm_eps)
        return _norm(x[self.start :], self.language.norm.weight, config.rms_norm_eps)

    def losses(self, features: Tensor, questions: Questions, lora: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Every loss there is, in nats; and for each answer token, in reading order, whether it is right."""
        targets = questions.targets.flatten()
        asked = targets != IGNORED
        hidden = self.hidden(features, questions, lora)[asked]
        logits = F.linear(hidden, self.language.embed_tokens.weight).float()
        right = logits.detach().argmax(-1) == targets[asked]
        return {"answer": F.cross_entropy(logits, targets[asked])}, right

    def prepare(self, lora: list[Tensor], chunks: int, length: int) -> None:
        """Compiles what computes with gradients and without; threads that did so at once would collide."""
        empty = torch.zeros(chunks, length, dtype=torch.long)
        questions = Questions(empty, empty, empty, empty)
        width = self.language.config.hidden_size
        features = torch.zeros(self.start - len(self.prefix), width, requires_grad=True)
        loss = self.losses(features, questions, lora)[0]["answer"]
        torch.autograd.grad(loss, [features, *lora])
        with torch.no_grad():
            self.losses(features.detach(), questions, [x.detach() for x in lora])


def own_question(segments: Tensor) -> Tensor:
    """(C, T, T): 0 where a row may look inside its chunk, else a large negative number."""
    length = segments.shape[1]
    return _blocked((segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length).tril().bool())


def _blocked(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
