"""How examples are scored: the options of all commands that score, their checks, and the evaluator.

Knows nothing about which sets are scored, nor what for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from ..evaluation.batch_size import check_batch_size
from ..evaluation.evaluator import Evaluator
from ..evaluation.examples import Example
from ..evaluation.metrics import get_metric
from ..evaluation.result import Evaluation
from ..evaluation.store import DEFAULT_CACHE_GIB, DiskStore, FeatureStore
from ..progress import Watcher
from .session import Opened

__all__ = ["Scores", "ScoringOptions", "make_evaluator"]


@dataclass(frozen=True)
class ScoringOptions:
    """How examples are scored; see `thinsight.Evaluator`. ``cache_gib`` is for all sets together."""

    metric: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | str = 8
    cache_gib: float = DEFAULT_CACHE_GIB
    cache_dir: Path | None = None

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        if self.metric is not None:
            get_metric(self.metric)
        check_batch_size(self.batch_size)
        FeatureStore(self.cache_gib)
        if self.cache_dir is not None:
            DiskStore(self.cache_dir)


@dataclass(frozen=True)
class Scores:
    """An evaluation of all examples as a run folder keeps it; ``doubt`` is `Evaluator.doubt` of the full
    model's."""

    score: float
    per_example: tuple[float, ...]
    doubt: str = ""

    def __post_init__(self) -> None:
        if not all(0 <= score <= 1 for score in (self.score, *self.per_example)):
            raise BadInput("a score is not from 0 to 1, as every metric's is")

    @classmethod
    def of(cls, evaluation: Evaluation, doubt: str = "") -> Scores:
        """What is kept of a complete evaluation."""
        assert evaluation.per_example is not None
        return cls(evaluation.score, tuple(evaluation.per_example.tolist()), doubt)

    def evaluation(self) -> Evaluation:
        """The evaluation, without what is not kept."""
        return Evaluation(score=self.score, per_example=np.array(self.per_example))


def make_evaluator(
    options: ScoringOptions,
    opened: Opened,
    examples: Sequence[Example],
    watcher: Watcher,
    *,
    ranker: Any = "text-attention",
    sets: int = 1,
) -> Evaluator:
    """The evaluator of one set of examples.

    Args:
        options: how to score.
        opened: the model and its processor.
        examples: the set.
        watcher: told the progress.
        ranker: which tokens a bare schedule keeps.
        sets: how many evaluators share ``options.cache_gib``.

    Raises:
        ThinsightError: as `thinsight.Evaluator` does.
    """
    return Evaluator(
        opened.model,
        opened.processor,
        examples,
        metric=options.metric,
        batch_size=options.batch_size,
        ranker=ranker,
        max_new_tokens=options.max_new_tokens,
        progress=watcher.on_progress,
        cache_gib=options.cache_gib / sets,
        cache_dir=options.cache_dir,
    )
