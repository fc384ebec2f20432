"""What the conformance suite and `thinsight check` have in common: ways to reduce, and what comes of a batch under one
beside what the reference says.

Knows nothing about any one family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..ranking import Context, Ranker
from ..runtime import apply
from ..schedule import Schedule
from .prompts import Batch, Row
from .reference import Reference


class Subject(Protocol):
    """A model, the one that the reference runs, and its prompts."""

    def model(self, attn: str | None = None) -> PreTrainedModel:
        """The model with this attention, its own if none is said."""

    def batch(self, rows: list[Row], padding: str = "left") -> Batch:
        """Rows put together."""


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int, **options: Any) -> Any:
    """Greedy decoding of exactly `steps` tokens, with the logits of each."""
    return model.generate(
        **inputs,
        **{
            "max_new_tokens": steps,
            "min_new_tokens": steps,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            **options,
        },
    )


class FixedScores(Ranker):
    """Ranks by the place of a token in its image, in an order without a pattern; needs no attention."""

    name = "fixed-scores"

    def score(self, context: Context) -> Tensor:
        return fixed_scores(context.image, context.index)


def fixed_scores(image: Tensor, index: Tensor) -> Tensor:
    """Scores of tokens by image (its number in the row) and place in it, both int64 of any one shape."""
    return torch.sin(7.0 * index + 3.0 * image + 1.0)


def scores_of(row: Row) -> list[float]:
    """`fixed_scores` of a row's vision tokens, in order."""
    places = [(number, place) for number, group in enumerate(row.groups) for place in range(len(group))]
    image, index = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
    return fixed_scores(image, index).tolist()


@dataclass(frozen=True)
class Case:
    """One way to reduce: the library's settings and the reference's."""

    schedule: Schedule
    queries: str = "instruction"
    per: str = "image"
    fixed: bool = False  # rank by `FixedScores`
    rerank: bool | float = True

    def apply(self, model: PreTrainedModel) -> Any:
        """Put the reduction on."""
        ranker = FixedScores() if self.fixed else {"name": "text-attention", "queries": self.queries}
        return apply(model, self.schedule, ranker=ranker, per=self.per, rerank=self.rerank)

    def reference(self, subject: Subject, row: Row, attn: str = "eager") -> Reference:
        """The reference for one row; only eager attention has weights to rank by."""
        scores = scores_of(row) if self.fixed else None
        settings: dict[str, Any] = {"queries": self.queries, "per": self.per, "rerank": self.rerank}
        return Reference(subject.model(attn), subject.batch, self.schedule, scores=scores, **settings)


@dataclass(frozen=True)
class Compared:
    """One row of a batch under a reduction, beside what the reference says of it."""

    row: Row
    kept: list[list[int]] | None  # per layer, by number among the row's vision tokens; None where no row has any
    wanted: list[list[int]]
    steps: list[tuple[Tensor, Tensor]]  # logits of each generated token: the reduced model's, the reference's


def compare_steps(
    subject: Subject,
    case: Case,
    batch: Batch,
    attn: str | None = None,
    steps: int = 4,
    slow: str = "eager",
    **options: Any,
) -> Iterator[Compared]:
    """Generate greedily from a batch under a reduction, and hold each row to the reference, which follows the tokens
    that were generated and runs with `slow` attention; `options` are of `generate`."""
    model = subject.model(attn)
    with case.apply(model) as handle:
        out = generate(model, batch.inputs, steps, **options)
        layers = range(case.schedule.num_layers)
        seen = any(row.vision for row in batch.rows) and case.schedule.keep_rates[-1] < 1
        kept = [handle.kept(layer) for layer in layers] if seen else []
    for number, row in enumerate(batch.rows):
        reference = case.reference(subject, row, slow)
        logits, pairs = reference.read(row)[-1], []
        ours = [kept[layer][number].tolist() for layer in layers] if seen else None
        wanted = list(reference.kept)
        for step, token in enumerate(out.sequences[number, -steps:].tolist()):
            pairs.append((out.logits[step][number], logits))
            if step < steps - 1:
                logits = reference.answer(token)
        yield Compared(row, ours, wanted, pairs)
