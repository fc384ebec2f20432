"""The one-call search: builds the evaluator for a model and picks the method.

Knows nothing about how either of them works. Model code is loaded on the first call only.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget, check_budget_value
from ..errors import BadInput
from .gsearch import check_early_stop, check_max_drop, get_solver, gsearch
from .psigmoid import psigmoid
from .random_search import random_search
from .run import SearchResult, check_count
from .sensitivity import LEAST_TRIALS as LEAST_OF_SENSITIVITY
from .sensitivity import sensitivity_search

if TYPE_CHECKING:
    from ..evaluation.evaluator import Evaluator
if TYPE_CHECKING:
    from ..evaluation.examples import Example

AUTO = "auto"
FIRST_CHOICE: dict[str, Any] = {"name": "text-attention", "queries": "instruction"}
_CHOICES: tuple[dict[str, Any], ...] = (
    FIRST_CHOICE,
    {"name": "text-attention", "queries": "last"},
    {"name": "staged", "first": "vision-attention"},
    {"name": "staged", "first": "cdpruner"},
)


def rankers_for(evaluator: Evaluator) -> list[dict[str, Any]]:
    """The rankers to choose from on an evaluator's model, as whole dicts: those that can rank there.

    Text attention of the instruction or of the last token, and two that drop before layer 0 and rank by text
    attention behind it.
    """
    from ..ranking import get_ranker

    return [get_ranker(choice).to_dict() for choice in _CHOICES if evaluator.can_rank(choice)]


class _Methods(Mapping[str, Any]):
    """Searches by name; an experimental one is loaded, by its name, when it is asked for."""

    _FOUND: ClassVar[dict[str, Any]] = {
        "psigmoid": psigmoid,
        "random": random_search,
        "sensitivity": sensitivity_search,
    }

    def __getitem__(self, name: str) -> Any:
        if name == "adaptive":
            return import_module("thinsight.experimental.adaptive").adaptive_search
        return self._FOUND[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["adaptive", *self._FOUND])

    def __len__(self) -> int:
        return 1 + len(self._FOUND)


METHODS = _Methods()
"""Searches under a budget by name; "gsearch" is the one under a tolerance."""

LEAST_TRIALS = dict.fromkeys(METHODS, 1) | {"adaptive": 12, "sensitivity": LEAST_OF_SENSITIVITY}
"""The fewest evaluations that each can work with."""

CHOOSE_RANKER = ("adaptive", "random", "sensitivity")
"""Those that take ``rankers=``."""

WARM_START = ("adaptive", "psigmoid", "sensitivity")
"""Those that take ``warm_start=``."""

DEFAULT_MAX_DROP = 0.01


def choose_method(method: str | None, max_drop: float | None, budget: Budget | float | None) -> str:
    """The search to run: the one asked for, or G-Search for a tolerance and the sensitivity search for a
    budget.

    Raises:
        ThinsightError: an unknown method, both a tolerance and a budget, or the wrong one for the method.
    """
    if max_drop is not None and budget is not None:
        raise BadInput("max_drop and budget are both given: a search holds one of them, leave one out")
    chosen = ("gsearch" if budget is None else "sensitivity") if method is None else method
    if chosen != "gsearch" and chosen not in METHODS:
        raise BadInput(f"method is {chosen!r}; choose one of gsearch, {', '.join(METHODS)}")
    if (budget is None) != (chosen == "gsearch"):
        needs = "max_drop, not a budget" if chosen == "gsearch" else "a budget, such as 0.25"
        raise BadInput(f"method {chosen!r} needs {needs}")
    return chosen


def check_score_drop(max_drop: float) -> None:
    """Check a tolerance for a score of ours, which lies between 0 and 1.

    Raises:
        ThinsightError: it is none, or more than a score can fall by.
    """
    check_max_drop(max_drop)
    if max_drop > 1:
        raise BadInput(
            f"max_drop is {max_drop!r}, but scores lie between 0 and 1: give points as hundredths, "
            f"{max_drop / 100:g} for {max_drop:g} points"
        )


def search(
    model: Any,
    processor: Any,
    examples: Sequence[Example] | str | Path,
    max_drop: float | None = None,
    *,
    budget: Budget | float | None = None,
    budget_unit: str = "keep",
    method: str | None = None,
    metric: str | None = None,
    batch_size: int | str = 8,
    ranker: Any = None,
    max_new_tokens: int | None = None,
    cache_gib: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Search the cheapest reduction of ``model`` whose score on ``examples`` falls by at most ``max_drop``,
    or the best-scoring one within ``budget``.

    Args:
        model: a loaded multimodal ``transformers`` model.
        processor: its processor.
        examples: calibration examples, or what `thinsight.load_examples` takes.
        max_drop: largest drop of the score, in the metric's own unit; 0.01 if no budget is given.
        budget: what a prefill may cost: a number, see `thinsight.budget.make_budget`, or a budget.
        budget_unit: of a number: "keep" (mean keep rate), "flops" or "ms".
        method: "gsearch" (the default for ``max_drop``), "sensitivity" (the default for ``budget``),
            "adaptive", "psigmoid" or "random".
        metric: name of a metric; None takes each example's own.
        batch_size: examples per forward pass, or "auto": the fastest, measured first.
        ranker: which tokens are kept. None: under a budget the search chooses ("auto") where its method can,
            else text attention.
        max_new_tokens: longest answer; None takes the evaluator's default.
        cache_gib: main memory for vision features, see `thinsight.Evaluator`.
        cache_dir: folder that keeps vision features and the full model's answers for later runs.
        progress: called as ``progress(what, done, total)`` after each batch, in examples.
        **options: further arguments of the search that runs, such as ``n_trials``, ``seed``, ``first_layer``,
            ``study`` and ``resume``: see `gsearch`, `sensitivity_search`, `adaptive_search`, `psigmoid` and
            `random_search`.

    Raises:
        ThinsightError: bad arguments, examples or model; before long work starts.
    """
    chosen = choose_method(method, max_drop, budget)
    if budget is None and budget_unit != "keep":
        raise BadInput(f"budget_unit is {budget_unit!r} without a budget: leave it out, or give budget too")
    if ranker == AUTO and chosen not in CHOOSE_RANKER:
        raise BadInput(
            f"ranker is 'auto', which needs a budget and a method that chooses it: {', '.join(CHOOSE_RANKER)}"
        )
    if budget is None:
        check_score_drop(DEFAULT_MAX_DROP if max_drop is None else max_drop)
    elif not isinstance(budget, Budget):
        check_budget_value(budget, budget_unit)
    _check_options(chosen, options)
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import load_examples
    from ..evaluation.store import DEFAULT_CACHE_GIB

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
        progress=progress,
        cache_gib=DEFAULT_CACHE_GIB if cache_gib is None else cache_gib,
        cache_dir=cache_dir,
    )
    if budget is None:
        return gsearch(evaluator, DEFAULT_MAX_DROP if max_drop is None else max_drop, **options)
    if ranker in (None, AUTO) and chosen in CHOOSE_RANKER:
        options.setdefault("rankers", rankers_for(evaluator))
    found: SearchResult = METHODS[chosen](evaluator, budget, budget_unit=budget_unit, **options)
    return found


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that the search does not take or cannot work with, before an image is read.

    Raises:
        ThinsightError: with the option that was meant or all that there are, or with the values it may have.
    """
    function = gsearch if method == "gsearch" else METHODS[method]
    own = inspect.signature(search).parameters
    taken = [name for name in inspect.signature(function).parameters if name not in (*own, "evaluator")]
    for name in options:
        if name in taken:
            continue
        close = difflib.get_close_matches(name, [*taken, *own], n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(taken)}"
        raise BadInput(f"method {method!r} takes no option {name!r}: {meant}")
    check_count(options.get("seed", 0), "seed", 0)
    if method == "gsearch":
        settings: dict[str, Any] = {name: options.get(name) for name in ("step", "trade_off", "n_trials")}
        check_early_stop(get_solver(options.get("solver", "bisect"), **settings), options.get("confidence"))
    elif "n_trials" in options:
        check_count(options["n_trials"], "n_trials", LEAST_TRIALS[method])
