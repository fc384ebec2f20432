"""What the suite's tests have in common: running a model, and holding its steps to the reference.

Knows nothing about any one family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache

from thinsight.ranking import Context, Ranker
from thinsight.runtime import apply
from thinsight.schedule import Schedule

from .family import Family
from .inputs import Batch, Row
from .reference import Reference

FULL = Schedule.full(4)
NEARLY_FULL = Schedule([1, 0.99, 0.98, 0.97])
"""Keeps every token of up to 33, but has every hook installed and every count computed."""


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


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


def paged_cache() -> PagedAttentionCache:
    """The cache of continuous batching as far as its type tells: it holds nothing."""
    return PagedAttentionCache.__new__(PagedAttentionCache)


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

    def reference(self, family: Family, row: Row) -> Reference:
        """The reference for one row."""
        scores = scores_of(row) if self.fixed else None
        settings = {"queries": self.queries, "per": self.per, "rerank": self.rerank}
        return Reference(family, self.schedule, scores=scores, **settings)


def check_steps(family: Family, case: Case, batch: Batch, attn: str | None = None, steps: int = 4) -> None:
    """Generate greedily from a batch; hold kept tokens and the logits of every step to the reference."""
    model = family.model(attn)
    with case.apply(model) as handle:
        out = generate(model, batch.inputs, steps)
        layers = range(case.schedule.num_layers)
        seen = any(row.vision for row in batch.rows)
        kept = [handle.kept(layer) for layer in layers] if seen else []
    for number, row in enumerate(batch.rows):
        reference = case.reference(family, row)
        logits = reference.read(row)[-1]
        if seen:
            assert [kept[layer][number].tolist() for layer in layers] == reference.kept
        for step, token in enumerate(out.sequences[number, -steps:].tolist()):
            close(out.logits[step][number], logits)
            if step < steps - 1:
                logits = reference.answer(token)
