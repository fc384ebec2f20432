"""The searches by name, and the one-call search: builds the evaluator for a model and picks the method.

Knows nothing about how any of them works. Model code is loaded on the first call only.
"""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import notebook
from ..budget import Budget, check_budget_value
from ..certificate import Certificate, Step, too_few
from ..errors import BadInput, whole
from ..reduction import Reduction
from ..registry import Registry
from ..schedule import Schedule
from .certify import certify as certify_path
from .certify import check_disjoint, check_promise, path_for, split_examples
from .gsearch import check_early_stop, check_max_drop, get_solver, gsearch
from .priced import priced_search
from .psigmoid import psigmoid
from .random_search import random_search
from .run import SearchResult, budget_of
from .sensitivity import LEAST_OF_FRONTIER, frontier, sensitivity_search
from .sensitivity import LEAST_TRIALS as LEAST_OF_SENSITIVITY

if TYPE_CHECKING:
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import Example
    from ..evaluation.metrics import Metric

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


@dataclass(frozen=True)
class Search:
    """A search by name. What it can be told is read from its signature.

    Attributes:
        name: what options call it.
        function: ``function(evaluator, budget, **options) -> SearchResult``, or with a tolerance in the budget's place:
            a `SearchEvaluator`, and a `Budget` or a drop of the score. Of ``seed``, ``study``, ``resume``,
            ``observer``, ``n_trials``, ``first_layer``, ``rankers`` (to choose from) and ``warm_start`` (a schedule)
            it is told those that it takes, see `psigmoid`.
        title: for reports and messages.
        under: "budget" or "max_drop".
        least_trials: the fewest evaluations that it can work with.
    """

    name: str
    function: Callable[..., Any]
    title: str
    under: str = "budget"
    least_trials: int = 1

    def __post_init__(self) -> None:
        if self.under not in ("budget", "max_drop"):
            raise BadInput(f"under is {self.under!r}; choose budget or max_drop")

    def __call__(self, evaluator: Any, goal: Any, **told: Any) -> SearchResult:
        """What it finds, told as much as it takes."""
        taken = {name: value for name, value in told.items() if name in self.parameters}
        found: SearchResult = self.function(evaluator, goal, **taken)
        return found

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """What it can be told."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def chooses_ranker(self) -> bool:
        """Whether it chooses the ranker too."""
        return "rankers" in self.parameters


SEARCHES: Registry[Search] = Registry(
    "method", "thinsight.searches", ["thinsight.experimental.adaptive"], code=attrgetter("function")
)
for _search in (
    Search("gsearch", gsearch, "G-Search", under="max_drop"),
    Search("priced", priced_search, "Priced search", under="max_drop"),
    Search("sensitivity", sensitivity_search, "Sensitivity search", least_trials=LEAST_OF_SENSITIVITY),
    Search("psigmoid", psigmoid, "P-Sigmoid"),
    Search("random", random_search, "Random search"),
):
    SEARCHES.register(_search)

FRONTIER = Search("frontier", frontier, "Frontier", least_trials=LEAST_OF_FRONTIER)
"""Asked for by an option of its own, as it comes to many results."""


def under_budget() -> list[str]:
    """The names of the searches under a budget."""
    return [search.name for search in SEARCHES.values() if search.under == "budget"]


def choosing() -> list[str]:
    """The names of those that choose the ranker."""
    return [search.name for search in SEARCHES.values() if search.chooses_ranker]


# -- certified -----------------------------------------------------------------------------------------------

DEFAULT_MAX_DROP = 0.01
SHARED = 0.25  # of one set of examples, what is searched on


def along(found: Reduction, path: Sequence[Schedule]) -> list[Reduction]:
    """The schedules of a path as reductions, all with the ranker of the one found."""
    if found.adaptive is not None:  # which is all of its path
        return [found]
    return [replace(found, schedule=schedule, weights=None) for schedule in path]


def shared_layers(path: Sequence[Reduction]) -> int:
    """How many layers see all tokens under every schedule of a path: what its runs can share."""
    kept = [next((i for i, rate in enumerate(each.schedule.keep_rates) if rate < 1), 0) for each in path]
    return min(kept)


def as_certified(found: SearchResult, path: Sequence[Reduction], certificate: Certificate) -> SearchResult:
    """What a search found, as far as it is certified: the schedule, scores and reduction are the certificate's.

    The reduction's record of the search still says how the one found scored, and what it was.
    """
    reduction = certified_reduction(found.reduction, path, certificate)
    return replace(
        found,
        schedule=reduction.schedule,
        reduction=reduction,
        full_score=certificate.full_score,
        score=certificate.score,
        certificate=certificate,
    )


def certified_reduction(found: Reduction, path: Sequence[Reduction], certificate: Certificate) -> Reduction:
    """The last reduction of the path that is certified, or the full model; with the certificate."""
    full = replace(found, schedule=Schedule.full(found.schedule.num_layers), adaptive=None)
    taken = full if certificate.place is None else path[certificate.place]
    record = dict(found.search or {})
    if taken.schedule != found.schedule:
        record["found"] = list(found.schedule.keep_rates)
    return replace(taken, search=record, measured=None, certificate=certificate, weights=found.weights)


# -- the one call --------------------------------------------------------------------------------------------


def choose_method(method: str | None, max_drop: float | None, budget: Budget | float | None) -> str:
    """The search to run: the one asked for, or G-Search for a tolerance and the sensitivity search for a
    budget.

    Raises:
        ThinsightError: an unknown method, both a tolerance and a budget, or the wrong one for the method.
    """
    if max_drop is not None and budget is not None:
        raise BadInput("max_drop and budget are both given: a search holds one of them, leave one out")
    chosen = ("gsearch" if budget is None else "sensitivity") if method is None else method
    under = SEARCHES[chosen].under
    if (budget is None) != (under == "max_drop"):
        needs = "max_drop, not a budget" if under == "max_drop" else "a budget, such as 0.25"
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
    metric: str | Metric | None = None,
    batch_size: int | str = 8,
    ranker: Any = None,
    max_new_tokens: int | None = None,
    cache_gib: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    certify: bool = True,
    confidence: float = 0.95,
    test_examples: Sequence[Example] | str | Path | None = None,
    **options: Any,
) -> SearchResult:
    """Search the cheapest reduction of ``model`` that is certain to lose at most ``max_drop``, or the best-scoring one
    within ``budget``.

    Under ``max_drop`` the result is certified, see `thinsight.certify`: the search runs on one part of the examples and
    lays a path of schedules, and these are tested, costly ones first, on the other part. The last one that passes is
    the result, or the full model where none does; ``certificate.reason`` says why. Under ``budget``, and with
    ``certify=False``, what is lost is estimated.

    Args:
        model: a loaded multimodal ``transformers`` model.
        processor: its processor.
        examples: calibration examples, or what `thinsight.load_examples` takes. To certify without ``test_examples``
            they are split by image: a quarter to search on, the rest to certify on.
        max_drop: largest drop of the score, in the metric's own unit; 0.01 if no budget is given.
        budget: what a prefill may cost: a number, see `thinsight.budget.make_budget`, or a budget.
        budget_unit: of a number: "keep" (mean keep rate), "flops" or "ms".
        method: "gsearch" (the default for ``max_drop``) or "priced"; "sensitivity" (the default for ``budget``), or
            another of `thinsight.searches.SEARCHES`.
        metric: a metric or its name; None takes each example's own.
        batch_size: examples per forward pass, or "auto": the fastest, measured first.
        ranker: which tokens are kept. None: under a budget the search chooses ("auto") where its method can,
            else text attention.
        max_new_tokens: longest answer; None takes the evaluator's default.
        cache_gib: main memory for vision features, see `thinsight.Evaluator`.
        cache_dir: folder that keeps vision features and the full model's answers for later runs.
        progress: called as ``progress(what, done, total)`` after each batch, in examples. None: a notebook draws
            it, and how far the search is; ``THINSIGHT_PROGRESS=0`` in the environment keeps it silent.
        certify: whether ``max_drop`` is to be promised. Too few examples for that are warned of before any work.
        confidence: of the promise.
        test_examples: those to certify on, or what `thinsight.load_examples` takes; they share no image with
            ``examples``, and serve one certificate.
        **options: further arguments of the search that runs, such as ``n_trials``, ``seed``, ``first_layer``,
            ``study`` and ``resume``: see `gsearch` (whose own ``confidence`` is ``early_stop`` here),
            `priced_search`, `sensitivity_search`, `adaptive_search`, `psigmoid` and `random_search`.

    Raises:
        ThinsightError: bad arguments, examples or model; before long work starts.
    """
    chosen = choose_method(method, max_drop, budget)
    if budget is None and budget_unit != "keep":
        raise BadInput(f"budget_unit is {budget_unit!r} without a budget: leave it out, or give budget too")
    if ranker == AUTO and not SEARCHES[chosen].chooses_ranker:
        raise BadInput(f"ranker is 'auto', which needs a budget and a method that chooses it: {', '.join(choosing())}")
    tolerance = DEFAULT_MAX_DROP if max_drop is None else max_drop
    promised = certify and budget is None
    if budget is None:
        check_score_drop(tolerance)
        if promised:
            check_promise(tolerance, confidence)
    elif not isinstance(budget, Budget):
        check_budget_value(budget, budget_unit)
    _check_options(chosen, options)
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.examples import load_examples
    from ..evaluation.store import DEFAULT_CACHE_GIB
    from ..runtime import weights_of

    read = load_examples(examples) if isinstance(examples, (str, Path)) else examples
    testing = load_examples(test_examples) if isinstance(test_examples, (str, Path)) else test_examples
    if promised:
        read, testing = _two_sets(read, testing)
        if doubts := too_few(len(testing), tolerance, confidence):
            warnings.warn(doubts, stacklevel=2)
    given: dict[str, Any] = {
        "metric": metric,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "progress": progress,
    }
    memory = DEFAULT_CACHE_GIB if cache_gib is None else cache_gib
    given |= {"cache_dir": cache_dir, "cache_gib": memory / 2 if promised else memory}
    given["ranker"] = FIRST_CHOICE if ranker in (None, AUTO) else ranker
    evaluator = Evaluator(model, processor, read, **given)
    tester = Evaluator(model, processor, testing, **given) if testing is not None and promised else None
    if ranker in (None, AUTO) and SEARCHES[chosen].chooses_ranker:
        options.setdefault("rankers", rankers_for(evaluator))
    goal = tolerance if budget is None else budget_of(evaluator, budget, budget_unit)
    if "early_stop" in options:
        options["confidence"] = options.pop("early_stop")
    found = SEARCHES[chosen](evaluator, goal, **options)
    found = replace(found, reduction=replace(found.reduction, weights=weights_of(evaluator.model)))
    if tester is None:
        return found
    path = along(found.reduction, path_for(evaluator, found))
    tester.share(Schedule.full(tester.num_layers), shared_layers(path))
    certificate = certify_path(path, tester, tolerance, confidence, on_step=_told_of_steps())
    return as_certified(found, path, certificate)


def _told_of_steps() -> Callable[[Step, int, int], None]:
    """What tells a notebook of each test of a path."""
    note = notebook.watcher().on_note

    def told(step: Step, place: int, schedules: int) -> None:
        note(f"schedule {place + 1} of {schedules}: {step.told}")

    return told


def _two_sets(
    examples: Sequence[Example], testing: Sequence[Example] | None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Examples to search on and to certify on, which share no image."""
    from ..evaluation.examples import check_examples

    check_examples(examples)
    if testing is None:
        return split_examples(examples, SHARED)
    check_examples(testing)
    check_disjoint(examples, testing)
    return examples, testing


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that the search does not take or cannot work with, before an image is read.

    Raises:
        ThinsightError: with the option that was meant or all that there are, or with the values it may have.
    """
    own = inspect.signature(search).parameters
    names = ("early_stop" if name == "confidence" else name for name in SEARCHES[method].parameters)
    taken = [name for name in names if name not in (*own, "evaluator")]
    for name in options:
        if name in taken:
            continue
        close = difflib.get_close_matches(name, [*taken, *own], n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(taken)}"
        raise BadInput(f"method {method!r} takes no option {name!r}: {meant}")
    whole(options.get("seed", 0), "seed", 0)
    if "solver" in taken:
        settings: dict[str, Any] = {name: options.get(name) for name in ("step", "trade_off", "n_trials")}
        solver = get_solver(options.get("solver", "bisect"), **settings)
        check_early_stop(solver, options.get("early_stop"), "early_stop")
    elif "n_trials" in options:
        whole(options["n_trials"], "n_trials", SEARCHES[method].least_trials)
