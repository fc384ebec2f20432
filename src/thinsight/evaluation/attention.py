"""What a ranker says about many prompts' vision tokens at every layer of the full model, and its average.

Knows nothing about reductions, answers or scores of answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..runtime import LayerScores, apply, layer_scores, num_layers
from ..runtime.families import check_supported
from ..schedule import Schedule
from .encoding import PromptBatch, PromptReader, pad_batch
from .examples import Example, Progress, check_examples
from .passes import pass_inputs, prompt_positions
from .vision_cache import VisionCache

__all__ = ["attention_statistics", "prompt_scores"]

Array = NDArray[np.float64]


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

    Args:
        model: a transformers vision-language model without a reduction on it.
        processor: the model's own processor.
        examples: what ``load_examples`` returns; answers are not needed.
        ranker: what scores: a ranker's name, dict or object. Its scores must not be negative.
        batch_size: prompts per forward pass.
        progress: called as ``progress(what, done, total)`` while images are read, and after each batch, in
            examples.
        reader: what has read the examples for this model, such as an evaluator's; None: they are read here.

    Returns:
        (layers, N): the share that the j-th most attended token gets, averaged over examples; each layer sums
        to 1. N is the largest prompt's; profiles of fewer tokens are stretched to it.

    Raises:
        ThinsightError: bad examples, scores below 0, or a model that is not supported.
    """
    found = prompt_scores(
        model, processor, examples, ranker, batch_size, progress, "attention", reader=reader
    )
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
    """A ranker's scores of all vision tokens after each layer of the full model, one prompt after the other.

    Yields:
        (layers, N), in no particular order of the examples.

    Raises:
        ThinsightError: bad examples, an unknown ranker, a prompt without image token or with fewer than
            `least_tokens` vision tokens, or a model that is not supported.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise BadInput(f"batch_size is {batch_size!r}: it must be a whole number of at least 1")
    model = check_supported(model)
    check_examples(examples)
    reader = reader or PromptReader(model, processor)
    prompts = reader.prompts(examples, progress)
    smallest = min(range(len(prompts)), key=lambda index: prompts[index].n_vision)
    if prompts[smallest].n_vision < least_tokens:
        raise BadInput(f"example {examples[smallest].id!r} has one vision token: give an image with more")
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    images = VisionCache(model, processor, reader=reader)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        vision = images.inputs([examples[index] for index in rows], ranker)
        found = _scores(model, pad_batch([prompts[index] for index in rows], pad_token_id=0), vision, ranker)
        yield from (found.row(row).double().cpu().numpy() for row in range(len(rows)))
        if progress is not None:
            progress(what, start + len(rows), len(order))


def _scores(model: Any, batch: PromptBatch, vision: dict[str, Any], ranker: Any) -> LayerScores:
    device = model.device
    inputs = pass_inputs(
        model,
        batch.input_ids.to(device),
        batch.attention_mask.to(device),
        prompt_positions(model, batch),
        token_types={name: types.to(device) for name, types in batch.per_token.items()},
        **vision,
    )
    inputs.pop("use_cache", None)  # some families fill it in
    # a full schedule leaves the model as it is, and makes sure that no other reduction is on it
    with apply(model, Schedule.full(num_layers(model))):
        return layer_scores(model, inputs, ranker)


def _profile(scores: Array, tokens: int) -> Array:
    """(layers, n) to (layers, tokens): each layer's shares, most attended first."""
    ranked = -np.sort(-scores, axis=1)
    total = ranked.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, ranked / np.where(total > 0, total, 1), 1 / scores.shape[1])
    summed = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    have, want = np.linspace(0, 1, summed.shape[1]), np.linspace(0, 1, tokens + 1)
    return np.diff(np.stack([np.interp(want, have, layer) for layer in summed]), axis=1)
