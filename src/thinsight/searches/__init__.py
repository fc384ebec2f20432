"""Searches: an evaluator in, a `SearchResult` out. Nothing here knows torch."""

from __future__ import annotations

from ..progress import Progress, SearchObserver, SearchPlan, Silent
from .adaptive import adaptive_search
from .certify import certify
from .frontier import Frontier, frontier
from .gsearch import Bayes, Bisect, LayerProblem, Solver, gsearch
from .psigmoid import psigmoid
from .random_search import random_search
from .result import SearchResult, Trial
from .search import search
from .sensitivity import sensitivity_search
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
    "certify",
    "frontier",
    "gsearch",
    "psigmoid",
    "random_search",
    "search",
    "sensitivity_search",
]
