"""Exact greedy decoding that checks a drafted answer in one forward pass and goes on decoding only where it
differs.

The draft is appended to the prompt (teacher forcing). Causal attention makes the row at each answer position
the same as in step-by-step decoding as long as the tokens before it are the ones greedy decoding would have
chosen; so the answer up to and including the first token that differs from the draft is exactly that of
``generate()``. From there on, decoding continues step by step on the same KV cache, with the rejected
positions masked out.

Knows nothing about reductions, examples or scores: a reduction is in force in the model that it is given, or
not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ThinsightError
from ..runtime import vision_token_mask
from .encoding import PromptBatch

__all__ = ["DecodingRules", "GreedyAnswer", "decode"]

# Settings of a generation config that change greedy answers and are not supported; their neutral values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1, 1.0),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None,),
}


PromptScope = Callable[[torch.Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class DecodingRules:
    """What ends an answer and what shapes it: what greedy decoding takes from a generation config."""

    max_new_tokens: int
    stop_tokens: frozenset[int]
    pad_token: int
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, generation_config: Any, max_new_tokens: int) -> DecodingRules:
        """The rules in a model's generation config (sampling and beams are ignored: decoding is greedy).

        Raises:
            ThinsightError: it has a setting that would change greedy answers and is not supported.
        """
        for name, neutral in _REFUSED.items():
            value = getattr(generation_config, name, None)
            if value not in neutral:
                raise ThinsightError(
                    f"generation_config.{name} is {value!r}, which exact scoring does not support: "
                    f"set model.generation_config.{name} = {neutral[-1]!r}"
                )
        stop = generation_config.eos_token_id
        stop_tokens = frozenset() if stop is None else frozenset([stop] if isinstance(stop, int) else stop)
        pad = generation_config.pad_token_id
        if pad is None:
            pad = min(stop_tokens, default=0)  # padding is masked, so any token will do
        penalty = getattr(generation_config, "repetition_penalty", None)
        return cls(max_new_tokens, stop_tokens, int(pad), 1.0 if penalty is None else float(penalty))

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
    """

    tokens: tuple[int, ...]
    finished: bool
    margin: float


@torch.no_grad()
def decode(
    model: Any,
    batch: PromptBatch,
    vision: dict[str, Any],
    rules: DecodingRules,
    *,
    drafts: Sequence[tuple[int, ...]] | None = None,
    finish: Sequence[bool] | None = None,
    prompt_scope: PromptScope | None = None,
) -> list[GreedyAnswer]:
    """Greedy answers of a batch of prompts.

    Args:
        model: a transformers model, with or without a reduction in force.
        batch: left-padded prompts.
        vision: keyword arguments of the first forward pass that carry the images.
        drafts: one expected answer per row (its stop token included, if it has one); may be empty.
        finish: per row, whether to go on decoding where the answer leaves the draft; True for all when left
            out.

    Returns:
        One ``GreedyAnswer`` per row.
    """
    rows = batch.input_ids.shape[0]
    expected = list(drafts) if drafts is not None else [()] * rows
    wanted = list(finish) if finish is not None else [True] * rows
    forced = [_feedable(model, draft) for draft in expected]
    cut_short = any(len(fed) < len(draft) - 1 for fed, draft in zip(forced, expected, strict=True))
    run = _Run(model, batch, rules)
    run.check(vision, forced, keep_cache=cut_short or any(wanted), prompt_scope=prompt_scope)
    while rows_left := run.open_rows(expected, wanted):
        run.step(rows_left)
    return [
        GreedyAnswer(tuple(tokens), rules.ends(tokens), margin)
        for tokens, margin in zip(run.answers, run.margins, strict=True)
    ]


def _feedable(model: Any, draft: tuple[int, ...]) -> list[int]:
    """The draft's tokens that can be appended to the prompt: the last is only predicted, never read.

    A vision placeholder in an answer would be taken for an image, so the draft ends before one.
    """
    fed = torch.tensor([draft[:-1]], dtype=torch.long)  # (1, draft - 1)
    placeholders = vision_token_mask(model, fed)[0].tolist()
    return fed[0].tolist()[: placeholders.index(True) if True in placeholders else None]


class _Run:
    """The state of one batch while it is decoded; columns are prompt, draft, then one per step."""

    def __init__(self, model: Any, batch: PromptBatch, rules: DecodingRules) -> None:
        device = model.device
        self.model = model
        self.rules = rules
        self.prompt = batch.input_ids.to(device)  # (batch, prompt)
        self.mask = batch.attention_mask.to(
            device
        )  # (batch, columns so far): 1 where a column may be attended to
        self.prompt_lengths = self.mask.sum(-1)  # (batch,)
        self.answers: list[list[int]] = []
        self.margins: list[float] = []
        self.cache: Any = None

    def check(
        self,
        vision: dict[str, Any],
        forced: Sequence[Sequence[int]],
        *,
        keep_cache: bool,
        prompt_scope: PromptScope | None,
    ) -> None:
        """The one forward pass over prompt and draft; each answer is then exact up to its first new token."""
        extra = max(map(len, forced))
        draft = torch.full(
            (len(forced), extra), self.rules.pad_token, device=self.prompt.device
        )  # (batch, extra)
        for row, tokens in enumerate(forced):
            draft[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long, device=draft.device)
        # draft columns all count as real: no earlier row can see them, and an unpadded batch needs no mask
        mask = torch.cat([self.mask, torch.ones_like(draft)], dim=-1)
        is_prompt = torch.arange(mask.shape[1], device=mask.device).expand_as(mask) < self.prompt.shape[1]
        with prompt_scope(is_prompt) if prompt_scope is not None else nullcontext():
            outputs = self.model(
                input_ids=torch.cat([self.prompt, draft], dim=-1),
                attention_mask=_needed(mask),
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=keep_cache,
                logits_to_keep=extra + 1,
                **vision,
            )
        self.cache = outputs.past_key_values if keep_cache else None
        predicted, gaps = self._predict_all(outputs.logits, draft)  # both (batch, extra + 1)
        accepted = torch.zeros_like(draft)
        for row, tokens in enumerate(forced):
            agreed = _shared_length(predicted[row], tokens)
            self.answers.append(predicted[row][: agreed + 1])
            self.margins.append(min(gaps[row][: agreed + 1]))
            accepted[row, :agreed] = 1
        self.mask = torch.cat([self.mask, accepted], dim=-1)

    def open_rows(self, drafts: Sequence[tuple[int, ...]], wanted: Sequence[bool]) -> list[int]:
        """Rows whose answer is not over and is wanted whole, or has not left its draft yet."""
        rows = []
        for row, answer in enumerate(self.answers):
            on_draft = 0 < len(answer) < len(drafts[row]) and drafts[row][: len(answer)] == tuple(answer)
            if (wanted[row] or on_draft) and not self.rules.ends(answer):
                rows.append(row)
        return rows

    def step(self, rows: Sequence[int]) -> None:
        """One more token for the given rows; the others run along and are ignored."""
        last = torch.tensor(
            [[answer[-1]] for answer in self.answers], device=self.prompt.device
        )  # (batch, 1)
        ahead = torch.tensor([len(answer) - 1 for answer in self.answers], device=self.prompt.device)
        self.mask = torch.cat([self.mask, torch.ones_like(last)], dim=-1)
        outputs = self.model(
            input_ids=last,
            attention_mask=_needed(self.mask),
            position_ids=(self.prompt_lengths + ahead)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = outputs.past_key_values
        scores = self._penalized(outputs.logits[:, -1].float(), self.answers)
        chosen, gaps = scores.argmax(-1).tolist(), _lead(scores).tolist()
        for row in rows:
            self.answers[row].append(chosen[row])
            self.margins[row] = min(self.margins[row], gaps[row])

    def _predict_all(
        self, logits: torch.Tensor, draft: torch.Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        """For every answer position, the greedy token given the draft before it, and its lead."""
        # logits: (batch, extra + 1, vocabulary)
        before = draft.tolist()
        tokens, gaps = [], []
        for position in range(logits.shape[1]):
            scores = self._penalized(logits[:, position].float(), [row[:position] for row in before])
            tokens.append(scores.argmax(-1))
            gaps.append(_lead(scores))
        return torch.stack(tokens, dim=-1).tolist(), torch.stack(gaps, dim=-1).tolist()

    def _penalized(self, scores: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """The repetition penalty (CTRL, arXiv 1909.05858) over prompt and answer, as in ``generate()``."""
        if self.rules.repetition_penalty == 1.0:
            return scores
        penalty = self.rules.repetition_penalty
        width = self.prompt.shape[1]
        for row, answer in enumerate(answers):
            start = width - int(self.prompt_lengths[row])
            used = torch.cat([self.prompt[row, start:], self.prompt.new_tensor(list(answer))]).unique()
            old = scores[row, used]
            scores[row, used] = torch.where(old < 0, old * penalty, old / penalty)
        return scores


def _lead(scores: torch.Tensor) -> torch.Tensor:
    """The gap between the best and the second best score: (batch, vocabulary) -> (batch,)."""
    best = scores.topk(2, dim=-1).values  # (batch, 2)
    return best[:, 0] - best[:, 1]


def _needed(mask: torch.Tensor) -> torch.Tensor | None:
    """The mask, or None where it hides nothing: attention without a mask is faster."""
    return None if bool(mask.all()) else mask


def _shared_length(predicted: Sequence[int], tokens: Sequence[int]) -> int:
    for index, token in enumerate(tokens):
        if predicted[index] != token:
            return index
    return len(tokens)
