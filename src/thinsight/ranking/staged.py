"""Ranker: one way of ranking before the first decoder layer that attends, another one after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import BadInput
from .base import TEXT_ATTENTION, Context, Ranker, get_ranker, register


@register
class Staged(Ranker):
    """`first` ranks where no attention has been paid yet, at layer 0 and behind layers that carry a state in place of
    attending, `then` at all later layers.

    With it a schedule may drop tokens before the first layer and go on by the text's attention, which budgets below 1 /
    L need.
    """

    name = "staged"

    def __init__(
        self, first: str | Mapping[str, Any] = "vision-attention", then: str | Mapping[str, Any] = "text-attention"
    ) -> None:
        self.first, self.then = _part(first, "first"), _part(then, "then")
        if TEXT_ATTENTION in self.first.needs:
            raise BadInput(
                f"first is {self.first.name!r}, which reads the layer before, and layer 0 has none; choose "
                "vision-attention, random or uniform"
            )
        if {type(each).merge for each in (self.first, self.then)} != {Ranker.merge}:
            raise BadInput("staged rankers cannot merge tokens; choose rankers that only score")
        super().__init__(first=self.first.to_dict(), then=self.then.to_dict())
        self.needs = self.first.needs | self.then.needs
        self.queries, self.rows, self.pools = self.then.queries, self.then.rows, self.then.pools

    @property
    def ranks_at_layer_0(self) -> bool:
        return True

    def score(self, context: Context) -> Tensor:
        unpaid = TEXT_ATTENTION in self.then.needs and context.attention is None and context.pooled is None
        return (self.first if unpaid or not context.layer else self.then).score(context)


def _part(spec: str | Mapping[str, Any], name: str) -> Ranker:
    try:
        return get_ranker(spec)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
