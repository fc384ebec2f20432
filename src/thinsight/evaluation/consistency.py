"""Rank consistency: how alike the decoder layers rank vision tokens, the finding that a search rests on.

The paper's figure 1 on any model (arXiv 2412.00556, "main finding"): Kendall's tau between the rankings of
different layers of the full model. Knows nothing about reductions, answers or scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..runtime import num_layers
from ..runtime.families import check_supported
from .attention import prompt_scores
from .encoding import PromptReader
from .examples import Example
from .ranks import kendall_tau_b, tied_share, top_k_overlap

__all__ = ["RankConsistency", "rank_consistency"]

LOW_TAU = 0.2  # the paper's models have 0.68 and more after the first layer
FAIR_TAU = 0.4
TOP_RATE = 0.25

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RankConsistency:
    """How alike the rankings of L decoder layers are, averaged over examples.

    Attributes:
        tau: Kendall's tau-b of neighboring layers, shape (L - 1,): ``tau[i]`` compares layers i and i + 1.
        tau_matrix: of every pair of layers, shape (L, L).
        topk_overlap: share of the best quarter of the tokens that neighboring layers have in common,
            shape (L - 1,); unrelated rankings have ``top_rate`` in common.
        tied_share: share of the tokens whose score another has too, shape (L,); their order means nothing.
        top_rate: which share of the tokens ``topk_overlap`` looks at.
        examples: how many examples were averaged.
    """

    tau: Array
    tau_matrix: Array
    topk_overlap: Array
    tied_share: Array
    top_rate: float
    examples: int

    def __repr__(self) -> str:
        return (
            f"RankConsistency({len(self.tau) + 1} layers, {self.examples} examples, typical tau "
            f"{self.typical_tau:.2f}, typical overlap {self.typical_overlap:.2f})"
        )

    @property
    def typical_tau(self) -> float:
        """Median tau of neighboring layers from layer 1 on; the first often ranks differently."""
        return float(np.median(self.tau[1:] if len(self.tau) > 1 else self.tau))

    @property
    def typical_overlap(self) -> float:
        """Median top-k overlap of neighboring layers from layer 1 on."""
        return float(np.median(self.topk_overlap[1:] if len(self.topk_overlap) > 1 else self.topk_overlap))

    @property
    def is_low(self) -> bool:
        """Whether tau is so near 0 that one layer's ranking says little about the next one's."""
        return self.typical_tau < LOW_TAU

    def summary(self) -> str:
        """What the numbers mean, in words; starts with "Warning" when ranking by this model is doubtful."""
        by_chance = f"{self.top_rate:.0%} by chance"
        facts = (
            f"Kendall's tau between neighboring layers is {self.typical_tau:.2f} (median after the first "
            f"layer, which has {self.tau[0]:.2f}), and they share {self.typical_overlap:.0%} of their best "
            f"{self.top_rate:.0%} of the vision tokens ({by_chance}), over {self.examples} examples."
        )
        ties = self.tied_share.max()
        noted = ""
        if ties >= 0.05:
            noted = (
                f" Up to {ties:.0%} of the scores of layer {self.tied_share.argmax()} are tied: "
                "the order of those tokens is arbitrary."
            )
        return f"{self._verdict()} {facts}{noted}"

    def _verdict(self) -> str:
        if self.is_low:
            return (
                "Warning: the layers hardly agree on which vision tokens matter, so ranking by attention may "
                "be no better than random on this model: compare with the random ranker before trusting it."
            )
        if self.typical_tau < FAIR_TAU:
            return (
                "The layers agree moderately on which vision tokens matter; ranking by attention should help."
            )
        return "The layers agree on which vision tokens matter: what an early layer ranks low stays low."


def rank_consistency(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    ranker: Any = "text-attention",
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
    reader: PromptReader | None = None,
) -> RankConsistency:
    """Compare the rankings of all decoder layers of the full model, over the prompts of some examples.

    The scores are computed in float32 whatever the model's dtype, over all vision tokens of a prompt.
    The statistics are computed per example and then averaged. A few dozen examples are plenty.

    Args:
        model: a transformers vision-language model without a reduction on it.
        processor: the model's own processor.
        examples: what ``load_examples`` returns; answers are not needed.
        ranker: what ranks: a ranker's name, dict or object.
        batch_size: prompts per forward pass.
        progress: called as ``progress(what, done, total)`` while images are read, and after each batch, in
            examples.
        reader: what has read the examples for this model, such as an evaluator's; None: they are read here.

    Raises:
        ThinsightError: bad examples, an unknown ranker, a prompt without image token or with fewer than two
            vision tokens, a model with one layer or one that is not supported.
    """
    model = check_supported(model)
    if num_layers(model) < 2:
        raise BadInput(
            "the model has one decoder layer: rank consistency compares layers, use a deeper model"
        )
    found = prompt_scores(
        model,
        processor,
        examples,
        ranker,
        batch_size,
        progress,
        "rank consistency",
        least_tokens=2,
        reader=reader,
    )
    statistics = [_statistics(scores) for scores in found]
    tau, overlap, ties = (np.mean(values, axis=0) for values in zip(*statistics, strict=True))
    return RankConsistency(
        tau=np.diag(tau, k=1).copy(),
        tau_matrix=tau,
        topk_overlap=overlap,
        tied_share=ties,
        top_rate=TOP_RATE,
        examples=len(statistics),
    )


class _Statistics(NamedTuple):
    """Of one prompt: tau (L, L), top-k overlap (L - 1,), tied share (L,)."""

    tau: Array
    overlap: Array
    ties: Array


def _statistics(scores: Array) -> _Statistics:
    """scores: (layers, N)."""
    top = math.ceil(TOP_RATE * scores.shape[1])
    return _Statistics(kendall_tau_b(scores), top_k_overlap(scores, top), tied_share(scores))
