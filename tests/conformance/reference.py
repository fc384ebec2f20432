"""A slow, independent way to run any family under a schedule: whole sequence, no cache, no padding, eager.

The stock model's own forward runs one row at a time, so that embeddings, positions, token types, deepstack,
sliding windows and bidirectional blocks are its own. Nothing is taken out: from a layer on, dropped tokens
are merely hidden from everyone as keys, and the ranking is recomputed from the plain attention weights of the
layer before. Shares no code with the library but `Schedule.counts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thinsight.schedule import Schedule

from .family import Family
from .inputs import Row, answer

ROWS = 16  # of text that rank, evenly spaced, where there are more


class Reference:
    """One prompt, possibly continued by answers and later turns.

    Args:
        family: whose model runs, with eager attention.
        schedule: how many vision tokens of each image enter each layer.
        queries: which rows' attention ranks: "instruction", the turn's tokens after its last vision token, or
            "last", its last token.
        per: what competes for a place: the tokens of an "image", or all of the "prompt".
        scores: fixed scores of the turn's vision tokens, in place of attention.
        rerank: rank anew at every reduction of a turn; a number: where fewer than this share of the tokens
            stay that stayed at the last ranking; False: the first one's scores serve all.
        seed: of the model's weights.
    """

    def __init__(
        self,
        family: Family,
        schedule: Schedule,
        *,
        queries: str = "instruction",
        per: str = "image",
        scores: Sequence[float] | None = None,
        rerank: bool | float = True,
        seed: int = 0,
    ) -> None:
        self.family = family
        self.model = family.model("eager", seed)
        self.layers: list[Any] = list(self.model.get_decoder().layers)
        assert self.model.get_decoder().config._attn_implementation == "eager"
        self.schedule = schedule
        self.queries = queries
        self.per = per
        self.scores = scores
        self.rerank = rerank
        self.row = Row([])
        self.hidden: list[set[int]] = [set() for _ in self.layers]  # per layer, positions that nobody sees
        self.kept: list[list[int]] = []  # per layer, the turn's kept vision tokens, by number in the turn

    def read(self, turn: Row) -> Tensor:
        """Read a prompt or a later turn; the logits of its tokens (seq, vocab)."""
        start = len(self.row.ids)
        self.row = self.row + turn
        self.kept = []
        return self._run(_Ranking(self, turn, start))[start:]

    def answer(self, token: int) -> Tensor:
        """Append one generated token; its logits (vocab,)."""
        self.row = self.row + Row([answer([token])])
        return self._run(None)[-1]

    @torch.no_grad()
    def _run(self, ranking: _Ranking | None) -> Tensor:
        inputs = self.family.batch([self.row]).inputs
        with self._hooks(ranking):
            return self.model(**inputs, use_cache=False).logits[0]

    @contextmanager
    def _hooks(self, ranking: _Ranking | None) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(self._hide(number, ranking), with_kwargs=True))
            if ranking is not None:
                hooks.append(layer.self_attn.register_forward_hook(ranking.watch))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hide(self, number: int, ranking: _Ranking | None) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if ranking is not None:
                ranking.rank(number)
            states = args[0] if args else kwargs["hidden_states"]
            mask = hide(kwargs.get("attention_mask"), self.hidden[number], states)
            return args, {**kwargs, "attention_mask": mask}

        return hook


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
        """Keep a layer's attention weights."""
        self.weights = output[1][0]

    def rank(self, layer: int) -> None:
        """Hide what does not enter this layer."""
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
        kept = {place for group in self.groups for place in group}
        reference.hidden[layer] |= set(self.tokens) - kept
        reference.kept.append(sorted(self.tokens.index(place) for place in kept))

    def _is_due(self, staying: int) -> bool:
        rerank = self.reference.rerank
        if rerank is True or self.received is None:
            return True
        return rerank is not False and staying / self.stayed < rerank

    def _read(self, staying: int) -> None:
        if self.reference.scores is not None:
            return
        assert self.weights is not None, "layer 0 has no layer before it"
        self.received, self.stayed = self.weights[:, self.rows].mean(dim=(0, 1)), staying

    def _scores(self, group: list[int]) -> dict[int, float]:
        fixed = self.reference.scores
        if fixed is not None:
            return {place: fixed[self.tokens.index(place)] for place in group}
        assert self.received is not None
        return {place: float(self.received[place]) for place in group}


def hide(mask: Tensor | None, places: set[int], states: Tensor) -> Tensor:
    """An additive mask (1, 1, seq, seq) in which nobody sees `places` as keys, but each of them itself."""
    length, least = states.shape[1], torch.finfo(states.dtype).min
    if mask is None:
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, length, length, dtype=states.dtype).masked_fill(~seen, least)
    assert mask.shape == (1, 1, length, length)
    assert mask.is_floating_point()
    mask = mask.clone()
    for place in places:
        own = mask[0, 0, place, place].clone()
        mask[0, 0, :, place] = least
        mask[0, 0, place, place] = own
    return mask
