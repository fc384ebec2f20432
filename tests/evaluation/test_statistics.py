"""Evaluation and the paired bootstrap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluation, paired_bootstrap


def test_evaluation_drop_and_checks() -> None:
    evaluation = Evaluation(score=0.9, full_score=1.0, per_example=[1, 0.8])
    assert evaluation.drop == pytest.approx(0.1)
    assert evaluation.per_example is not None
    assert evaluation.per_example.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        evaluation.per_example[0] = 0
    with pytest.raises(ThinsightError, match="full_score is None"):
        _ = Evaluation(score=0.9).drop
    with pytest.raises(ThinsightError, match="score is nan"):
        Evaluation(score=math.nan)
    with pytest.raises(ThinsightError, match="per_example has shape"):
        Evaluation(score=0.5, per_example=np.zeros((2, 2)))


def test_equal_columns_have_no_drop() -> None:
    scores = np.random.default_rng(0).random(50)
    interval = paired_bootstrap(scores, scores)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_seeded_and_ordered() -> None:
    rng = np.random.default_rng(1)
    full, reduced = rng.random(80), rng.random(80)
    first = paired_bootstrap(full, reduced, resamples=500, seed=4)
    assert first == paired_bootstrap(full, reduced, resamples=500, seed=4)
    assert first != paired_bootstrap(full, reduced, resamples=500, seed=5)
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(float(np.mean(full - reduced)))


def test_matches_the_normal_interval_of_many_examples() -> None:
    rng = np.random.default_rng(2)
    drops = rng.normal(0.3, 1.0, 2000)
    interval = paired_bootstrap(drops, np.zeros(2000), resamples=4000)
    half = 1.96 * drops.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(drops.mean() - half, abs=0.005)
    assert interval.high == pytest.approx(drops.mean() + half, abs=0.005)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        drops = (rng.random(120) < 0.3).astype(float)
        interval = paired_bootstrap(drops, np.zeros(120), resamples=400, level=0.9, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.82 <= hits / 200 <= 0.97


def test_groups_are_drawn_whole() -> None:
    drops = np.repeat([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], 20)
    groups = [f"image {i // 20}" for i in range(120)]
    alone = paired_bootstrap(drops, np.zeros(120))
    grouped = paired_bootstrap(drops, np.zeros(120), groups=groups)
    assert grouped.mean == alone.mean
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    single = paired_bootstrap(drops, np.zeros(120), groups=list(range(120)))
    assert single == alone


def test_unequal_groups_weigh_examples_alike() -> None:
    interval = paired_bootstrap([1.0, 1.0, 1.0, 0.0], [0.0] * 4, groups=["a", "a", "a", "b"], resamples=300)
    assert interval.mean == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"full": [], "reduced": []}, "shape"),
        ({"full": [1.0], "reduced": [1.0, 0.0]}, "shape"),
        ({"full": [[1.0]], "reduced": [[1.0]]}, "shape"),
        ({"full": [1.0], "reduced": [math.nan]}, "not finite"),
        ({"full": [1.0], "reduced": [1.0], "groups": [1, 2]}, "groups has 2"),
        ({"full": [1.0], "reduced": [1.0], "resamples": 0}, "resamples is 0"),
        ({"full": [1.0], "reduced": [1.0], "level": 95}, "level is 95"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ThinsightError, match=named):
        paired_bootstrap(**arguments)
