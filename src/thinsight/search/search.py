"""The one-call search: builds the evaluator for a model and picks the method.

Knows nothing about how either of them works. Model code is loaded on the first call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gsearch import gsearch
from .result import SearchResult

if TYPE_CHECKING:
    from ..evaluation.examples import Example

__all__ = ["search"]


def search(
    model: Any,
    processor: Any,
    examples: Sequence[Example] | str | Path,
    max_drop: float = 0.01,
    *,
    metric: str | None = None,
    batch_size: int = 8,
    ranker: Any = "text-attention",
    max_new_tokens: int | None = None,
    **options: Any,
) -> SearchResult:
    """Search the cheapest reduction of ``model`` whose score on ``examples`` falls by at most ``max_drop``.

    Args:
        model: a loaded multimodal ``transformers`` model.
        processor: its processor.
        examples: calibration examples, or what `thinsight.load_examples` takes.
        max_drop: largest drop of the score, in the metric's own unit.
        metric: name of a metric; None takes each example's own.
        batch_size: examples per forward pass.
        ranker: which tokens are kept.
        max_new_tokens: longest answer; None takes the evaluator's default.
        **options: further arguments of `thinsight.gsearch`, such as ``study`` or ``first_layer``.

    Raises:
        ThinsightError: bad arguments, examples or model; before long work starts.
    """
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import load_examples

    if isinstance(examples, (str, Path)):
        examples = load_examples(examples)
    evaluator = Evaluator(
        model,
        processor,
        examples,
        metric=metric,
        batch_size=batch_size,
        ranker=ranker,
        max_new_tokens=max_new_tokens,
    )
    return gsearch(evaluator, max_drop, **options)
