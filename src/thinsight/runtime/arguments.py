"""A decoder layer's arguments where tokens are missing: its states, its mask and its rotary tables in the
columns that are there, and its cache told of them.

Knows nothing about which tokens were dropped, or why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..schedule import Schedule
from .cache import Thinned, cache_of, thin, thinned
from .families import attention_implementation
from .layout import Columns
from .masks import causal, gather_tokens, reduce_mask
from .passes import Pass, ThreadState

__all__ = ["LayerArguments"]


class LayerArguments:
    """Turns what a layer is called with into what it is to get; None where it may stay as it is."""

    def __init__(self, model: PreTrainedModel, schedule: Schedule, local: ThreadState) -> None:
        self.model = model
        self.schedule = schedule
        self.local = local

    def reduced(
        self, run: Pass, columns: Columns, layer: int, states: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The arguments in a pass some of whose vision tokens are dropped, so that `columns` are left."""
        take = columns.index if run.spread else run.take
        run.take, run.spread = None, False
        states = states if take is None else gather_tokens(states, take)
        reduced, cache = dict(kwargs), cache_of(kwargs)
        seq, total = run.call.seq, run.call.past + run.call.seq
        held = None
        if cache is not None:
            held = thin(cache, layer, self.schedule)
            held.expect(states.shape[0], seq, columns, run.kept)
        reduced["attention_mask"] = self._mask(kwargs, held, columns, seq, total, states.device)
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            reduced["position_embeddings"] = tuple(self._rotary(part, columns) for part in embeddings)
        return _replaced(states, args, reduced)

    def whole(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments in a pass that is all there, as in decoding, behind what may be a thinned cache."""
        held = thinned(cache_of(kwargs), layer)
        if held is None:
            return None
        held.check(self.schedule)
        states = args[0] if args else kwargs["hidden_states"]
        batch, seq = states.shape[:2]
        mask = kwargs.get("attention_mask")
        ragged = held.ragged
        total = int(held.get_seq_length()) + seq if mask is None and ragged else 0
        held.expect(batch, seq)
        if held.kept is None:
            return None
        reduced = dict(kwargs)
        if mask is not None or ragged:
            reduced["attention_mask"] = self._mask(kwargs, held, None, seq, total, states.device)
        return _replaced(states, args, reduced)

    def _rotary(self, table: Tensor, columns: Columns) -> Tensor:
        """A rotary table at the columns that are there, made once for the layers of a stage."""
        if torch.compiler.is_compiling():  # as in `_mask`
            return gather_tokens(table, columns.index)
        made = self.local.masks
        key = (id(table), id(columns))
        if key not in made:
            made[key] = gather_tokens(table, columns.index), table, columns
        taken: Tensor = made[key][0]
        return taken

    def _mask(
        self,
        kwargs: dict[str, Any],
        held: Thinned | None,
        columns: Columns | None,
        seq: int,
        total: int,
        device: torch.device,
    ) -> Any:
        """A layer's mask in physical columns, made once for the layers of a stage."""
        mask = kwargs.get("attention_mask")
        if mask is None and not _ragged(held, columns):
            return None
        if torch.compiler.is_compiling():  # ids of tensors would tie the graph to these very tensors
            return self._reduced_mask(mask, held, columns, seq, total, device)
        made = self.local.masks
        kept = None if held is None else held.kept
        key = (id(mask), type(held), id(kept), id(columns))
        if key not in made:
            # what the ids belong to is held on to, so that they stay its own
            made[key] = self._reduced_mask(mask, held, columns, seq, total, device), mask, kept, columns
        return made[key][0]

    def _reduced_mask(
        self,
        mask: Any,
        held: Thinned | None,
        columns: Columns | None,
        seq: int,
        total: int,
        device: torch.device,
    ) -> Any:
        keys = columns if held is None else held.columns()
        assert keys is not None
        if mask is None:
            mask = causal(seq, total, attention_implementation(self.model), device)
        return reduce_mask(mask, keys, columns, 0 if held is None else held.offset)


def _ragged(held: Thinned | None, columns: Columns | None) -> bool:
    """Whether some of the keys that a layer sees are filling."""
    if held is not None:
        return held.ragged
    return columns is not None and columns.valid is not None


def _replaced(states: Tensor, args: tuple[Any, ...], reduced: dict[str, Any]) -> Any:
    """What a pre-hook returns: positional and keyword arguments, with these states."""
    if "position_ids" in reduced:
        # flash attention would read gaps in them as packed sequences; rotary tables say it all
        reduced["position_ids"] = None
    if args:
        return (states, *args[1:]), reduced
    return args, {**reduced, "hidden_states": states}
