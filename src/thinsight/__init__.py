"""Searches the fewest vision tokens a multimodal LLM needs, layer by layer, and runs it with just those.

This is the front door: every public name, each loaded on first use, so that importing the package (or asking
the command for help) does not load torch.
"""

from __future__ import annotations

from importlib import import_module

from .version import __version__

TYPE_CHECKING = False  # the command answers to Ctrl-C once this is loaded, and typing takes long to load
if TYPE_CHECKING:  # what type checkers read; Python reads the table below, and a test holds the two together
    from typing import Any

    from . import baselines as baselines
    from . import budget as budget
    from . import cost as cost
    from . import errors as errors
    from . import timing as timing
    from .certificate import Certificate as Certificate
    from .checked import CheckResult as CheckResult
    from .checking import check as check
    from .errors import BadInput as BadInput
    from .errors import MissingPackage as MissingPackage
    from .errors import StorageError as StorageError
    from .errors import ThinsightError as ThinsightError
    from .errors import Unreachable as Unreachable
    from .errors import Unsupported as Unsupported
    from .evaluation import Answerer as Answerer
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Evaluator as Evaluator
    from .evaluation import Example as Example
    from .evaluation import Metric as Metric
    from .evaluation import Pool as Pool
    from .evaluation import RankConsistency as RankConsistency
    from .evaluation import drop_interval as drop_interval
    from .evaluation import load_examples as load_examples
    from .evaluation import paired_bootstrap as paired_bootstrap
    from .evaluation import rank_consistency as rank_consistency
    from .experimental.adaptive import adaptive_search as adaptive_search
    from .experimental.captured import CapturedPrefill as CapturedPrefill
    from .families import SupportedModel as SupportedModel
    from .families import models as models
    from .job.showing import show as show
    from .loading import load_demo as load_demo
    from .loading import load_model as load_model
    from .pretrained import ReductionConfig as ReductionConfig
    from .ranking import Ranker as Ranker
    from .ranking import get_ranker as get_ranker
    from .ranking import list_rankers as list_rankers
    from .reduction import Reduction as Reduction
    from .runtime import Handle as Handle
    from .runtime import apply as apply
    from .runtime import encode_images as encode_images
    from .runtime import remove as remove
    from .schedule import Adaptive as Adaptive
    from .schedule import Schedule as Schedule
    from .searches.certify import certify as certify
    from .searches.gsearch import gsearch as gsearch
    from .searches.priced import priced_search as priced_search
    from .searches.psigmoid import psigmoid as psigmoid
    from .searches.random_search import random_search as random_search
    from .searches.run import SearchResult as SearchResult
    from .searches.search import Search as Search
    from .searches.search import search as search
    from .searches.sensitivity import Frontier as Frontier
    from .searches.sensitivity import frontier as frontier
    from .searches.sensitivity import sensitivity_search as sensitivity_search

_MODULES = ("baselines", "budget", "cost", "errors", "timing")
_NAMES = {
    "certificate": ("Certificate",),
    "checked": ("CheckResult",),
    "checking": ("check",),
    "errors": ("BadInput", "MissingPackage", "StorageError", "ThinsightError", "Unreachable", "Unsupported"),
    "evaluation": (
        "Answerer",
        "Evaluation",
        "Evaluator",
        "Example",
        "Metric",
        "Pool",
        "RankConsistency",
        "drop_interval",
        "load_examples",
        "paired_bootstrap",
        "rank_consistency",
    ),
    "experimental.adaptive": ("adaptive_search",),
    "experimental.captured": ("CapturedPrefill",),
    "job.showing": ("show",),
    "loading": ("load_demo", "load_model"),
    "pretrained": ("ReductionConfig",),
    "ranking": ("Ranker", "get_ranker", "list_rankers"),
    "reduction": ("Reduction",),
    "runtime": ("Handle", "apply", "encode_images", "remove"),
    "schedule": ("Adaptive", "Schedule"),
    "searches": (
        "Frontier",
        "Search",
        "SearchResult",
        "certify",
        "frontier",
        "gsearch",
        "priced_search",
        "psigmoid",
        "random_search",
        "search",
        "sensitivity_search",
    ),
    "families": ("SupportedModel", "models"),
}
"""The public names, by the module that each comes from."""

_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
