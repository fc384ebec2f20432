"""Which vision tokens stay where a layer gets fewer of them: the ranker's scores, its groups' quotas.

Knows nothing about models, caches, or where the attention that ranks was read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from ..ranking import STATES, Context, Ranker, best, choose
from .layout import shrink, text_marks
from .masks import gather_tokens, replace_tokens
from .passes import Pass
from .quotas import Quotas

__all__ = ["Selector"]


class Selector:
    """Keeps the best tokens of a pass, as many as the quotas say."""

    def __init__(self, ranker: Ranker, quotas: Quotas) -> None:
        self.ranker = ranker
        self.quotas = quotas
        self.merges = type(ranker).merge is not Ranker.merge

    def drop(self, run: Pass, layer: int, states: Tensor) -> Tensor:
        """Keep the best of what is alive, as `run.take` and `run.columns` say; the states, which a ranker
        that merges has changed."""
        counts, ranking = self.quotas.rows(run, layer), self.quotas.ranking(run, layer)
        with torch.no_grad():
            context = self._context(run, layer, states) if any(ranking) or self.merges else None
            if context is not None and any(ranking):
                self._rank(run, context, ranking, [sum(row) for row in counts])
            run.attention = None
            assert run.scores is not None
            scores = run.scores if run.last is None else run.scores.masked_fill(run.last, torch.inf)
            if len(set(counts)) == 1 and len(counts[0]) == 1:
                run.alive = best(scores, run.alive, counts[0][0])
            else:
                run.alive = choose(scores, run.alive, *self.quotas.of_tokens(run, layer))
            self._check_ends(run, layer)
            places = run.places(run.call.layout.column)[0] if self.merges else None
            if run.text is None:
                run.text = text_marks(run.call.layout)
            kept = [sum(row) for row in counts]
            run.take, run.columns = shrink(run.call.layout, run.text, run.alive, kept, run.columns)
        if context is None or places is None:
            return states
        merged = self.ranker.merge(context, run.alive)
        return states if merged is None else replace_tokens(states, places, run.alive, merged)

    def _rank(self, run: Pass, context: Context, ranking: list[bool], counts: list[int]) -> None:
        """Score the rows that rank anew; the others keep their last scores."""
        scores = self.ranker.score(context).to(run.alive.device)
        keeping = [not ranks and last is not None for ranks, last in zip(ranking, run.ranked, strict=True)]
        if run.scores is not None and any(keeping):
            rows = zip(keeping, run.scores, scores, strict=True)
            scores = torch.stack([old if keeps else new for keeps, old, new in rows])
        run.scores = scores
        rows_now = zip(ranking, counts, run.ranked, strict=True)
        run.ranked = [count if ranks else last for ranks, count, last in rows_now]

    def _context(self, run: Pass, layer: int, states: Tensor) -> Context:
        layout = run.call.layout
        pooled = run.attention is not None and run.attention.ndim == 2
        seen = text = None
        if STATES in self.ranker.needs:
            assert run.queries is not None
            places = run.places(layout.column, run.queries[0])
            seen, text = (gather_tokens(states, each) for each in places)
        return Context(
            layer=layer,
            valid=run.alive,
            image=layout.image,
            index=layout.index,
            size=layout.size,
            attention=None if pooled else run.attention,
            pooled=run.attention if pooled else None,
            queries=None if run.queries is None else run.queries[1],
            vision_attention=run.call.received,
            states=seen,
            text_states=text,
        )

    def _check_ends(self, run: Pass, layer: int) -> None:
        """Refuse to drop the image that a prompt ends in."""
        if run.plan.ends is None:
            return
        for group, sizes, level in zip(run.plan.ends, run.call.layout.sizes, run.levels, strict=True):
            if group >= 0 and not self.quotas.count(self.quotas.groups(sizes)[group], layer, level):
                raise BadInput(
                    f"a prompt ends in an image of which layer {layer} keeps no token, so nothing is left to "
                    "answer from; let text follow on the image"
                )
