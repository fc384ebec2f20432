"""Examples, metrics and the evaluator that maps a reduction to a score.

Light to import: what needs torch is loaded on first use, so a search or a test's oracle needs no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .result import Evaluation, RankConsistency
from .statistics import Interval, drop_interval, paired_bootstrap

if TYPE_CHECKING:
    from .consistency import attention_statistics, rank_consistency
    from .evaluator import Evaluator
    from .examples import Example, load_examples
    from .metrics import METRICS, get_metric
    from .pool import EvaluatorPool

__all__ = [
    "METRICS",
    "Evaluation",
    "Evaluator",
    "EvaluatorPool",
    "Example",
    "Interval",
    "RankConsistency",
    "attention_statistics",
    "drop_interval",
    "get_metric",
    "load_examples",
    "paired_bootstrap",
    "rank_consistency",
]

_LAZY = {
    "METRICS": "metrics",
    "Evaluator": "evaluator",
    "EvaluatorPool": "pool",
    "Example": "examples",
    "attention_statistics": "consistency",
    "get_metric": "metrics",
    "load_examples": "examples",
    "rank_consistency": "consistency",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
