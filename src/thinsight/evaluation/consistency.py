"""Rank consistency: how alike the decoder layers rank vision tokens, the finding that a search rests on.

The paper's figure 1 on any model (arXiv 2412.00556, "main finding"): Kendall's tau between the rankings of
different layers of the full model. Knows nothing about reductions, answers or scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import notebook
from ..errors import BadInput, whole
from ..runtime import apply, layer_scores, num_layers
from ..runtime.anatomy import check_supported
from ..schedule import Schedule
from .examples import Example, Progress, check_examples
from .features import VisionCache
from .prompts import PromptReader, batch_inputs, chunks, pad_batch
from .result import RankConsistency

_CHUNK = 1 << 21  # pairs of tokens at a time: bounds the memory to 4 bytes x chunk x rows

Array = NDArray[np.float64]

LOW_TAU = 0.2  # the paper's models have 0.68 and more after the first layer
FAIR_TAU = 0.4
TOP_RATE = 0.25


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
            [np.sign(scores[:, i : i + 1] - scores[:, i + 1 :]).astype(np.float32) for i in range(first, last)], axis=1
        )
        concordance += (signs @ signs.T).astype(np.float64)
        first = last
    untied = np.diag(concordance)  # (rankings,) pairs of tokens with different scores
    scale = np.sqrt(np.outer(untied, untied))
    return np.divide(concordance, scale, out=np.zeros_like(concordance), where=scale > 0)


def top_k_overlap(scores: Array, k: int) -> Array:
    """Share of the k best tokens that neighbouring rows have in common: (rankings, tokens) -> (rankings - 1,).

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


def attention_statistics(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    ranker: Any = "text-attention",
    batch_size: int = 8,
    progress: Progress | None = None,
    reader: PromptReader | None = None,
) -> Array:
    """How much of each layer's attention the most attended vision tokens get, for `baselines.fitprune`.

    Arguments as for `rank_consistency`; the ranker's scores must not be negative.

    Returns:
        (layers, N): the share that the j-th most attended token gets, averaged over examples; each layer sums
        to 1. N is the largest prompt's; profiles of fewer tokens are stretched to it.

    Raises:
        ThinsightError: bad examples, scores below 0, or a model that is not supported.
    """
    found = prompt_scores(model, processor, examples, ranker, batch_size, progress, "attention", reader=reader)
    scores = list(found)
    if min(float(each.min()) for each in scores) < 0:
        raise BadInput(f"ranker {ranker!r} gives scores below 0, which are no attention")
    tokens = max(each.shape[1] for each in scores)
    return np.mean([_profile(each, tokens) for each in scores], axis=0)


def prompt_scores(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    ranker: Any = "text-attention",
    batch_size: int = 8,
    progress: Progress | None = None,
    what: str = "scores",
    least_tokens: int = 1,
    reader: PromptReader | None = None,
) -> Iterator[Array]:
    """A ranker's scores of all vision tokens after each layer of the full model, one prompt after the other:
    (layers, N) each, in no particular order of the examples. Arguments and errors as for `rank_consistency`.
    """
    whole(batch_size, "batch_size")
    model = check_supported(model)
    check_examples(examples)
    reader = reader or PromptReader(model, processor)
    prompts = reader.prompts(examples, progress)
    smallest = min(range(len(prompts)), key=lambda index: prompts[index].n_vision)
    if prompts[smallest].n_vision < least_tokens:
        raise BadInput(f"example {examples[smallest].id!r} has one vision token: give an image with more")
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    images = VisionCache(reader)
    done = 0
    for rows in chunks(order, batch_size):
        vision = images.inputs([examples[index] for index in rows], ranker)
        batch = pad_batch([prompts[index] for index in rows], pad_token_id=0)
        inputs = batch_inputs(model, batch, **vision)
        inputs.pop("use_cache", None)  # some families fill it in
        # a full schedule leaves the model as it is, and makes sure that no other reduction is on it
        with apply(model, Schedule.full(num_layers(model))):
            found = layer_scores(model, inputs, ranker)
        yield from (found.row(row).double().cpu().numpy() for row in range(len(rows)))
        done += len(rows)
        if progress is not None:
            progress(what, done, len(order))


def _profile(scores: Array, tokens: int) -> Array:
    """(layers, n) to (layers, tokens): each layer's shares, most attended first."""
    ranked = -np.sort(-scores, axis=1)
    total = ranked.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, ranked / np.where(total > 0, total, 1), 1 / scores.shape[1])
    summed = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    have, want = np.linspace(0, 1, summed.shape[1]), np.linspace(0, 1, tokens + 1)
    return np.diff(np.stack([np.interp(want, have, layer) for layer in summed]), axis=1)


TOP_RATE = 0.25


def rank_consistency(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    ranker: Any = "text-attention",
    batch_size: int = 8,
    progress: Progress | None = None,
    reader: PromptReader | None = None,
) -> RankConsistency:
    """Compare the rankings of all decoder layers of the full model, over the prompts of some examples.

    The scores are computed in float32 whatever the model's dtype, over all vision tokens of a prompt.
    The statistics are computed per example and then averaged. A few dozen examples are plenty.

    Args:
        model: a transformers vision-language model without a reduction on it.
        processor: the model's own processor.
        examples: what ``load_examples`` returns; answers are not needed.
        ranker: what ranks: a ranker's name, dict or object.
        batch_size: prompts per forward pass.
        progress: called as ``progress(what, done, total)`` while images are read, and after each batch, in
            examples.
        reader: what has read the examples for this model, such as an evaluator's; None: they are read here.

    Raises:
        ThinsightError: bad examples, an unknown ranker, a prompt without image token or with fewer than two
            vision tokens, a model with one layer or one that is not supported.
    """
    model = check_supported(model)
    if num_layers(model) < 2:
        raise BadInput("the model has one decoder layer: rank consistency compares layers, use a deeper model")
    progress = progress or notebook.progress()
    found = prompt_scores(
        model, processor, examples, ranker, batch_size, progress, "rank consistency", least_tokens=2, reader=reader
    )
    per_prompt = []  # tau (L, L), top-k overlap (L - 1,), tied share (L,) of each
    for scores in found:
        top = math.ceil(TOP_RATE * scores.shape[1])
        per_prompt.append((kendall_tau_b(scores), top_k_overlap(scores, top), tied_share(scores)))
    tau, overlap, ties = (np.mean(values, axis=0) for values in zip(*per_prompt, strict=True))
    return RankConsistency(np.diag(tau, k=1).copy(), tau, overlap, ties, TOP_RATE, len(per_prompt))
