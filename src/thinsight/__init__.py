"""Searches the fewest vision tokens a multimodal LLM needs, layer by layer, and runs it with just those.

This is the front door: every public name, each loaded on first use, so that importing the package (or asking
the command for help) does not load torch.
"""

from __future__ import annotations

from importlib import import_module

from .version import __version__

TYPE_CHECKING = False  # the command answers to Ctrl-C once this file is loaded, and typing takes long to load
if TYPE_CHECKING:
    from typing import Any

    from . import cost
    from .adaptive import Adaptive
    from .errors import ThinsightError
    from .evaluation import (
        Evaluation,
        Evaluator,
        EvaluatorPool,
        Example,
        RankConsistency,
        load_examples,
        paired_bootstrap,
        rank_consistency,
    )
    from .loading import load_demo, load_model
    from .packing import PackedModel, pack
    from .ranking import Ranker, get_ranker, list_rankers
    from .reduction import Reduction
    from .runtime import CapturedPrefill, Handle, apply, encode_images
    from .schedule import Schedule
    from .search.adaptive import adaptive_search
    from .search.frontier import Frontier, frontier
    from .search.gsearch import gsearch
    from .search.psigmoid import psigmoid
    from .search.random_search import random_search
    from .search.result import SearchResult
    from .search.search import search
    from .supported import SupportedModel, models

_HOMES = {
    "Adaptive": "adaptive",
    "CapturedPrefill": "runtime",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "EvaluatorPool": "evaluation",
    "Example": "evaluation",
    "Frontier": "search",
    "Handle": "runtime",
    "PackedModel": "packing",
    "RankConsistency": "evaluation",
    "Ranker": "ranking",
    "Reduction": "reduction",
    "Schedule": "schedule",
    "SearchResult": "search",
    "SupportedModel": "supported",
    "ThinsightError": "errors",
    "adaptive_search": "search",
    "apply": "runtime",
    "encode_images": "runtime",
    "frontier": "search",
    "get_ranker": "ranking",
    "gsearch": "search",
    "list_rankers": "ranking",
    "load_demo": "loading",
    "load_examples": "evaluation",
    "load_model": "loading",
    "models": "supported",
    "pack": "packing",
    "paired_bootstrap": "evaluation",
    "psigmoid": "search",
    "random_search": "search",
    "rank_consistency": "evaluation",
    "sensitivity_search": "search",
}
_MODULES = ("cost", "search")  # `thinsight.search` is a package that can be called like a function

__all__ = [
    "Adaptive",
    "CapturedPrefill",
    "Evaluation",
    "Evaluator",
    "EvaluatorPool",
    "Example",
    "Frontier",
    "Handle",
    "PackedModel",
    "RankConsistency",
    "Ranker",
    "Reduction",
    "Schedule",
    "SearchResult",
    "SupportedModel",
    "ThinsightError",
    "__version__",
    "adaptive_search",
    "apply",
    "cost",
    "encode_images",
    "frontier",
    "get_ranker",
    "gsearch",
    "list_rankers",
    "load_demo",
    "load_examples",
    "load_model",
    "models",
    "pack",
    "paired_bootstrap",
    "psigmoid",
    "random_search",
    "rank_consistency",
    "search",
    "sensitivity_search",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
