"""Takes packed projections apart into one tensor each for queries, keys and values.

Works on weights (rows, columns) and on biases (rows,): only the rows matter. Knows nothing about tensors'
names.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["split_grouped", "split_stacked"]


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
