"""Prompts about the same images: what they begin with is read once, and each goes on from there.

Causal attention computes keys and values of the images before it sees the question, so they are the same for
every question; up to rounding, so is the answer. Holds for the full model only: a reduction ranks vision
tokens by the question. Knows nothing about answers, metrics or reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..runtime import can_share, vision_token_mask
from ..runtime.cache import CACHE
from ..runtime.families import reads_prompt_both_ways
from .decoding import Beginning
from .encoding import Prompt, PromptBatch, pad_batch
from .passes import pass_inputs, prompt_positions

__all__ = ["Siblings", "read_once", "siblings_of"]


@dataclass(frozen=True)
class Siblings:
    """Prompts with the same images and the same first tokens.

    Attributes:
        members: their numbers, at least two.
        shared: how many tokens they begin with alike, all vision tokens among them.
    """

    members: tuple[int, ...]
    shared: int


def siblings_of(model: Any, prompts: Sequence[Prompt], images: Sequence[Hashable]) -> list[Siblings]:
    """The siblings among prompts, those with the longest beginnings last; none where a model cannot share.

    Args:
        model: a supported model.
        prompts: all prompts.
        images: what tells each prompt's images from others.
    """
    if not can_share(model) or reads_prompt_both_ways(model):
        return []
    by_images: dict[Hashable, list[int]] = {}
    for number, key in enumerate(images):
        by_images.setdefault(key, []).append(number)
    found = []
    for members in by_images.values():
        shared = _shared([prompts[number] for number in members])
        first = prompts[members[0]]
        seen = int(vision_token_mask(model, first.input_ids[None, :shared]).sum())
        if len(members) > 1 and seen == first.n_vision:
            found.append(Siblings(tuple(members), shared))
    return sorted(found, key=lambda each: (each.shared, each.members))


def _shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own, for a pass needs one."""
    length = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0].input_ids[:length]
    alike = torch.stack([prompt.input_ids[:length] == first for prompt in prompts]).all(0)
    return int(alike.long().cumprod(0).sum())


@torch.no_grad()
def read_once(
    model: Any,
    prompts: Sequence[Prompt],
    siblings: Sequence[Siblings],
    vision: Callable[[Sequence[int]], dict[str, Any]],
    pad_token: int,
    batch_size: int,
) -> Iterator[tuple[list[int], PromptBatch, Beginning]]:
    """Read what siblings begin with, then hand out its prompts in batches that are read so far.

    Args:
        model: as for `siblings_of`.
        prompts: all prompts.
        siblings: to be read in one pass.
        vision: the keyword arguments that carry the images of some prompts, by number.
        pad_token: fills up shorter rows.
        batch_size: the most prompts in a batch handed out.

    Yields:
        The prompts' numbers, the prompts as one batch, and what was read of it.
    """
    heads = [_cut(prompts[each.members[0]], 0, each.shared) for each in siblings]
    batch = pad_batch(heads, pad_token)
    inputs = pass_inputs(
        model,
        batch.input_ids.to(model.device),
        batch.attention_mask.to(model.device),
        prompt_positions(model, batch),
        token_types={name: types.to(model.device) for name, types in batch.per_token.items()},
        use_cache=True,
        logits_to_keep=1,
        **vision([each.members[0] for each in siblings]),
    )
    cache = model(**inputs)[CACHE]
    rows = [(len(prompts[i]) - f.shared, i, row) for row, f in enumerate(siblings) for i in f.members]
    rows.sort()
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        sources = [row for _, _, row in chosen]
        tails = [_cut(prompts[i], siblings[row].shared, None) for _, i, row in chosen]
        joined = _beside([heads[row] for row in sources], tails, batch.width, pad_token)
        yield [i for _, i, _ in chosen], joined, Beginning(_rows_of(cache, sources), batch.width)


def _cut(prompt: Prompt, start: int, end: int | None) -> Prompt:
    """Some tokens of a prompt; its images stay with the first ones."""
    return Prompt(
        prompt.input_ids[start:end],
        prompt.n_vision if start == 0 else 0,
        {name: types[start:end] for name, types in prompt.per_token.items()},
        prompt.per_image if start == 0 else {},
    )


def _beside(heads: Sequence[Prompt], tails: Sequence[Prompt], width: int, pad_token: int) -> PromptBatch:
    """Heads padded to a width, and tails padded behind them."""
    left, right = pad_batch(heads, pad_token), pad_batch(tails, pad_token)
    pad = width - left.width

    def widened(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (pad, 0), value=value)

    return PromptBatch(
        torch.cat([widened(left.input_ids, pad_token), right.input_ids], 1),
        torch.cat([widened(left.attention_mask, 0), right.attention_mask], 1),
        {
            name: torch.cat([widened(types, 0), right.per_token[name]], 1)
            for name, types in left.per_token.items()
        },
        left.per_image,
    )


def _rows_of(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache of its own for the given rows, repeats allowed."""
    chosen = DynamicCache()
    for number, held in enumerate(cache.layers):
        assert type(held) is DynamicLayer
        index = torch.tensor(rows, device=held.keys.device)
        chosen.update(held.keys[index], held.values[index], number)
    return chosen
