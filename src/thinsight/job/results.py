"""Turns evaluations into the rows that a report shows: plain numbers in, plain dataclasses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import cost
from ..budget import FlopsBudget
from ..errors import Unsupported
from ..evaluation.examples import Example
from ..evaluation.metrics import metric_for
from ..evaluation.result import Evaluation, Interval, drop_interval
from ..report.data import MethodRow, TaskRow
from ..schedule import Schedule


@dataclass(frozen=True)
class MedianPrompt:
    """The prompt whose cost stands for a data set: median vision tokens and median other tokens."""

    config: Any
    n_vision: int
    n_text: int

    @classmethod
    def of(cls, config: Any, sizes: Sequence[tuple[int, int]]) -> MedianPrompt:
        """From each prompt's (vision tokens, other tokens)."""
        vision, text = np.array(sizes).T  # (prompts,), (prompts,)
        return cls(config, int(np.median(vision)), int(np.median(text)))

    def flops(self, schedule: Schedule | None = None) -> float:
        """Decoder prefill FLOPs of this prompt."""
        return cost.flops(self.config, n_vision=self.n_vision, n_text=self.n_text, schedule=schedule)

    def vision_flops(self) -> float | None:
        """FLOPs of the vision encoder, this prompt's vision tokens taken as one image's.

        None where they cannot be told from config and token count.
        """
        try:
            return cost.vision_flops(self.config, n_vision=self.n_vision)
        except Unsupported:
            return None

    def budget(self, schedule: Schedule) -> FlopsBudget:
        """What ``schedule`` spends on this prompt, for methods that are to cost the same."""
        return FlopsBudget.like(self.config, schedule, n_vision=self.n_vision, n_text=self.n_text)


def metric_words(examples: Sequence[Example]) -> str:
    """The metrics that the examples are scored with when none is asked for."""
    names = {metric_for(example.answers, example.metric, f"example {example.id!r}").name for example in examples}
    return ", ".join(sorted(names))


def ranker_words(ranker: Mapping[str, Any]) -> str:
    """``{"name": "text-attention", "queries": "last"}`` as "text-attention (queries last)"."""
    settings = ", ".join(f"{key} {value}" for key, value in ranker.items() if key != "name")
    return f"{ranker['name']} ({settings})" if settings else str(ranker["name"])


def drop_of(full: Evaluation, reduced: Evaluation, examples: Sequence[Example]) -> Interval:
    """Mean drop with its 95 % interval, questions about one image taken together."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    groups = [example.group for example in examples]
    return drop_interval(full.per_example, reduced.per_example, groups=groups)


def method_row(
    name: str,
    kind: str,
    schedule: Schedule,
    evaluation: Evaluation,
    drop: Interval | None,
    prompt: MedianPrompt,
    note: str = "",
) -> MethodRow:
    """One method's line in the comparison."""
    flops = prompt.flops(schedule)
    return MethodRow(
        name=name,
        keep_rates=schedule.keep_rates,
        score=evaluation.score,
        drop=drop,
        mean_keep_rate=schedule.mean_keep_rate,
        flops=flops,
        flops_ratio=prompt.flops() / flops,
        note=note,
        kind=kind,
    )


def task_rows(full: Evaluation, reduced: Evaluation, examples: Sequence[Example]) -> tuple[TaskRow, ...]:
    """Scores by task, in order of appearance; nothing when no example names its task."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if example.task is not None:
            places.setdefault(example.task, []).append(place)
    return tuple(
        TaskRow(task, len(at), float(full.per_example[at].mean()), float(reduced.per_example[at].mean()))
        for task, at in places.items()
    )
