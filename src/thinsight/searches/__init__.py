"""Searches: an evaluator in, a `SearchResult` out. Nothing here knows torch."""

from __future__ import annotations

from ..evaluation.base import SearchEvaluator, StandIn
from ..progress import Progress, SearchObserver, SearchPlan, Silent
from .certify import certify
from .gsearch import Bayes, Bisect, LayerProblem, Solver, gsearch
from .priced import priced_search
from .psigmoid import psigmoid
from .random_search import random_search
from .run import Run, SearchResult, Trial
from .search import SEARCHES, Search, search
from .sensitivity import Frontier, frontier, sensitivity_search
from .study import Study
