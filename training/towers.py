"""The vision towers' training pass: pixels to projected features, over the weights of the stock models.

Computes what the stock models compute (`tests/training/test_packed.py` holds it to that) with attention
written out, which trains faster on CPUs when compiled. Knows nothing about decoders, questions or losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Block = Callable[[nn.Module, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention: on CPUs, compiled, it trains faster than the fused kernel."""
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return weights.to(v.dtype) @ v


def _self_attention(attention: nn.Module, h: Tensor) -> Tensor:
    """h, normed: (B, T, width) -> (B, T, width), before the output projection."""
    batch, length, width = h.shape
    q, k, v = (
        projection(h).view(batch, length, attention.num_heads, -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return attend(q, k, v, None).transpose(1, 2).reshape(batch, length, width)


def clip_block(layer: nn.Module, x: Tensor) -> Tensor:
    x = x + layer.self_attn.out_proj(_self_attention(layer.self_attn, layer.layer_norm1(x)))
    return x + layer.mlp(layer.layer_norm2(x))


def internvl_block(layer: nn.Module, x: Tensor) -> Tensor:
    h = _self_attention(layer.attention, layer.layernorm_before(x))
    x = x + layer.lambda_1 * layer.attention.projection_layer(h)
    return x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))


def clip_tower(model: PreTrainedModel, pixels: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Projected features (B, 256, width) and the CLS row (B, vision width)."""
    tower = model.model.vision_tower
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    cls = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
    x = torch.cat((cls.to(patches.dtype), patches), 1) + tower.embeddings.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers:
        x = block(layer, x)
    return model.model.multi_modal_projector(x[:, 1:]), x[:, 0]


def internvl_tower(model: PreTrainedModel, pixels: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Projected features (B, 64, width), pixel-shuffled, and the CLS row (B, vision width)."""
    tower = model.model.vision_tower
    patches = tower.embeddings.patch_embeddings(pixels)
    cls = tower.embeddings.cls_token.expand(len(pixels), 1, -1)
    x = torch.cat((cls.to(patches.dtype), patches), 1) + tower.embeddings.position_embeddings
    for layer in tower.encoder.layer:
        x = block(layer, x)
    return model.model.multi_modal_projector(_shuffle(x[:, 1:], model.config.downsample_ratio)), x[:, 0]


def _shuffle(x: Tensor, ratio: float) -> Tensor:
    """Neighbouring patches side by side in one token. x: (B, P, width) -> (B, P * r^2, width / r^2)."""
    batch, patches, width = x.shape
    side = round(1 / ratio)
    grid = int(patches**0.5) // side
    tokens = x.view(batch, grid, side, grid, side, width).transpose(2, 3)
    return tokens.reshape(batch, grid**2, side**2 * width)


TOWERS = {"llava": (clip_tower, clip_block), "internvl": (internvl_tower, internvl_block)}
