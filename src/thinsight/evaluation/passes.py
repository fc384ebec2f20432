"""The keyword arguments of a forward pass as ``generate()`` would make them, for any model family.

Positions of a prompt (one number per token, or one per axis in the Qwen-VL and GLM families), and what a
family changes on the way (PaliGemma counts from 1, Gemma 3 wants token types in the first pass only).
Knows nothing about drafts, answers or reductions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin

from ..runtime.cache import CACHE
from .encoding import PromptBatch

__all__ = ["pass_inputs", "prompt_positions"]

_POSITIONS = "_prepare_position_ids_for_generation"


def prompt_positions(model: Any, batch: PromptBatch) -> torch.Tensor:
    """Position ids of left-padded prompts, on the model's device: (batch, seq), or (axes, batch, seq)."""
    mask = batch.attention_mask.to(model.device)
    ours = getattr(type(model), _POSITIONS, None)
    if ours is None or ours is getattr(GenerationMixin, _POSITIONS, None):
        return (mask.cumsum(-1) - 1).clamp(min=0)
    given = {**batch.per_token, **batch.per_image, "input_ids": batch.input_ids}
    moved = {name: tensor.to(model.device) for name, tensor in given.items()}
    positions: torch.Tensor = getattr(model, _POSITIONS)(
        moved["input_ids"], {**moved, "attention_mask": mask}
    )
    return positions


def pass_inputs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    token_types: Mapping[str, torch.Tensor],
    cache: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """What the model's ``forward`` takes for new tokens, the first or later ones.

    Args:
        model: a transformers model.
        input_ids: the new tokens, (batch, new).
        attention_mask: (batch, all columns so far and new ones), 1 where a column may be attended to.
        position_ids: of the new tokens, (batch, new) or (axes, batch, new).
        token_types: by name, of the new tokens, (batch, new).
        cache: what earlier passes left; None in the first pass.
        more: further arguments of ``forward``.
    """
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        input_ids,
        # attention without a mask is faster
        attention_mask=None if bool(attention_mask.all()) else attention_mask,
        position_ids=position_ids,
        is_first_iteration=cache is None,
        **{CACHE: cache},
        **token_types,
        **more,
    )
    return prepared
