"""Reads one call of a multimodal model: what of its input is vision, what is padding, what is prompt.

Knows nothing about schedules, or about what is done with the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..errors import BadInput, Unsupported
from .anatomy import MODALITIES, tiles_stand_apart, vision_placeholders
from .cache import cache_of
from .encoding import received_of, vision_outputs
from .layout import Layout, Vision, build_layout


@dataclass(frozen=True)
class Said:
    """What the caller says of the inputs beyond what is in them."""

    prompt: Tensor | None = None  # (batch, seq) bool: False at a continuation of the prompt
    vision: Tensor | None = None  # (batch, seq) bool or int64: vision positions of `inputs_embeds`
    candidates: int = 0  # last columns that an assistant proposed


@dataclass(frozen=True)
class Call:
    """One forward pass whose new tokens hold vision tokens."""

    seq: int  # new tokens per row
    past: int  # logical columns already in the cache
    layout: Layout
    prompt: Tensor  # (batch, seq) bool: not padding, not a continuation
    received: Tensor | None  # (batch, tokens) float32: attention inside the vision tower, if it was read


@dataclass(frozen=True)
class Plan:
    """All that a pass needs to know of its inputs: with it, the pass asks the device for nothing.

    Attributes:
        call: what was read.
        queries: logical columns (batch, queries) int64 of the text that ranks and which of them are real
            (batch, queries) bool; None where none does.
        last: (batch, tokens) bool, the vision tokens in which prompts end; None where none does.
        ends: per row, the group of that token, -1 where there is none; None as `last` is.
        quota: (stages, batch, groups) int64, how many tokens each group may keep; None where the pass itself
            decides it.
    """

    call: Call
    queries: tuple[Tensor, Tensor] | None
    last: Tensor | None
    ends: tuple[int, ...] | None
    quota: Tensor | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What passes must have in common for one to run on the other's tensors: all that is on the host."""
        layout = self.call.layout
        absent = tuple(each is None for each in (self.queries, self.last, self.quota, self.call.received))
        shapes = (tuple(tensor.shape) for tensor in self.tensors())
        return (self.call.seq, self.call.past, layout.sizes, layout.text, self.ends, absent, *shapes)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of `mapped`."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(take)
        return found

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Plan:
        """With every tensor changed, always in the same order."""

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        layout = self.call.layout
        names = ("real", "column", "valid", "image", "index", "size")
        layout = replace(layout, **{name: change(getattr(layout, name)) for name in names})
        call = replace(self.call, layout=layout, prompt=change(self.call.prompt), received=optional(self.call.received))
        queries = None if self.queries is None else (change(self.queries[0]), change(self.queries[1]))
        return Plan(call, queries, optional(self.last), self.ends, optional(self.quota))

    @property
    def padded(self) -> bool:
        """Whether any row has padding."""
        layout = self.call.layout
        rows = zip(layout.text, layout.sizes, strict=True)
        return any(text + sum(sizes) < self.call.seq for text, sizes in rows)

    def bucketed(self, seq: int, multiple: int) -> Plan:
        """The plan of the same prompts with columns behind them up to `seq`, of a shape that few things set.

        All that is not vision counts as text, padding and the new columns included, so that how many columns
        a layer gets does not hang on it; they neither rank nor, by the mask, are seen by the prompt. More
        than one query column becomes a multiple of `multiple`.
        """
        layout, more = self.call.layout, seq - self.call.seq
        layout = replace(
            layout,
            real=layout.real.new_ones(layout.real.shape[0], seq),
            text=tuple(seq - sum(sizes) for sizes in layout.sizes),
        )
        call = replace(self.call, seq=seq, layout=layout, prompt=pad(self.call.prompt, (0, more)))
        queries = self.queries
        if queries is not None and queries[0].shape[1] > 1:
            unread = -queries[0].shape[1] % multiple
            queries = (pad(queries[0], (0, unread)), pad(queries[1], (0, unread)))
        return replace(self, call=call, queries=queries)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind_partial(*args)
    return {**bound.arguments, **kwargs}


def encode_pixels(model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
    """The call with its pixels replaced by the tower's output, so that each image's token count is known."""
    outputs = dict(call.get("mm_encoder_outputs") or {})
    pixels = {
        modality: name
        for modality, name in MODALITIES.items()
        if call.get(name) is not None and outputs.get(modality) is None
    }
    if not pixels:
        return call
    outputs.update({modality: vision_outputs(model, call, modality) for modality in pixels})
    return {**call, **dict.fromkeys(pixels.values()), "mm_encoder_outputs": outputs}


def read_call(model: PreTrainedModel, call: Mapping[str, Any], said: Said | None = None) -> Call | None:
    """Describe a call; None when there is no vision token in it (decoding, text).

    Args:
        model: the multimodal model.
        call: its arguments, pixels already encoded.
        said: what the caller says of them.

    Raises:
        ThinsightError: vision tokens cannot be told from the arguments, or a mask has another shape.
    """
    said = said or Said()
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    given = ids if ids is not None else embeds
    if given is None or given.shape[1] == 1:
        return None  # without any input, the model itself says what is missing
    batch, seq = given.shape[:2]
    past = _length(cache_of(call))
    real = _real(call.get("attention_mask"), batch, seq, past, given.device)
    layout = build_layout(_vision(model, call, ids, said, real), real, tiles_stand_apart(model))
    if layout is None:
        return None
    prompt = real if said.prompt is None else real & _rows(said.prompt, real, "prompt").bool()
    if said.prompt is None and said.candidates:
        prompt = prompt & (torch.arange(seq, device=real.device) < seq - said.candidates)
    outputs = call.get("mm_encoder_outputs") or {}
    return Call(seq, past, layout, prompt, _per_row(layout, received_of(outputs.get("image"))))


def same_shape(plan: Plan, call: Mapping[str, Any]) -> bool:
    """Whether a call is one that a plan describes; False for one new token per row, which no plan does.

    Raises:
        ThinsightError: its new tokens are not as many as the plan's, or stand behind a cache of other length.
    """
    given = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    if given is None or given.shape[1] == 1:
        return False
    wanted = (plan.call.prompt.shape[0], plan.call.seq, plan.call.past)
    found = (*given.shape[:2], _length(cache_of(call)))
    if found != wanted:
        raise BadInput(
            f"the plan is for {wanted[0]} rows of {wanted[1]} tokens behind {wanted[2]} cached ones, but the "
            f"pass has {found[0]} rows of {found[1]} behind {found[2]}; make a plan of these inputs"
        )
    return True


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _real(mask: Any, batch: int, seq: int, past: int, device: torch.device) -> Tensor:
    """(batch, seq) bool: not padding. `generate` hands over finished masks where the cache is static."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if isinstance(mask, BlockMask):
        rows = torch.arange(batch, device=device)[:, None]
        keys = torch.arange(past, past + seq, device=device)[None]
        return mask.mask_mod(rows, rows * 0, torch.full_like(keys, seq - 1), keys).expand(batch, seq)
    if not isinstance(mask, Tensor):
        return torch.ones((batch, seq), dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -seq:].to(device, torch.bool)
    seen = mask[:, 0, :, past : past + seq].to(device)
    if seen.is_floating_point():
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen.any(1).expand(batch, -1)


def _vision(
    model: PreTrainedModel, call: Mapping[str, Any], ids: Tensor | None, said: Said, real: Tensor
) -> list[Vision]:
    if ids is None:
        if said.vision is None:
            raise BadInput(
                "inputs_embeds without input_ids does not say where vision tokens are; pass input_ids, or "
                "say it: `with handle.vision(mask):`, mask (batch, seq) bool"
            )
        return [_by_hand(said.vision, real)]
    masks = vision_placeholders(model, ids)
    outputs = call.get("mm_encoder_outputs") or {}
    found = {name: [len(f) for f in output.pooler_output] for name, output in outputs.items() if output}
    if set(masks) == {"image"} and "video" in found:  # both stand behind one placeholder
        found = {} if "image" in found else {"image": found["video"]}
    return [Vision(mask, found.get(name)) for name, mask in masks.items()]


def _by_hand(mask: Tensor, real: Tensor) -> Vision:
    """Vision tokens that the caller pointed out: a bool mask, or the number of each token's image."""
    rows = _rows(mask, real, "vision")
    if rows.dtype == torch.bool:
        return Vision(rows)
    counts = [row[row > 0].unique(return_counts=True)[1].tolist() for row in rows]
    return Vision(rows > 0, [count for row in counts for count in row])


def _rows(mask: Tensor, real: Tensor, name: str) -> Tensor:
    """A mask over prompts as a mask over rows: the beams of a prompt follow each other."""
    copies = real.shape[0] // max(1, mask.shape[0])
    if mask.ndim != 2 or (mask.shape[0] * copies, mask.shape[1]) != tuple(real.shape):
        raise BadInput(f"{name} mask has shape {tuple(mask.shape)}; make it {tuple(real.shape)} like the inputs")
    return mask.to(real.device).repeat_interleave(copies, dim=0)


def _per_row(layout: Layout, received: list[Tensor] | None) -> Tensor | None:
    """Attention per image -> (batch, tokens). Beams share the images of their prompt."""
    if not received:
        return None
    wanted = sum(map(sum, layout.sizes))
    have = sum(map(len, received))
    copies = wanted // max(1, have)
    result = torch.zeros(layout.valid.shape, dtype=torch.float32, device=layout.valid.device)
    values, first = torch.cat(list(received)).to(result), 0
    for row, sizes in enumerate(layout.sizes):
        count = sum(sizes)
        if have * copies != wanted or first + count > have:
            raise Unsupported(
                "vision attention does not fit the prompt's images; encode the images of this prompt, or "
                "rank by text-attention"
            )
        result[row, :count] = values[first : first + count]
        if (row + 1) % copies == 0:
            first += count
    return result
