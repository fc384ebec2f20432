"""Exact greedy decoding that checks a drafted answer in one forward pass and goes on only where it differs.

The draft is appended to the prompt (teacher forcing). Causal attention makes the row at each answer position the same
as in step-by-step decoding as long as the tokens before it are those that greedy decoding would have chosen; so the
answer up to and including the first token that differs from the draft is exactly that of ``generate()``. From there on,
decoding goes on step by step on the same KV cache, the rejected positions masked out. A sliding window counts their
columns too, so where it is shorter than the row the prompt and the exact answer so far are read anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..cost import windows_of
from ..errors import Unsupported
from ..runtime import vision_token_mask
from ..runtime.anatomy import decoder, num_layers, reads_prompt_both_ways, sliding_layers, state_layers
from ..runtime.cache import CACHE
from .prompts import PromptBatch, pass_inputs, prompt_positions

# Settings of a generation config that change greedy answers and are not supported, by their neutral values.
_NEUTRAL: tuple[tuple[tuple[Any, ...], tuple[str, ...]], ...] = (
    ((None, 0), ("no_repeat_ngram_size", "min_length", "min_new_tokens", "encoder_no_repeat_ngram_size")),
    ((None,), ("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings")),
    ((None,), ("exponential_decay_length_penalty", "watermarking_config", "penalty_alpha")),
    ((None,), ("dola_layers", "force_words_ids")),
    ((None, 1, 1.0), ("guidance_scale", "encoder_repetition_penalty")),
    ((None, []), ("begin_suppress_tokens", "constraints")),
    ((None, False), ("token_healing",)),
)
_REFUSED = {name: neutral for neutral, names in _NEUTRAL for name in names}

PromptScope = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class DecodingRules:
    """What ends an answer and what shapes it: what greedy decoding takes from a generation config."""

    max_new_tokens: int
    stop_tokens: frozenset[int]
    pad_token: int
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()  # tokens that are never chosen

    @classmethod
    def of(cls, generation_config: Any, max_new_tokens: int) -> DecodingRules:
        """The rules in a model's generation config, where sampling and beams are ignored: decoding is greedy. A
        setting that would change greedy answers and is not supported is refused."""
        for name, neutral in _REFUSED.items():
            value = getattr(generation_config, name, None)
            if value not in neutral:
                raise Unsupported(
                    f"generation_config.{name} is {value!r}, which exact scoring does not support: "
                    f"set model.generation_config.{name} = {neutral[-1]!r}"
                )
        stop = generation_config.eos_token_id
        stop_tokens = frozenset() if stop is None else frozenset([stop] if isinstance(stop, int) else stop)
        pad = generation_config.pad_token_id
        if pad is None:
            pad = min(stop_tokens, default=0)  # padding is masked, so any token will do
        penalty = getattr(generation_config, "repetition_penalty", None)
        suppressed = tuple(getattr(generation_config, "suppress_tokens", None) or ())
        return cls(max_new_tokens, stop_tokens, int(pad), 1.0 if penalty is None else float(penalty), suppressed)

    def to_dict(self) -> dict[str, Any]:
        """All of them as JSON values: answers under other rules may differ."""
        return {**asdict(self), "stop_tokens": sorted(self.stop_tokens)}

    def cut(self, tokens: Sequence[int], stop: int | None) -> tuple[int, ...]:
        """Tokens and a stop token as one answer: over at the first token that ends it, and no longer than allowed."""
        whole = [*tokens, *([] if stop is None else [stop])][: self.max_new_tokens]
        ends = (place + 1 for place, token in enumerate(whole) if token in self.stop_tokens)
        return tuple(whole[: next(ends, None)])

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether an answer is over after these tokens."""
        return len(tokens) >= self.max_new_tokens or (len(tokens) > 0 and tokens[-1] in self.stop_tokens)


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer's token ids, the stop token included.

    Attributes:
        tokens: the whole answer, or, if not ``finished``, its exact beginning: what it shares with the draft
            and the first token that differs.
        finished: whether ``tokens`` is the whole answer.
        margin: the smallest gap between the best and the second best logit over ``tokens``.
        log_likelihood: natural logarithm of the probability that the model gives to the draft, each token
            after the draft's own before it; to ``tokens`` where there was no draft or it was a guess.
    """

    tokens: tuple[int, ...]
    finished: bool
    margin: float
    log_likelihood: float


@dataclass(frozen=True)
class Beginning:
    """The first columns of a batch of prompts, read before: keys and values of as many rows."""

    cache: Cache
    columns: int


@torch.no_grad()
def decode(
    model: Any,
    batch: PromptBatch,
    vision: dict[str, Any],
    rules: DecodingRules,
    *,
    drafts: Sequence[tuple[int, ...]] | None = None,
    guessed: bool = False,
    finish: Sequence[bool] | None = None,
    lost: Callable[[int, Sequence[int]], bool] | None = None,
    prompt_scope: PromptScope | None = None,
    beginning: Beginning | None = None,
) -> list[GreedyAnswer]:
    """Greedy answers of a batch of prompts, one per row.

    Args:
        model: a transformers model, with or without a reduction in force.
        batch: left-padded prompts; where a beginning was read, what follows it is left-padded too.
        vision: keyword arguments of the first forward pass that carry the images.
        drafts: one expected answer per row (its stop token included, if it has one); may be empty.
        guessed: the drafts are only to save steps; the likelihoods are those of the answers.
        finish: per row, whether to go on decoding where the answer leaves the draft; True for all when left
            out.
        lost: asked with a row's number and its answer so far: whether the rest is of no use.
        prompt_scope: is told which tokens of a first pass are the prompt.
        beginning: columns that need not be read any more; its cache is filled on.
    """
    rows = batch.input_ids.shape[0]
    expected = list(drafts) if drafts is not None else [()] * rows
    wanted = list(finish) if finish is not None else [True] * rows
    forced = []  # what of the drafts is appended to the prompts: the last token is only predicted, never read
    for draft in expected:
        fed = torch.tensor([draft[:-1]], dtype=torch.long)  # (1, draft - 1)
        # a vision placeholder in an answer would be taken for an image, so the draft ends before one
        placeholders = vision_token_mask(model, fed)[0].tolist()
        forced.append(fed[0].tolist()[: placeholders.index(True) if True in placeholders else None])
    cut_short = any(len(fed) < len(draft) - 1 for fed, draft in zip(forced, expected, strict=True))
    run = _Run(model, batch, rules, vision, prompt_scope)
    run.check(forced, None if guessed else expected, cut_short or any(wanted), beginning)
    while rows_left := run.open_rows(expected, wanted, lost):
        run.step(rows_left)
    return [
        GreedyAnswer(tuple(tokens), rules.ends(tokens), margin, likelihood)
        for tokens, margin, likelihood in zip(run.answers, run.margins, run.likelihoods, strict=True)
    ]


@dataclass(frozen=True)
class _Columns:
    """The tokens of a first forward pass."""

    ids: Tensor  # (batch, columns)
    mask: Tensor  # (batch, columns): 1 where one may be attended to
    positions: Tensor  # (batch, columns) or (axes, batch, columns)
    types: dict[str, Tensor]  # (batch, columns)
    is_prompt: Tensor  # (batch, columns) bool

    def mapped(self, change: Callable[[Tensor], Tensor], mask: Tensor) -> _Columns:
        """With all but the mask changed."""
        types = {name: change(each) for name, each in self.types.items()}
        return _Columns(change(self.ids), mask, change(self.positions), types, change(self.is_prompt))

    def without_gaps(self) -> _Columns:
        """The same tokens with all that is not attended to on the left, and no more of it than needed."""
        width = int(self.mask.sum(-1).max())
        order = self.mask.argsort(dim=-1, stable=True)[:, -width:]  # (batch, width)

        def ordered(tensor: Tensor) -> Tensor:
            return tensor.gather(-1, order.expand(*tensor.shape[:-1], width))

        return self.mapped(ordered, ordered(self.mask))


class _Run:
    """The state of one batch while it is decoded; columns are prompt, draft, then one per step."""

    def __init__(
        self,
        model: Any,
        batch: PromptBatch,
        rules: DecodingRules,
        vision: dict[str, Any],
        prompt_scope: PromptScope | None,
    ) -> None:
        batch = batch.to(model)
        self.model = model
        self.rules = rules
        self.vision = vision
        self.scope = prompt_scope or (lambda is_prompt: nullcontext())
        self.prompt = batch.input_ids  # (batch, prompt)
        self.mask = batch.attention_mask  # (batch, columns so far): 1 where one may be attended to
        self.prompt_mask = self.mask.bool()  # (batch, prompt)
        self.positions = prompt_positions(model, batch)  # (batch, prompt) or (axes, batch, prompt)
        self.last_position = self.positions[..., -1:]  # all prompts end in the last column
        self.types = batch.per_token  # (batch, prompt)
        self.exact: _Columns | None = None  # to be read anew before the next step
        self.answers: list[list[int]] = []
        self.margins: list[float] = []
        self.likelihoods: list[float] = []
        self.rated = False  # whether likelihoods are those of drafts
        self.cache: Any = None

    def check(
        self,
        forced: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]] | None,
        keep_cache: bool,
        beginning: Beginning | None,
    ) -> None:
        """The one forward pass over prompt and draft; each answer is then exact up to its first new token. ``drafts``:
        those whose likelihoods are asked for, if any."""
        # 1) The draft behind the prompt. Its columns all count as real: no earlier row can see them, and an
        # unpadded batch needs no mask.
        extra = max(map(len, forced))
        draft = self.prompt.new_full((len(forced), extra), self.rules.pad_token)  # (batch, extra)
        for row, tokens in enumerate(forced):
            draft[row, : len(tokens)] = draft.new_tensor(list(tokens))
        ahead = torch.arange(1, extra + 1, device=draft.device)
        columns = _Columns(
            ids=torch.cat([self.prompt, draft], dim=-1),
            mask=torch.cat([self.mask, torch.ones_like(draft)], dim=-1),
            positions=torch.cat([self.positions, self.last_position + ahead], dim=-1),
            types={name: torch.cat([t, self._type_of(name, draft)], -1) for name, t in self.types.items()},
            is_prompt=torch.cat([torch.ones_like(self.mask), torch.zeros_like(draft)], dim=-1).bool(),
        )
        # 2) The pass, behind what was read before.
        rest, cache = columns, None
        if beginning is not None:
            cache = beginning.cache
            rest = columns.mapped(lambda each: each[..., beginning.columns :], columns.mask)
        outputs = self._read(rest, cache=cache, use_cache=keep_cache, logits_to_keep=extra + 1)
        self.cache = outputs[CACHE] if keep_cache else None
        # 3) Each answer agrees with its draft up to some token, and goes on with one of its own.
        self.rated = drafts is not None and any(drafts)
        rated = drafts if drafts is not None else [()] * len(forced)
        logits = outputs.logits[:, -extra - 1 :]  # not every model gives only what it is asked for
        predicted, gaps, likely = self._predict_all(logits, draft, rated)  # (batch, extra + 1)
        accepted = torch.zeros_like(draft)
        for row, tokens in enumerate(forced):
            differing = (place for place, token in enumerate(tokens) if predicted[row][place] != token)
            agreed = next(differing, len(tokens))
            self.answers.append(predicted[row][: agreed + 1])
            self.margins.append(min(gaps[row][: agreed + 1]))
            self.likelihoods.append(math.fsum(likely[row][: (len(tokens) if self.rated else agreed) + 1]))
            accepted[row, :agreed] = 1
        # 4) Rejected columns are masked; a sliding window would still lose tokens to them, and a state has taken
        # them in.
        self.mask = torch.cat([self.mask, accepted], dim=-1)
        windows, states = sliding_layers(self.model), state_layers(self.model)
        if not bool(accepted.all()) and (windows or states):
            found = windows_of(decoder(self.model).config, num_layers(self.model)).values()
            if states or self.mask.shape[1] + self.rules.max_new_tokens > min(found):
                self.exact = replace(columns, mask=self.mask).without_gaps()

    def _read(self, columns: _Columns, **more: Any) -> Any:
        """A first forward pass."""
        with self.scope(columns.is_prompt):
            ids, mask, positions = columns.ids, columns.mask, columns.positions
            inputs = pass_inputs(self.model, ids, mask, positions, token_types=columns.types, **self.vision, **more)
            return self.model(**inputs)

    def _type_of(self, name: str, draft: Tensor) -> Tensor:
        """Token types of an answer: ordinary text that sees nothing behind itself."""
        causal = reads_prompt_both_ways(self.model) and name == "token_type_ids"
        return torch.full_like(draft, int(causal))

    def open_rows(
        self,
        drafts: Sequence[tuple[int, ...]],
        wanted: Sequence[bool],
        lost: Callable[[int, Sequence[int]], bool] | None,
    ) -> list[int]:
        """Rows whose answer is not over and is wanted whole, or has not left its draft yet."""
        rows = []
        for row, answer in enumerate(self.answers):
            on_draft = 0 < len(answer) < len(drafts[row]) and drafts[row][: len(answer)] == tuple(answer)
            needed = on_draft or (wanted[row] and not (lost is not None and lost(row, answer)))
            if needed and not self.rules.ends(answer):
                rows.append(row)
        return rows

    def step(self, rows: Sequence[int]) -> None:
        """One more token for the given rows; the others run along and are ignored."""
        if self.exact is not None:
            self.cache = self._read(self.exact, use_cache=True, logits_to_keep=1)[CACHE]
            self.mask, self.exact = self.exact.mask, None
        last = self.prompt.new_tensor([[answer[-1]] for answer in self.answers])  # (batch, 1)
        ahead = self.prompt.new_tensor([[len(answer)] for answer in self.answers])  # (batch, 1)
        self.mask = torch.cat([self.mask, torch.ones_like(last)], dim=-1)
        inputs = pass_inputs(
            self.model,
            last,
            self.mask,
            self.last_position + ahead,
            token_types={name: self._type_of(name, last) for name in self.types},
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        outputs = self.model(**inputs)
        self.cache = outputs[CACHE]
        scores = self._adjusted(outputs.logits[:, -1].float(), self.answers)
        chosen, gaps = scores.argmax(-1).tolist(), _lead(scores).tolist()
        likely = scores.log_softmax(-1).amax(-1).tolist()
        for row in rows:
            self.answers[row].append(chosen[row])
            self.margins[row] = min(self.margins[row], gaps[row])
            if not self.rated:
                self.likelihoods[row] += likely[row]

    def _predict_all(
        self, logits: Tensor, draft: Tensor, rated: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """For every answer position of logits (batch, extra + 1, vocabulary), the greedy token given the draft before
        it, its lead, and the log-probability of the token that is rated there (of the greedy one where none is)."""
        before = draft.tolist()
        tokens, gaps, likely = [], [], []
        for position in range(logits.shape[1]):
            scores = self._adjusted(logits[:, position].float(), [row[:position] for row in before])
            tokens.append(scores.argmax(-1))
            gaps.append(_lead(scores))
            wanted = [row[position] if position < len(row) else -1 for row in rated]
            here = torch.where(draft.new_tensor(wanted) < 0, tokens[-1], draft.new_tensor(wanted))
            likely.append(scores.log_softmax(-1).gather(-1, here[:, None])[:, 0])
        return tuple(torch.stack(each, dim=-1).tolist() for each in (tokens, gaps, likely))

    def _adjusted(self, scores: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Logits as ``generate()`` adjusts them: the repetition penalty (CTRL, arXiv 1909.05858) over prompt
        and answer, and suppressed tokens."""
        penalty = self.rules.repetition_penalty
        for row, answer in enumerate(answers if penalty != 1.0 else ()):
            read = self.prompt[row, self.prompt_mask[row]]
            used = torch.cat([read, self.prompt.new_tensor(list(answer))]).unique()
            old = scores[row, used]
            scores[row, used] = torch.where(old < 0, old * penalty, old / penalty)
        scores[:, list(self.rules.suppressed)] = -torch.inf
        return scores


def _lead(scores: Tensor) -> Tensor:
    """The gap between the best and the second best score: (batch, vocabulary) -> (batch,)."""
    best = scores.topk(2, dim=-1).values  # (batch, 2)
    return best[:, 0] - best[:, 1]
