"""What an original InternVL checkpoint computes, written down anew from its published modelling code.

Plain functions over the original names and shapes, in eager float32, without a cache and without padding: the
judge of the converted model. Facts from github.com/OpenGVLab/InternVL, internvl_chat/internvl/model
(modeling_intern_vit.py, modeling_internvl_chat.py, modeling_internlm2.py, phi3/modeling_phi3.py), and from
transformers 4.37 for Llama and Qwen2. Knows nothing about the converter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def original_logits(
    weights: Weights, config: dict[str, Any], input_ids: Tensor, pixel_values: Tensor | None, image_id: int
) -> Tensor:
    """Logits of one prompt: ids (seq,), tiles (tiles, 3, size, size) -> (seq, vocabulary)."""
    embedded = F.embedding(input_ids, _input_embeddings(weights))
    if pixel_values is not None:
        embedded[input_ids == image_id] = image_features(weights, config, pixel_values).flatten(0, 1)
    text = {"InternLM2ForCausalLM": _internlm2, "Phi3ForCausalLM": _phi3}
    llm = config["llm_config"]
    return text.get(llm["architectures"][0], _llama)(weights, llm, embedded)


def image_features(weights: Weights, config: dict[str, Any], pixel_values: Tensor) -> Tensor:
    """(tiles, 3, size, size) -> (tiles, vision tokens, text width)."""
    states = _intern_vit(weights, config["vision_config"], pixel_values)
    patches = states[config["select_layer"]][:, 1:]
    tiles, count, width = patches.shape
    side = math.isqrt(count)
    grid = patches.reshape(tiles, side, side, width)
    corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    merged = torch.cat(corners, dim=-1).reshape(tiles, count // 4, 4 * width)
    normed = F.layer_norm(merged, (4 * width,), weights["mlp1.0.weight"], weights["mlp1.0.bias"], 1e-5)
    hidden = F.gelu(_linear(weights, "mlp1.1", normed))
    return _linear(weights, "mlp1.3", hidden)


def _input_embeddings(weights: Weights) -> Tensor:
    names = ("language_model.model.embed_tokens.weight", "language_model.model.tok_embeddings.weight")
    return next(weights[name] for name in names if name in weights)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# -- vision ----------------------------------------------------------------------------------------------


def _intern_vit(weights: Weights, config: dict[str, Any], pixels: Tensor) -> list[Tensor]:
    prefix = "vision_model.embeddings."
    patches = F.conv2d(
        pixels,
        weights[prefix + "patch_embedding.weight"],
        weights[prefix + "patch_embedding.bias"],
        stride=config["patch_size"],
    )
    patches = patches.flatten(2).transpose(1, 2)
    classes = weights[prefix + "class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([classes, patches], dim=1) + weights[prefix + "position_embedding"]
    states = [x]
    for layer in range(config["num_hidden_layers"]):
        x = _vision_layer(weights, config, f"vision_model.encoder.layers.{layer}.", x)
        states.append(x)
    return states


def _vision_layer(weights: Weights, config: dict[str, Any], at: str, x: Tensor) -> Tensor:
    def norm(name: str, y: Tensor) -> Tensor:
        eps = config["layer_norm_eps"]
        if config["norm_type"] == "rms_norm":
            return _rms(y, weights[at + name + ".weight"], eps)
        return F.layer_norm(y, y.shape[-1:], weights[at + name + ".weight"], weights[at + name + ".bias"], eps)

    x = x + _vision_attention(weights, config, at + "attn.", norm("norm1", x)) * weights[at + "ls1"]
    hidden = F.gelu(_linear(weights, at + "mlp.fc1", norm("norm2", x)))
    return x + _linear(weights, at + "mlp.fc2", hidden) * weights[at + "ls2"]


def _vision_attention(weights: Weights, config: dict[str, Any], at: str, x: Tensor) -> Tensor:
    batch, count, width = x.shape
    heads = config["num_attention_heads"]
    packed = _linear(weights, at + "qkv", x)
    query, key, value = packed[..., :width], packed[..., width : 2 * width], packed[..., 2 * width :]
    if config["qk_normalization"]:  # over all heads together
        query = _rms(query, weights[at + "q_norm.weight"], config["layer_norm_eps"])
        key = _rms(key, weights[at + "k_norm.weight"], config["layer_norm_eps"])
    query, key, value = (
        part.reshape(batch, count, heads, width // heads).transpose(1, 2) for part in (query, key, value)
    )
    scores = (query * (width // heads) ** -0.5) @ key.transpose(-2, -1)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, count, width)
    return _linear(weights, at + "proj", mixed)


# -- text ------------------------------------------------------------------------------------------------


def _frequencies(config: dict[str, Any], seq: int) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor on cosine and sine, for a prompt of ``seq`` tokens."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    base, factor = float(config["rope_theta"]), 1.0
    exponents = torch.arange(0, dim, 2).float() / dim
    scaling = config.get("rope_scaling") or {}
    kind, longest = scaling.get("type"), config["max_position_embeddings"]
    if kind == "dynamic" and seq > longest:
        base *= ((scaling["factor"] * seq / longest) - (scaling["factor"] - 1)) ** (dim / (dim - 2))
    stretch = torch.ones(dim // 2)
    if kind == "linear":
        stretch = stretch * scaling["factor"]
    if kind == "su":
        first = config["original_max_position_embeddings"]
        stretch = torch.tensor(scaling["long_factor" if seq > first else "short_factor"])
        factor = math.sqrt(1 + math.log(longest / first) / math.log(first))
    return 1.0 / (stretch * base**exponents), factor


def _rotate(x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Rotary positions on (heads, seq, head_dim), halves paired."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, config: dict[str, Any]) -> Tensor:
    """Causal attention of (heads, seq, d) on (kv_heads, seq, d), with a sliding window -> (seq, width)."""
    seq = query.shape[1]
    frequencies, factor = _frequencies(config, seq)
    query, key = _rotate(query, frequencies, factor), _rotate(key, frequencies, factor)
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, dim=0), value.repeat_interleave(shared, dim=0)
    distance = torch.arange(seq)[:, None] - torch.arange(seq)[None, :]
    hidden = distance < 0
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        hidden |= distance >= config["sliding_window"]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1).flatten(1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(seq, heads * head_dim) -> (heads, seq, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(0, 1)


def _internlm2(weights: Weights, config: dict[str, Any], x: Tensor) -> Tensor:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    eps, seq = config["rms_norm_eps"], len(x)
    for layer in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        packed = _linear(weights, at + "attention.wqkv", _rms(x, weights[at + "attention_norm.weight"], eps))
        queries, keys, values = [], [], []
        for group in packed.split((shared + 2) * head_dim, dim=-1):  # one per key-value head
            *own, key, value = group.split(head_dim, dim=-1)
            queries += own
            keys.append(key)
            values.append(value)
        assert len(queries) == config["num_attention_heads"]
        assert queries[0].shape == (seq, head_dim)
        mixed = _attend(torch.stack(queries), torch.stack(keys), torch.stack(values), config)
        x = x + _linear(weights, at + "attention.wo", mixed)
        normed = _rms(x, weights[at + "ffn_norm.weight"], eps)
        gate = F.silu(_linear(weights, at + "feed_forward.w1", normed))
        x = x + _linear(weights, at + "feed_forward.w2", gate * _linear(weights, at + "feed_forward.w3", normed))
    return _linear(weights, "language_model.output", _rms(x, weights["language_model.model.norm.weight"], eps))


def _phi3(weights: Weights, config: dict[str, Any], x: Tensor) -> Tensor:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    eps, keys = config["rms_norm_eps"], config["num_key_value_heads"] * head_dim
    for layer in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        packed = _linear(weights, at + "self_attn.qkv_proj", _rms(x, weights[at + "input_layernorm.weight"], eps))
        parts = packed.split([config["num_attention_heads"] * head_dim, keys, keys], dim=-1)
        mixed = _attend(*(_heads(part, head_dim) for part in parts), config)
        x = x + _linear(weights, at + "self_attn.o_proj", mixed)
        normed = _rms(x, weights[at + "post_attention_layernorm.weight"], eps)
        gate, up = _linear(weights, at + "mlp.gate_up_proj", normed).chunk(2, dim=-1)
        x = x + _linear(weights, at + "mlp.down_proj", F.silu(gate) * up)
    return _linear(weights, "language_model.lm_head", _rms(x, weights["language_model.model.norm.weight"], eps))


def _llama(weights: Weights, config: dict[str, Any], x: Tensor) -> Tensor:
    """Llama, and Qwen2, whose query, key and value projections have biases."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        normed = _rms(x, weights[at + "input_layernorm.weight"], eps)
        parts = (_heads(_linear(weights, f"{at}self_attn.{part}_proj", normed), head_dim) for part in "qkv")
        x = x + _linear(weights, at + "self_attn.o_proj", _attend(*parts, config))
        normed = _rms(x, weights[at + "post_attention_layernorm.weight"], eps)
        gate = F.silu(_linear(weights, at + "mlp.gate_proj", normed))
        x = x + _linear(weights, at + "mlp.down_proj", gate * _linear(weights, at + "mlp.up_proj", normed))
    normed = _rms(x, weights["language_model.model.norm.weight"], eps)
    head = weights.get("language_model.lm_head.weight", _input_embeddings(weights))
    return F.linear(normed, head)
