"""Where a multimodal model's parts are: decoder layers, attention modules, vision tower, vision positions.

The only place that knows how model families differ. Knows nothing about schedules, rankers or hooks.

To add a family whose parts are found by the rules below, add its `model_type` to `SUPPORTED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ThinsightError

__all__ = [
    "SUPPORTED",
    "VisionSource",
    "attention_implementation",
    "attention_of",
    "base_model",
    "check_recomputation",
    "check_supported",
    "decoder_layers",
    "num_layers",
    "vision_source",
    "vision_token_mask",
]

SUPPORTED = ("llava",)
"""`config.model_type` of the families that are tested."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class VisionSource:
    """Where the vision tower's attention is read, for rankers that need it."""

    tower: nn.Module
    attention: nn.Module  # of the tower's layer whose output the projector reads
    has_class_token: bool  # row 0 is a CLS token
    drops_first: bool  # the projector does not see row 0


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The multimodal model without its language-model head: what every forward pass goes through."""
    return model.base_model


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text model."""
    return model.get_decoder()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, layer 0 first."""
    return list(decoder(model).layers)


def num_layers(model: PreTrainedModel) -> int:
    """L, the number of decoder layers."""
    return len(decoder_layers(model))


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of a transformer layer."""
    for name in ("self_attn", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ThinsightError(
        f"layer {type(layer).__name__} has no self-attention that thinsight knows; use another model"
    )


def attention_implementation(model: PreTrainedModel) -> str:
    """Which attention the decoder runs: "sdpa", "eager", ..."""
    return str(decoder(model).config._attn_implementation)


def vision_token_mask(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Which positions of a prompt are vision tokens: (batch, seq) int64 -> (batch, seq) bool."""
    return input_ids == model.config.image_token_id


def vision_source(model: PreTrainedModel) -> VisionSource:
    """Where to read attention inside the vision tower.

    Raises:
        ThinsightError: the projector reads the tower's embeddings, which no attention made.
    """
    config: Any = model.config
    tower = base_model(model).vision_tower
    depth = tower.config.num_hidden_layers
    layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    selected = config.vision_feature_layer
    deepest = max(i % (depth + 1) for i in (selected if isinstance(selected, (list, tuple)) else [selected]))
    if deepest == 0:
        raise ThinsightError(
            "vision_feature_layer is the tower's input, which has no attention; rank by text-attention"
        )
    return VisionSource(
        tower=tower,
        attention=attention_of(layers[deepest - 1]),  # hidden state i is the output of layer i - 1
        has_class_token=any(hasattr(m, "class_embedding") for m in tower.modules()),
        drops_first=config.vision_feature_select_strategy == "default",
    )


def check_supported(model: Any) -> None:
    """Refuse a model that cannot run under a reduction.

    Raises:
        ThinsightError: with the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ThinsightError(f"model is a {type(model).__name__}; pass a loaded transformers model")
    model_type = getattr(model.config, "model_type", None)
    if model_type not in SUPPORTED:
        raise ThinsightError(
            f"model_type is {model_type!r} ({type(model).__name__}); supported so far: {', '.join(SUPPORTED)}"
        )
    implementation = attention_implementation(model)
    if implementation not in ATTENTION:
        raise ThinsightError(
            f"attn_implementation is {implementation!r}; load the model with one of {', '.join(ATTENTION)}"
        )
    if not all(isinstance(layer, nn.Module) for layer in decoder_layers(model)):
        raise ThinsightError(
            f"{type(model).__name__} has no decoder layers to reduce; pass a decoder-only model"
        )


def model_device(model: PreTrainedModel) -> torch.device:
    """The device that holds the decoder's first weights."""
    return next(decoder(model).parameters()).device


def check_recomputation(model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing where the backward pass would run the hooks a second time.

    Raises:
        ThinsightError: transformers before 5.23, which checkpoints a layer together with its hooks.
    """
    last = decoder_layers(model)[-1]
    recomputes = last.training and getattr(last, "gradient_checkpointing", False)
    if recomputes and "__call__" in vars(GradientCheckpointingLayer):
        raise ThinsightError(
            "gradient checkpointing under a reduction needs transformers 5.23 or later; upgrade it, or call "
            "model.gradient_checkpointing_disable()"
        )
