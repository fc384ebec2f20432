"""Searches: an evaluator in, a `SearchResult` out. Nothing here knows torch.

The package itself is callable, because the front door has both the package ``thinsight.search`` and the
function ``thinsight.search(model, processor, examples, max_drop=...)`` under one name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .adaptive import adaptive_search
from .frontier import Frontier, frontier
from .gsearch import gsearch
from .progress import Progress, SearchObserver, SearchPlan, Silent
from .psigmoid import psigmoid
from .random_search import random_search
from .result import SearchResult, Trial
from .search import search
from .sensitivity import sensitivity_search
from .solvers import Bayes, Bisect, LayerProblem, Solver
from .study import SearchEvaluator, Study

__all__ = [
    "Bayes",
    "Bisect",
    "Frontier",
    "LayerProblem",
    "Progress",
    "SearchEvaluator",
    "SearchObserver",
    "SearchPlan",
    "SearchResult",
    "Silent",
    "Solver",
    "Study",
    "Trial",
    "adaptive_search",
    "frontier",
    "gsearch",
    "psigmoid",
    "random_search",
    "search",
    "sensitivity_search",
]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> SearchResult:
        return search(*args, **kwargs)


_CallableModule.__call__.__doc__ = search.__doc__
sys.modules[__name__].__class__ = _CallableModule
