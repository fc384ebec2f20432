"""A slow, independent way to run any decoder under a schedule: whole sequence, no cache, no padding.

The stock model's own forward runs one row at a time, so that embeddings, positions, token types, deepstack,
sliding windows and bidirectional blocks are its own. Tokens that a layer drops are taken from it in one of two ways:

- `Hiding`, for attention: all tokens run, but from that layer on the dropped ones are hidden from everyone as keys.
- `Removing`, for layers that carry a state along the sequence (convolutions, linear attention), which no mask could
  keep from it: the rows go before the layer and come back, as they were, behind it.

The ranking is recomputed from the plain attention weights of the nearest layer before that has any. Shares no code
with the library but `Schedule.counts` and the names of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..schedule import Schedule
from .prompts import Batch, Row, answer

ROWS = 16  # of text that rank, evenly spaced, where there are more
_ATTENTION = ("self_attn", "attention", "attn")  # what layers call theirs


class Reference:
    """One prompt, possibly continued by answers and later turns.

    Args:
        model: with eager attention, unless `scores` rank or `chosen` says what is kept.
        batch: makes the model's keyword arguments of rows.
        schedule: how many vision tokens of each image enter each layer.
        queries: which rows' attention ranks: "instruction", the turn's tokens after its last vision token, or
            "last", its last token.
        per: what competes for a place: the tokens of an "image", or all of the "prompt".
        scores: fixed scores of the turn's vision tokens, in place of attention.
        rerank: rank anew at every reduction of a turn; a number: where fewer than this share of the tokens
            stay that stayed at the last ranking; False: the first one's scores serve all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Callable[[list[Row]], Batch],
        schedule: Schedule,
        *,
        queries: str = "instruction",
        per: str = "image",
        scores: Sequence[float] | None = None,
        rerank: bool | float = True,
    ) -> None:
        self.model = model
        self.batch = batch
        text: Any = model.get_decoder()
        text = text if hasattr(text, "layers") else text.model  # Llama 4 hands it out together with its head
        self.layers: list[Any] = list(text.layers)[: schedule.num_layers]
        self.keys_of = keys_of(text.config, schedule.num_layers)
        self.schedule = schedule
        self.queries = queries
        self.per = per
        self.scores = scores
        self.rerank = rerank
        self.row = Row([])
        self.hidden: list[set[int]] = [set() for _ in self.layers]  # per layer, positions that are not there
        self.kept: list[list[int]] = []  # per layer, the turn's kept vision tokens, by number in the turn
        self.chosen: Sequence[Sequence[int]] | None = None  # per layer, what to keep of the turn, in `kept`'s way
        self.misses: list[float] = []  # see `read`

    def read(self, turn: Row, chosen: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Read a prompt or a later turn; the logits of its tokens (seq, vocab).

        `chosen`: per layer, which of the turn's vision tokens enter it, by number, in place of a ranking. Where there
        are attention weights, `misses` then says of each choice by how much the best token that went was better than
        the worst that stayed, as a share of the group's best: 0 where the ranking would have chosen so too.
        """
        start = len(self.row.ids)
        self.row = self.row + turn
        self.kept, self.chosen, self.misses = [], chosen, []
        return self._run(_Ranking(self, turn, start))[start:]

    def answer(self, token: int) -> Tensor:
        """Append one generated token; its logits (vocab,)."""
        self.row = self.row + Row([answer([token])])
        return self._run(None)[-1]

    @torch.no_grad()
    def _run(self, ranking: _Ranking | None) -> Tensor:
        inputs = self.batch([self.row]).inputs
        with self._hooks(ranking):
            logits: Tensor = self.model(**inputs, use_cache=False).logits[0]
            return logits

    @contextmanager
    def _hooks(self, ranking: _Ranking | None) -> Iterator[None]:
        hooks: list[Any] = []
        for number, layer in enumerate(self.layers):
            if ranking is not None:
                hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: ranking.rank(number)))
            attention = attention_of(layer)
            way: Any = Removing if attention is None else Hiding
            hooks += way(self.hidden[number]).put_on(layer)
            if ranking is not None and attention is not None:
                hooks.append(attention.register_forward_hook(ranking.watch))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def keys_of(text: Any, layers: int) -> dict[int, int]:
    """The decoder layers without keys of their own, and the layer whose keys each reads: the last of its kind before
    them (Gemma 4)."""
    first, kinds = layers - (getattr(text, "num_kv_shared_layers", None) or 0), getattr(text, "layer_types", ())
    return {i: max(j for j in range(first) if kinds[j] == kinds[i]) for i in range(first, layers)}


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The layer's self-attention; None where it has another way to mix tokens."""
    found = (getattr(layer, name, None) for name in _ATTENTION)
    return next((each for each in found if isinstance(each, nn.Module)), None)


class Hiding:
    """Nobody sees these positions as keys, but each of them itself."""

    def __init__(self, places: set[int]) -> None:
        self.places = places

    def put_on(self, layer: nn.Module) -> list[Any]:
        """Hooks on a layer."""
        return [layer.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": hide(kwargs.get("attention_mask"), self.places, states)}


class Removing:
    """These positions do not enter a layer, and come out of it as they were."""

    def __init__(self, places: set[int]) -> None:
        self.places = places
        self._whole: list[tuple[Tensor, Tensor]] = []  # states, which rows run

    def put_on(self, layer: nn.Module) -> list[Any]:
        """Hooks on a layer."""
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        length = states.shape[-2]
        there = torch.tensor([i for i in range(length) if i not in self.places], device=states.device)
        self._whole.append((states, there))

        def without(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(without(each) for each in value)
            if not isinstance(value, Tensor):
                return value
            if value is states:  # (batch, seq, hidden), or streams of such (Gemma 3n)
                return value.index_select(-2, there.to(value.device))
            # (batch, seq, any), rotary tables that may be complex, (batch, seq), positions (3, batch, seq), masks
            # (batch, heads, seq, seq)
            second = value.is_floating_point() or value.is_complex()
            places = (2, 3) if value.ndim == 4 else (1,) if second else (value.ndim - 1,)
            for dim in places:
                if dim and value.ndim > dim and value.shape[dim] == length:
                    value = value.index_select(dim, there.to(value.device))
            return value

        return tuple(map(without, args)), {name: without(value) for name, value in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        states, there = self._whole.pop()
        got = output[0] if isinstance(output, tuple) else output
        whole = states.clone()
        whole[..., there, :] = got
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


class _Ranking:
    """Chooses a turn's tokens, layer by layer, while the turn is read."""

    def __init__(self, reference: Reference, turn: Row, start: int) -> None:
        self.reference = reference
        self.tokens = [start + place for place in turn.vision]
        self.groups = [[start + place for place in group] for group in turn.groups]
        if reference.per == "prompt":
            self.groups = [self.tokens]
        self.sizes = [len(group) for group in self.groups]
        end = start + len(turn.ids)
        self.last = end - 1
        after = [place for place in range(start, end) if self.tokens and place > self.tokens[-1]]
        if len(after) > ROWS:
            after = [after[number * len(after) // ROWS - 1] for number in range(1, ROWS + 1)]
        self.rows = after if after and reference.queries == "instruction" else [end - 1]
        self.weights: Tensor | None = None  # (heads, seq, seq) of the layer before
        self.received: Tensor | None = None  # (seq,) what each token received when it was last ranked
        self.stayed = 0  # how many tokens that ranking left

    def watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep a layer's attention weights, where its implementation gives any."""
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        self.weights = weights[0] if isinstance(weights, Tensor) else None

    def rank(self, layer: int) -> None:
        """Take from the layer what does not enter it."""
        reference = self.reference
        if layer in reference.keys_of:  # where nothing can be dropped: its keys are another layer's
            reference.hidden[layer] |= reference.hidden[reference.keys_of[layer]]
            reference.kept.append(reference.kept[-1])
            return
        kept = self._chosen(reference.chosen[layer]) if reference.chosen is not None else self._best(layer)
        reference.hidden[layer] |= set(self.tokens) - kept
        reference.kept.append(sorted(self.tokens.index(place) for place in kept))

    def _chosen(self, numbers: Sequence[int]) -> set[int]:
        kept = {self.tokens[number] for number in numbers}
        for number, group in enumerate(self.groups):
            gone = set(group) - kept
            if gone and self.weights is not None:
                self._read(len(kept))
                value = self._scores(group)
                worst = min((value[place] for place in group if place in kept and place != self.last), default=None)
                if worst is not None:
                    missed = max(0.0, max(value[place] for place in gone) - worst)
                    # behind a window nobody may see any of them
                    self.reference.misses.append(missed / max(value.values()) if missed else 0.0)
            self.groups[number] = [place for place in group if place in kept]
        return kept

    def _best(self, layer: int) -> set[int]:
        reference = self.reference
        counts = [reference.schedule.counts(size)[layer] for size in self.sizes]
        if sum(counts) < sum(map(len, self.groups)) and self._is_due(sum(counts)):
            self._read(sum(counts))
        for number, (group, size) in enumerate(zip(self.groups, self.sizes, strict=True)):
            count = reference.schedule.counts(size)[layer]
            if count < len(group):
                value = self._scores(group)
                # what the answer is read from stays
                best = sorted(group, key=lambda place: (place != self.last, -value[place], place))[:count]
                self.groups[number] = sorted(best)
        return {place for group in self.groups for place in group}

    def _is_due(self, staying: int) -> bool:
        rerank = self.reference.rerank
        if rerank is True or self.received is None:
            return True
        return rerank is not False and staying / self.stayed < rerank

    def _read(self, staying: int) -> None:
        if self.reference.scores is not None:
            return
        assert self.weights is not None, "no layer before has attention weights to rank by"
        self.received, self.stayed = self.weights[:, self.rows].mean(dim=(0, 1)), staying

    def _scores(self, group: list[int]) -> dict[int, float]:
        fixed = self.reference.scores
        if fixed is not None:
            return {place: fixed[self.tokens.index(place)] for place in group}
        assert self.received is not None
        return {place: float(self.received[place]) for place in group}


def hide(mask: Tensor | None, places: set[int], states: Tensor) -> Tensor:
    """An attention mask (1, heads or 1, seq, seq) in which nobody sees `places` as keys, but each of them itself:
    additive, or bool where the model's own is. A model without one is causal."""
    length, least = states.shape[-2], torch.finfo(states.dtype).min
    if mask is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        mask = torch.zeros(1, 1, length, length, dtype=states.dtype, device=states.device).masked_fill(~seen, least)
    assert mask.ndim == 4
    assert mask.shape[0] == 1
    assert mask.shape[2:] == (length, length)
    mask = mask.clone()
    for place in places:
        own = mask[0, :, place, place].clone()
        mask[0, :, :, place] = least if mask.is_floating_point() else False
        mask[0, :, place, place] = own
    return mask
