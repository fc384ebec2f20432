"""Rows of a report from plain evaluations: scores by task, costs of the median prompt, names in words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from thinsight import cost
from thinsight.evaluation.examples import Example
from thinsight.evaluation.result import Evaluation
from thinsight.job.findings import MedianPrompt, drop_of, method_row, metric_words, ranker_words, task_rows
from thinsight.schedule import Schedule

CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 10,
}
IMAGE = Image.new("RGB", (2, 2))


def example(name: str, task: str | None = None, group: str = "", **fields: object) -> Example:
    extra = {} if task is None else {"task": task}
    return Example(name, (IMAGE,), "what ?", group=group or name, extra=extra, **fields)  # type: ignore[arg-type]


def evaluation(scores: list[float]) -> Evaluation:
    return Evaluation(score=float(np.mean(scores)), per_example=np.array(scores))


def test_tasks_in_order_of_appearance() -> None:
    examples = [example("1", "count"), example("2", "color"), example("3", "count"), example("4")]
    rows = task_rows(evaluation([1, 1, 0, 1]), evaluation([0, 1, 0, 1]), examples)
    assert [(row.task, row.n, row.full, row.reduced) for row in rows] == [
        ("count", 2, 0.5, 0.0),
        ("color", 1, 1.0, 1.0),
    ]


def test_the_interval_resamples_images_not_questions() -> None:
    rng = np.random.default_rng(0)
    by_image = rng.integers(0, 2, 40).astype(float)
    reduced = np.repeat(by_image, 5)  # all questions on an image succeed or fail together
    full = np.ones(200)
    clustered = [example(str(i), group=str(i // 5)) for i in range(200)]
    alone = [example(str(i)) for i in range(200)]
    wide = drop_of(evaluation(full.tolist()), evaluation(reduced.tolist()), clustered)
    narrow = drop_of(evaluation(full.tolist()), evaluation(reduced.tolist()), alone)
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)  # sqrt(5) = 2.2 times


def test_the_median_prompt() -> None:
    prompt = MedianPrompt.of(CONFIG, [(16, 5), (16, 9), (32, 7)])
    assert (prompt.n_vision, prompt.n_text) == (16, 7)
    assert prompt.flops() == cost.flops(CONFIG, n_vision=16, n_text=7)


def test_method_row_ratio_is_full_over_reduced() -> None:
    prompt = MedianPrompt(CONFIG, 16, 7)
    schedule = Schedule.step(4, 1, 0.25)
    row = method_row("one step", "found", schedule, evaluation([1.0, 0.0]), None, prompt)
    assert row.flops == prompt.flops(schedule)
    assert row.flops_ratio == pytest.approx(prompt.flops() / prompt.flops(schedule))
    assert row.flops_ratio > 1
    assert row.score == 0.5
    assert prompt.budget(schedule).holds(schedule)


def test_words() -> None:
    labeled = example("1", answers=("red",))
    assert metric_words([labeled, example("2")]) == "agreement, exact_match"
    assert metric_words([example("3", answers=("a",), metric="anls")]) == "anls"
    assert ranker_words({"name": "uniform"}) == "uniform"
    assert ranker_words({"name": "text-attention", "queries": "last"}) == "text-attention (queries last)"
