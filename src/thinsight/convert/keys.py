"""Which tensors of the original checkpoint become which of `InternVLForConditionalGeneration`.

A rule is a pattern over original names, the names it yields, and how the tensor is taken apart where it is
packed: on weights (rows, columns) and on biases (rows,), only the rows matter. The table's facts come from
the modelling code that InternVL publishes (github.com/OpenGVLab/InternVL, internvl_chat/internvl/model).
Knows nothing about files, and of configs only the numbers that a rule needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor


def split_stacked(packed: Tensor) -> tuple[Tensor, ...]:
    """InternViT's ``qkv``: all queries, then all keys, then all values, each a third of the rows.

    (3 * width, ...) -> three of (width, ...), as views.
    """
    return packed.chunk(3, dim=0)


def split_grouped(packed: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """InternLM2's ``wqkv``: per key-value head, the query heads that share it, its key, and its value.

    ((heads + 2 * kv_heads) * head_dim, ...) -> (heads * head_dim, ...) and twice (kv_heads * head_dim, ...).
    Query heads keep their order, so that query head h still reads key-value head h // (heads // kv_heads).
    """
    groups = packed.unflatten(0, (kv_heads, -1, head_dim))  # (kv_heads, heads per kv head + 2, head_dim, ...)
    queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
    return queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)


Split = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Conversion:
    """What becomes of one original tensor; no targets: it is not needed."""

    targets: tuple[str, ...]
    split: Split | None = None

    def apply(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The target tensors, in the order of ``targets``; views where the tensor is packed."""
        if not self.targets:
            return ()
        return (tensor,) if self.split is None else self.split(tensor)


@dataclass(frozen=True)
class Rule:
    """``pattern`` must match a whole original name; the targets may use its groups."""

    pattern: str
    targets: tuple[str, ...]
    split: Split | None = None


def find_conversion(name: str, rules: list[Rule]) -> Conversion | None:
    """What the first rule that matches makes of an original tensor; None: no rule knows the name."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match is not None:
            return Conversion(tuple(match.expand(target) for target in rule.targets), rule.split)
    return None


# -- vision tower and projector --------------------------------------------------------------------------

_OLD_TOWER, _NEW_TOWER = r"vision_model\.", "model.vision_tower."
_OLD_LAYER, _NEW_LAYER = _OLD_TOWER + r"encoder\.layers\.(\d+)\.", _NEW_TOWER + r"encoder.layer.\1."
_OLD_PROJECTOR, _NEW_PROJECTOR = r"mlp1\.", "model.multi_modal_projector."
_END = r"\.(weight|bias)"

_LAYER_NAMES = {
    r"attn\.proj": "attention.projection_layer",
    r"attn\.q_norm": "attention.q_norm",
    r"attn\.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    r"mlp\.fc1": "mlp.fc1",
    r"mlp\.fc2": "mlp.fc2",
}
_PROJECTOR_NAMES = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def vision_rules(depth: int, stored_depth: int) -> list[Rule]:
    """Rules of InternViT and of the projector. Of the ``stored_depth`` layers only the first ``depth`` are
    needed."""
    unneeded = "|".join(str(layer) for layer in range(depth, stored_depth))
    return [
        *([Rule(_OLD_TOWER + rf"encoder\.layers\.(?:{unneeded})\..+", ())] if unneeded else []),
        Rule(_OLD_TOWER + r"embeddings\.class_embedding", (_NEW_TOWER + "embeddings.cls_token",)),
        Rule(_OLD_TOWER + r"embeddings\.position_embedding", (_NEW_TOWER + "embeddings.position_embeddings",)),
        Rule(
            _OLD_TOWER + r"embeddings\.patch_embedding" + _END,
            (_NEW_TOWER + r"embeddings.patch_embeddings.projection.\1",),
        ),
        Rule(
            _OLD_LAYER + r"attn\.qkv" + _END,
            tuple(_NEW_LAYER + rf"attention.{part}_proj.\2" for part in "qkv"),
            split_stacked,
        ),
        Rule(_OLD_LAYER + r"ls([12])", (_NEW_LAYER + r"lambda_\2",)),
        *(Rule(_OLD_LAYER + old + _END, (_NEW_LAYER + new + r".\2",)) for old, new in _LAYER_NAMES.items()),
        *(Rule(_OLD_PROJECTOR + old + _END, (_NEW_PROJECTOR + new + r".\1",)) for old, new in _PROJECTOR_NAMES.items()),
    ]


# -- text models -----------------------------------------------------------------------------------------

_OLD_TEXT, _NEW_TEXT = r"language_model\.model\.", "model.language_model."
_INTERNLM2_LAYER, _TEXT_LAYER = _OLD_TEXT + r"layers\.(\d+)\.", _NEW_TEXT + r"layers.\1."
_ROTARY_BUFFER = Rule(r"language_model\..+\.rotary_emb\.inv_freq", ())  # computed from the config

_INTERNLM2_LAYER_NAMES = {
    r"attention\.wo": "self_attn.o_proj",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def text_rules(architecture: str, text_config: Any) -> list[Rule]:
    """Rules of a text model; ``text_config`` is the converted one.

    Qwen2, Llama and Phi-3 keep their names below the prefix, and Phi-3 its packed projections, since the
    transformers classes have the same ones. InternLM2 becomes Llama.
    """
    if architecture == "InternLM2ForCausalLM":
        return _internlm2_rules(text_config)
    return [
        _ROTARY_BUFFER,
        Rule(_OLD_TEXT + "(.+)", (_NEW_TEXT + r"\1",)),
        Rule(r"language_model\.(lm_head\.weight)", (r"\1",)),
    ]


def _internlm2_rules(text_config: Any) -> list[Rule]:
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    split = partial(split_grouped, kv_heads=text_config.num_key_value_heads, head_dim=head_dim)
    return [
        _ROTARY_BUFFER,
        Rule(_OLD_TEXT + r"tok_embeddings\.weight", (_NEW_TEXT + "embed_tokens.weight",)),
        Rule(_OLD_TEXT + r"norm\.weight", (_NEW_TEXT + "norm.weight",)),
        Rule(r"language_model\.output\.weight", ("lm_head.weight",)),
        Rule(
            _INTERNLM2_LAYER + r"attention\.wqkv" + _END,
            tuple(_TEXT_LAYER + rf"self_attn.{part}_proj.\2" for part in "qkv"),
            split,
        ),
        *(
            Rule(_INTERNLM2_LAYER + old + _END, (_TEXT_LAYER + new + r".\2",))
            for old, new in _INTERNLM2_LAYER_NAMES.items()
        ),
    ]
