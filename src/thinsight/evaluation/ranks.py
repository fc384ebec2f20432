"""How alike rankings are: Kendall's tau-b between the rows of a score matrix, top-k overlap, and ties.

Arithmetic on numpy arrays. Knows nothing about layers, models or where scores come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["kendall_tau_b", "tied_share", "top_k_overlap"]

_CHUNK = 1 << 21  # pairs of tokens at a time: bounds the memory to 4 bytes x chunk x rows

Array = NDArray[np.float64]


def kendall_tau_b(scores: Array) -> Array:
    """Kendall's tau-b (Kendall 1945, "The treatment of ties in ranking problems") of every pair of rows.

    Args:
        scores: (rankings, tokens) float.

    Returns:
        (rankings, rankings) float64 in [-1, 1]; a row without two different scores has no ranking: its tau is
        0.
    """
    rankings, tokens = scores.shape
    concordance = np.zeros((rankings, rankings))
    first = 0
    while first < tokens - 1:
        last = min(tokens - 1, first + max(1, _CHUNK // tokens))
        # the order of every pair (i, j > i) with i in the chunk, per row: (rankings, pairs) in {-1, 0, 1}
        signs = np.concatenate(
            [
                np.sign(scores[:, i : i + 1] - scores[:, i + 1 :]).astype(np.float32)
                for i in range(first, last)
            ],
            axis=1,
        )
        concordance += (signs @ signs.T).astype(np.float64)
        first = last
    untied = np.diag(concordance)  # (rankings,) pairs of tokens with different scores
    scale = np.sqrt(np.outer(untied, untied))
    return np.divide(concordance, scale, out=np.zeros_like(concordance), where=scale > 0)


def top_k_overlap(scores: Array, k: int) -> Array:
    """Share of the k best tokens that neighbouring rows have in common: (rankings, tokens) -> (rankings -
    1,).

    Ties fall to the earlier token. Two unrelated rankings share k / tokens on average.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    member = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(member, best, True, axis=1)
    return (member[:-1] & member[1:]).sum(axis=1) / k


def tied_share(scores: Array) -> Array:
    """Share of the tokens whose score another token has too: (rankings, tokens) -> (rankings,)."""
    result = np.zeros(len(scores))
    for row, values in enumerate(scores):
        _, counts = np.unique(values, return_counts=True)
        result[row] = counts[counts > 1].sum() / len(values)
    return result
