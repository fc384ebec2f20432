"""Reads one call of a multimodal model: what of its input is vision, what is padding, what is prompt.

Knows nothing about schedules, or about what is done with the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from ..errors import ThinsightError
from .encoding import received_of, vision_outputs
from .families import MODALITIES, tiles_stand_apart, vision_placeholders
from .layout import Layout, Vision, build_layout

__all__ = ["Call", "Said", "encode_pixels", "named_arguments", "read_call"]


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
    past = _length(call.get("past_key_values"))
    real = _real(call.get("attention_mask"), batch, seq, past, given.device)
    layout = build_layout(_vision(model, call, ids, said, real), real, tiles_stand_apart(model))
    if layout is None:
        return None
    prompt = real if said.prompt is None else real & _rows(said.prompt, real, "prompt").bool()
    if said.prompt is None and said.candidates:
        prompt = prompt & (torch.arange(seq, device=real.device) < seq - said.candidates)
    outputs = call.get("mm_encoder_outputs") or {}
    return Call(seq, past, layout, prompt, _per_row(layout, received_of(outputs.get("image"))))


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
            raise ThinsightError(
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
        raise ThinsightError(
            f"{name} mask has shape {tuple(mask.shape)}; make it {tuple(real.shape)} like the inputs"
        )
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
            raise ThinsightError(
                "vision attention does not fit the prompt's images; encode the images of this prompt, or "
                "rank by text-attention"
            )
        result[row, :count] = values[first : first + count]
        if (row + 1) % copies == 0:
            first += count
    return result
