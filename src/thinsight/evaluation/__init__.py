"""Examples, metrics and the evaluator that maps a reduction to a score.

Light to import: what needs torch is loaded on first use, so a search or a test's oracle needs no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .result import Evaluation as Evaluation
from .result import Interval as Interval
from .result import RankConsistency as RankConsistency
from .result import drop_interval as drop_interval
from .result import paired_bootstrap as paired_bootstrap

if TYPE_CHECKING:
    from .answering import Answer as Answer
    from .answering import Answerer as Answerer
    from .consistency import attention_statistics as attention_statistics
    from .consistency import rank_consistency as rank_consistency
    from .evaluator import Evaluator as Evaluator
    from .examples import Example as Example
    from .examples import load_examples as load_examples
    from .metrics import Metric as Metric
    from .shards import Pool as Pool

_LAZY = {
    "Answer": "answering",
    "Answerer": "answering",
    "Evaluator": "evaluator",
    "Example": "examples",
    "Metric": "metrics",
    "Pool": "shards",
    "attention_statistics": "consistency",
    "load_examples": "examples",
    "rank_consistency": "consistency",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
