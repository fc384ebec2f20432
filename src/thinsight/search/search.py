"""The one-call search: builds the evaluator for a model and picks the method.

Knows nothing about how either of them works. Model code is loaded on the first call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from ..budget import Budget, check_budget_value, make_budget
from ..errors import BadInput
from .adaptive import adaptive_search
from .gsearch import gsearch
from .psigmoid import psigmoid
from .random_search import random_search
from .rankers import AUTO, FIRST_CHOICE, rankers_for
from .result import SearchResult
from .sensitivity import sensitivity_search

if TYPE_CHECKING:
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import Example

__all__ = ["CHOOSE_RANKER", "METHODS", "WARM_START", "budget_of", "choose_method", "search"]


METHODS: dict[str, Any] = {
    "adaptive": adaptive_search,
    "psigmoid": psigmoid,
    "random": random_search,
    "sensitivity": sensitivity_search,
}
"""Searches under a budget by name; "gsearch" is the one under a tolerance."""

CHOOSE_RANKER = ("adaptive", "random", "sensitivity")
"""Those that take ``rankers=``."""

WARM_START = ("adaptive", "psigmoid", "sensitivity")
"""Those that take ``warm_start=``."""

DEFAULT_MAX_DROP = 0.01


def choose_method(method: str | None, max_drop: float | None, budget: float | None) -> str:
    """The search to run: the one asked for, or G-Search for a tolerance and the sensitivity search for a
    budget.

    Raises:
        ThinsightError: an unknown method, both a tolerance and a budget, or the wrong one for the method.
    """
    if max_drop is not None and budget is not None:
        raise BadInput("max_drop and budget are both given: a search holds one of them, leave one out")
    chosen = method or ("gsearch" if budget is None else "sensitivity")
    if chosen != "gsearch" and chosen not in METHODS:
        raise BadInput(f"method is {chosen!r}; choose one of gsearch, {', '.join(METHODS)}")
    if (budget is None) != (chosen == "gsearch"):
        needs = "max_drop, not a budget" if chosen == "gsearch" else "a budget, such as 0.25"
        raise BadInput(f"method {chosen!r} needs {needs}")
    return chosen


def search(
    model: Any,
    processor: Any,
    examples: Sequence[Example] | str | Path,
    max_drop: float | None = None,
    *,
    budget: float | None = None,
    budget_unit: str = "keep",
    method: str | None = None,
    metric: str | None = None,
    batch_size: int = 8,
    ranker: Any = None,
    max_new_tokens: int | None = None,
    cache_gib: float | None = None,
    **options: Any,
) -> SearchResult:
    """Search the cheapest reduction of ``model`` whose score on ``examples`` falls by at most ``max_drop``,
    or the best-scoring one within ``budget``.

    Args:
        model: a loaded multimodal ``transformers`` model.
        processor: its processor.
        examples: calibration examples, or what `thinsight.load_examples` takes.
        max_drop: largest drop of the score, in the metric's own unit; 0.01 if no budget is given.
        budget: what a prefill may cost, see `thinsight.budget.make_budget`.
        budget_unit: "keep" (mean keep rate), "flops" or "ms".
        method: "gsearch" (the default for ``max_drop``), "sensitivity" (the default for ``budget``),
            "adaptive", "psigmoid" or "random".
        metric: name of a metric; None takes each example's own.
        batch_size: examples per forward pass.
        ranker: which tokens are kept. None: under a budget the search chooses ("auto") where its method can,
            else text attention.
        max_new_tokens: longest answer; None takes the evaluator's default.
        cache_gib: main memory for vision features, see `thinsight.Evaluator`.
        **options: further arguments of the search, such as ``study``, ``seed`` or ``first_layer``.

    Raises:
        ThinsightError: bad arguments, examples or model; before long work starts.
    """
    chosen = choose_method(method, max_drop, budget)
    if ranker == AUTO and chosen not in CHOOSE_RANKER:
        raise BadInput(
            f"ranker is 'auto', which needs a budget and a method that chooses it: {', '.join(CHOOSE_RANKER)}"
        )
    if budget is not None:
        check_budget_value(budget, budget_unit)
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import load_examples
    from ..evaluation.feature_store import DEFAULT_CACHE_GIB

    if isinstance(examples, (str, Path)):
        examples = load_examples(examples)
    evaluator = Evaluator(
        model,
        processor,
        examples,
        metric=metric,
        batch_size=batch_size,
        ranker=FIRST_CHOICE if ranker in (None, AUTO) else ranker,
        max_new_tokens=max_new_tokens,
        cache_gib=DEFAULT_CACHE_GIB if cache_gib is None else cache_gib,
    )
    if budget is None:
        return gsearch(evaluator, DEFAULT_MAX_DROP if max_drop is None else max_drop, **options)
    if ranker in (None, AUTO) and chosen in CHOOSE_RANKER:
        options.setdefault("rankers", rankers_for(evaluator))
    limits = budget_of(evaluator, budget, budget_unit)
    found: SearchResult = METHODS[chosen](evaluator, limits, **options)
    return found


def budget_of(evaluator: Evaluator, value: float, unit: str = "keep") -> Budget:
    """A budget for the evaluator's model on its median prompt; "ms" is profiled on the spot.

    Raises:
        ThinsightError: an unknown unit, or a value out of range.
    """
    sizes = evaluator.prompt_sizes
    latency = None
    if unit == "ms":
        from ..evaluation.encoding import typical_batch
        from ..timing import profile

        latency = profile(
            evaluator.model, typical_batch(evaluator.processor, evaluator.examples, evaluator.batch_size)
        )
    return make_budget(
        value,
        unit,
        config=evaluator.model.config,
        n_vision=evaluator.num_vision_tokens,
        n_text=median_low(n_text for _, n_text in sizes),
        latency=latency,
    )
