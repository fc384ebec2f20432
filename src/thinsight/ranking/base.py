"""The contract of a ranker, and the rankers by name.

A ranker is given tensors about the vision tokens that are still there and returns a score for each. The only hard
contract (`thinsight.testing.RankerContract` holds a ranker to it; CONTRIBUTING says how to add one): `score` returns a
finite (batch, tokens) tensor, and depends on nothing but the context and the settings, so that a prompt is ranked
alike whether alone or in a batch.
"""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput
from ..registry import Registry

TEXT_ATTENTION = "text-attention"
"""A need: attention rows of the decoder layer just run, or of the last before it that attends (`Context.attention`,
`Context.queries`)."""
VISION_ATTENTION = "vision-attention"
"""A need: attention inside the vision tower (`Context.vision_attention`)."""
STATES = "states"
"""A need: hidden states of the vision and text tokens where they are about to be reduced (`Context.states`,
`Context.text_states`, `Context.queries`)."""
QUERIES = ("last", "instruction")


@dataclass(frozen=True)
class Context:
    """What a ranker may look at when layer `layer` is about to get fewer vision tokens.

    `tokens` counts all vision tokens of the longest row of the batch, in the order of the prompt. Entries that are
    padding or were dropped by an earlier reduction have `valid` False; what a ranker returns there is ignored.
    """

    layer: int
    valid: Tensor  # (batch, tokens) bool: tokens that are still there
    image: Tensor  # (batch, tokens) int64: which image of the prompt, from 0
    index: Tensor  # (batch, tokens) int64: place within that image, from 0
    size: Tensor  # (batch, tokens) int64: how many tokens that image has (its N)
    attention: Tensor | None = None  # (batch, heads, queries, tokens) float32, a softmax
    queries: Tensor | None = None  # (batch, queries) bool: rows of `attention`, `text_states` that are real
    vision_attention: Tensor | None = None  # (batch, tokens) float32, received inside the vision tower
    states: Tensor | None = None  # (batch, tokens, hidden): what enters layer `layer`, before its norm
    text_states: Tensor | None = None  # (batch, queries, hidden): likewise, of the text that ranks
    pooled: Tensor | None = None  # (batch, tokens) float32, in place of `attention` for rankers that pool it

    def mean_attention(self) -> Tensor | None:
        """Text attention that each token receives, (batch, tokens) float32: the mean over heads and real queries. None
        where none was read."""
        if self.pooled is not None or self.attention is None or self.queries is None:
            return self.pooled
        return mean_rows(self.attention, self.queries)


def mean_rows(attention: Tensor, queries: Tensor) -> Tensor:
    """The mean over heads and real queries of (batch, heads, queries, tokens): (batch, tokens)."""
    return weighted_rows(attention, row_weights(queries).to(attention.dtype))


def row_weights(queries: Tensor) -> Tensor:
    """What each query weighs in a mean over the real ones: (batch, queries) bool -> float32, rows sum to 1 (0 where
    none is real)."""
    weight = queries.float()
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1)


def weighted_rows(attention: Tensor, weights: Tensor) -> Tensor:
    """The mean over heads of (batch, heads, queries, tokens), its queries summed with weights (batch, queries): (batch,
    tokens). Queries of weight 0 have no part in it, whatever stands there."""
    weights = weights[:, :, None]
    return (attention.mean(dim=1) * weights).masked_fill(weights == 0, 0).sum(dim=1)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device's numbers, in this thread."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast is off for what is computed on a device, or on the CPU.

    Reading attention and ranking by it are a small part of a pass and no place to save: masks are added as float32's
    lowest number, which bfloat16 and float16 round to -inf, so that a row which sees nothing comes out of its softmax
    as NaN; and an order turns on differences that they do not hold.
    """
    with ExitStack() as stack:
        for each in {torch.device("cpu"), device}:
            if autocasts(each):
                stack.enter_context(torch.autocast(each.type, enabled=False))
        yield


class Ranker(ABC):
    """Gives every vision token a score; the higher ones are kept.

    Subclasses set `name` and `needs`, take their settings as keyword arguments and hand them to `super().__init__`.
    `queries` says which rows of text attention are wanted, for rankers that need it: ``"last"`` (the last prompt token)
    or ``"instruction"`` (all text tokens after the last image; the last prompt token if there are none).
    """

    name: ClassVar[str]
    needs: frozenset[str] = frozenset()
    queries: str = "instruction"
    rows: int | None = None
    """At most so many of these rows, evenly spaced; None: all."""
    pools: bool = False
    """Whether of text attention it reads `Context.mean_attention()` alone, which costs less to have."""

    def __init__(self, **settings: Any) -> None:
        self.settings: dict[str, Any] = settings

    @abstractmethod
    def score(self, context: Context) -> Tensor:
        """Scores, (batch, tokens) float32, finite. Ties are broken in favour of the earlier token."""

    @property
    def ranks_at_layer_0(self) -> bool:
        """Whether it can rank before the first decoder layer, where no attention has been paid yet."""
        return TEXT_ATTENTION not in self.needs

    def merge(self, context: Context, kept: Tensor) -> Tensor | None:
        """What kept tokens are to hold from here on, for methods that merge dropped tokens into kept ones.

        Args:
            context: as in `score`; a ranker that merges needs `STATES`.
            kept: (batch, tokens) bool.

        Returns:
            (batch, tokens, hidden), read where `kept` is True; None: every kept token stays as it is.
        """
        return None

    def given(self, value: Tensor | None, what: str) -> Tensor:
        """A tensor of the context, or the error that says what to supply."""
        if value is None:
            raise BadInput(f"{self.name} needs {what}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., **settings}``: what a reduction stores, and `get_ranker` reads."""
        return {"name": self.name, **self.settings}

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranker) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True, default=repr))


RANKERS: Registry[type[Ranker]] = Registry("ranker", "thinsight.rankers")
register = RANKERS.register
"""Class decorator: makes a ranker known by its `name`."""


def list_rankers() -> list[str]:
    """The names of all known rankers, sorted."""
    return sorted(RANKERS)


def get_ranker(spec: str | Mapping[str, Any] | Ranker) -> Ranker:
    """A ranker from its name, from ``{"name": ..., **settings}``, or itself.

    Raises:
        BadInput: unknown name, missing name, or a setting that the ranker does not have.
    """
    if isinstance(spec, Ranker):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise BadInput(f"ranker is {spec!r}; give a name ({', '.join(RANKERS)}) or a dict with 'name'")
    settings = dict(spec)
    name = settings.pop("name")
    ranker = RANKERS[name]
    parameters = inspect.signature(ranker).parameters.values()
    allowed = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if unknown := sorted(set(settings) - set(allowed)):
        raise BadInput(f"ranker {name!r} has no setting {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    try:
        return ranker(**settings)
    except BadInput as error:
        raise BadInput(f"ranker {name!r}: {error}") from None


def best(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """The `count` best valid tokens of each row, (batch, tokens) bool: `choose` where a row is one group."""
    # stable, which topk is not: equal scores fall to the earlier token
    order = _comparable(scores, valid).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(valid).scatter(1, order[:, :count], True) & valid


def choose(scores: Tensor, valid: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """The `count` best valid tokens of each group.

    Args:
        scores: (batch, tokens) float, higher is better; ignored where `valid` is False.
        valid: (batch, tokens) bool, the tokens to choose from.
        group: (batch, tokens) int64, tokens with one number compete with each other (an image, or the whole prompt).
        count: (batch, tokens) int64, how many of the token's group are to be chosen.

    Returns:
        (batch, tokens) bool. Exactly `count` tokens of each group, or all its valid ones if they are fewer. Equal
        scores fall to the earlier token; NaN is lower than any number.
    """
    order = _comparable(scores, valid).argsort(dim=1, descending=True, stable=True)  # (batch, tokens)
    by_group = group.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_group)  # best first inside each group, groups one after the other
    groups = group.gather(1, order).contiguous()
    place = torch.arange(order.shape[1], device=order.device) - torch.searchsorted(groups, groups)
    chosen = place < count.gather(1, order)
    return torch.zeros_like(valid).scatter(1, order, chosen) & valid


def _comparable(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores without NaN, those that are not valid below all others."""
    ranked = scores.float()
    return ranked.nan_to_num(nan=torch.finfo(ranked.dtype).min).masked_fill(~valid, -math.inf)
