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
from transformers import PreTrainedModel

from ..errors import ThinsightError
from .encoding import image_outputs, received_of
from .families import vision_token_mask
from .layout import Layout, build_layout

__all__ = ["Call", "named_arguments", "read_call"]


@dataclass
class Call:
    """One forward pass. A pass without vision tokens (decoding, text) has no layout."""

    seq: int  # new tokens per row
    past: int  # logical columns already in the cache
    layout: Layout | None
    prompt: Tensor | None  # (batch, seq) bool: not padding, not a continuation; with a layout only
    received: Tensor | None  # (batch, tokens) float32: attention inside the vision tower, if it was read
    implementation: str  # attention implementation of the decoder


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind_partial(*args)
    return {**bound.arguments, **kwargs}


def encode_pixels(model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
    """The call with its pixels replaced by the tower's output, so that each image's token count is known."""
    if call.get("pixel_values") is None or (call.get("mm_encoder_outputs") or {}).get("image") is not None:
        return call
    outputs = {**(call.get("mm_encoder_outputs") or {}), "image": image_outputs(model, call)}
    return {**call, "pixel_values": None, "mm_encoder_outputs": outputs}


def read_call(
    model: PreTrainedModel, call: Mapping[str, Any], prompt: Tensor | None, implementation: str
) -> Call:
    """Describe a call.

    Args:
        model: the multimodal model.
        call: its arguments, pixels already encoded.
        prompt: (batch, seq) bool from the user, where a call also holds a continuation; None: everything is
            prompt.
        implementation: attention implementation of the decoder.

    Raises:
        ThinsightError: vision tokens cannot be told from the arguments, or `prompt` has another shape.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    past = _length(call.get("past_key_values"))
    given = ids if ids is not None else embeds
    if given is None:
        return Call(0, past, None, None, None, implementation)  # the model itself says what is missing
    seq = given.shape[1]
    if ids is None and seq > 1:
        raise ThinsightError(
            "inputs_embeds without input_ids does not say where vision tokens are; pass input_ids"
        )
    layout = None if ids is None or seq == 1 else _layout(model, call, ids)
    if ids is None or layout is None:
        return Call(seq, past, None, None, None, implementation)
    if prompt is not None and prompt.shape != ids.shape:
        raise ThinsightError(
            f"prompt mask has shape {tuple(prompt.shape)}; make it {tuple(ids.shape)} like input_ids"
        )
    real = layout.real if prompt is None else layout.real & prompt.to(layout.real.device, torch.bool)
    received = received_of((call.get("mm_encoder_outputs") or {}).get("image"))
    return Call(seq, past, layout, real, _per_row(layout, received), implementation)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _layout(model: PreTrainedModel, call: Mapping[str, Any], ids: Tensor) -> Layout | None:
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -ids.shape[1] :].to(ids.device, torch.bool)
    else:
        real = torch.ones_like(ids, dtype=torch.bool)
    images = (call.get("mm_encoder_outputs") or {}).get("image")
    lengths = None if images is None else [len(feature) for feature in images.pooler_output]
    return build_layout(vision_token_mask(model, ids), real, lengths)


def _per_row(layout: Layout, received: list[Tensor] | None) -> Tensor | None:
    """Attention per image -> (batch, tokens). Beams share the images of their prompt."""
    if not received:
        return None
    images = sum(map(len, layout.sizes))
    copies = images // len(received)
    result = torch.zeros(layout.valid.shape, dtype=torch.float32, device=layout.valid.device)
    first = 0
    for row, sizes in enumerate(layout.sizes):
        mine = received[first : first + len(sizes)]
        if [len(r) for r in mine] != list(sizes):
            raise ThinsightError(
                "vision attention does not fit the prompt's images; encode the images of this prompt"
            )
        if mine:
            values = torch.cat(list(mine)).to(result)
            result[row, : len(values)] = values
        if (row + 1) % copies == 0:
            first += len(sizes)
    return result
