"""What benchmarks report of all scores, worked out by hand, and how sure its drop is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thinsight.evaluation.benchmarks import BENCHMARKS, measured
from thinsight.evaluation.benchmarks.measures import Measure, all_right, mean, over_categories, yes_measures
from thinsight.evaluation.example import Example

IMAGE = Image.new("RGB", (4, 4))


def example(number: int, group: str, answer: str = "yes", **extra: Any) -> Example:
    return Example(str(number), (IMAGE,), "?", (answer,), group=group, extra=extra)


def by_name(name: str) -> dict[str, Measure]:
    return {measure.name: measure for measure in BENCHMARKS[name].measures}


def test_mme_adds_accuracy_and_accuracy_plus_over_subtasks() -> None:
    asked = [
        ("color", "a", 1),
        ("color", "a", 1),
        ("color", "b", 1),
        ("color", "b", 0),
        ("count", "c", 0),
        ("count", "c", 1),
    ]
    asked += [("code_reasoning", "d", 1), ("code_reasoning", "d", 1)]
    examples = [example(n, image, task=task) for n, (task, image, _) in enumerate(asked)]
    scores = np.array([float(score) for *_, score in asked])
    measures = by_name("mme")
    # color: 3 of 4, 1 of 2 images; count: 1 of 2, 0 of 1
    assert measures["perception, of 2000"].of(examples, scores) == pytest.approx(0.75 + 0.5 + 0.5)
    assert measures["cognition, of 800"].of(examples, scores) == pytest.approx(2.0)
    assert measures["accuracy"].of(examples, scores) == pytest.approx(6 / 8)
    assert measures["accuracy+"].of(examples, scores) == pytest.approx(2 / 4)


def test_pope_of_a_confusion_by_hand() -> None:
    labels = ["yes"] * 5 + ["no"] * 5
    scores = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 0], dtype=float)  # 3 right, 2 missed, 1 false alarm
    examples = [example(n, str(n), label) for n, label in enumerate(labels)]
    found = {measure.name: measure.of(examples, scores) for measure in yes_measures()}
    assert found == {
        "F1": pytest.approx(6 / 9),
        "precision": pytest.approx(3 / 4),
        "recall": pytest.approx(3 / 5),
        "share of yes": pytest.approx(4 / 10),
    }
    nothing = {measure.name: measure.of(examples[5:], np.ones(5)) for measure in yes_measures()}
    assert nothing == {"F1": 0, "precision": 0, "recall": 0, "share of yes": 0}


def test_mmbench_counts_a_question_that_is_right_in_all_rotations() -> None:
    examples = [example(n, "a", unit=unit) for n, unit in enumerate("11122233")]
    scores = np.array([1, 1, 1, 1, 0, 1, 1, 1], dtype=float)
    measures = by_name("mmbench")
    assert measures["circular accuracy"].of(examples, scores) == pytest.approx(2 / 3)
    assert measures["accuracy of single rotations"].of(examples, scores) == pytest.approx(7 / 8)


def test_hallusionbench_by_question_and_by_figure() -> None:
    rows = [  # category, set, figure, question, score
        ("VD", "1", "0", "0", 1),
        ("VD", "1", "1", "0", 1),
        ("VD", "1", "0", "1", 1),
        ("VD", "1", "1", "1", 0),
        ("VS", "2", "0", "0", 0),
        ("VS", "2", "1", "0", 1),
    ]
    examples = [
        example(n, f"{kind}{group}{figure}", task=kind, unit=f"{kind}_{group}", figure_id=figure, asked=question)
        for n, (kind, group, figure, question, _) in enumerate(rows)
    ]
    scores = np.array([row[-1] for row in rows], dtype=float)
    measures = by_name("hallusionbench")
    assert measures["aAcc"].of(examples, scores) == pytest.approx(4 / 6)
    assert measures["qAcc"].of(examples, scores) == pytest.approx(1 / 3)
    assert measures["fAcc"].of(examples, scores) == pytest.approx(2 / 3)  # the figure that is none is left out


def test_categories_count_alike() -> None:
    examples = [example(n, str(n), task=task) for n, task in enumerate("aaab")]
    scores = np.array([1, 1, 1, 0], dtype=float)
    assert over_categories("m", lambda e: str(e.task), total=False).of(examples, scores) == pytest.approx(0.5)


def test_a_measure_without_any_of_its_questions_is_left_out() -> None:
    examples = [example(n, str(n), benchmark="chartqa", task="human") for n in range(4)]
    found = measured(examples, np.ones(4), np.array([1, 0, 1, 1.0]))
    assert [(each.benchmark, each.name, each.units) for each in found] == [
        ("ChartQA", "relaxed accuracy", 4),
        ("ChartQA", "human", 4),
    ]
    assert (found[0].full, found[0].reduced, found[0].drop.mean) == (1.0, 0.75, 0.25)


def test_examples_of_no_benchmark_are_not_measured() -> None:
    assert measured([example(0, "a")], np.ones(1), np.ones(1)) == ()


def sets(seed: int = 0) -> tuple[list[Example], np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    examples = [example(n, f"image {n // 2}", ("yes", "no")[n % 2], task=f"t{n % 3}", unit=n // 2) for n in range(120)]
    full = (draw.random(120) < 0.8).astype(float)
    reduced = np.where(draw.random(120) < 0.1, 1 - full, full)
    return examples, full, reduced


MEASURES = [
    mean("mean"),
    all_right("all", lambda e: e.extra["unit"]),
    over_categories("sum", lambda e: str(e.task), total=True),
    over_categories("subjects", lambda e: str(e.task), total=False),
    over_categories("with units", lambda e: str(e.task), total=True, unit=lambda e: (e.task, e.group)),
    *yes_measures(),
]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_drop_lies_in_its_interval_which_has_a_width(measure: Measure) -> None:
    examples, full, reduced = sets()
    found = measure.drop(examples, full, reduced)
    assert found.mean == pytest.approx(measure.of(examples, full) - measure.of(examples, reduced))
    assert found.low < found.mean < found.high
    assert found == measure.drop(examples, full, reduced)
    back = measure.drop(examples, reduced, full)
    assert back.mean == pytest.approx(-found.mean)
    same = measure.drop(examples, full, full)
    assert same.mean == 0
    assert same.low < 0 < same.high  # no change in so few examples is no proof of none
    assert math.isfinite(same.low + same.high)


def test_more_examples_make_a_narrower_interval() -> None:
    examples, full, reduced = sets()
    many = [example(n, f"image {n // 2}", ("yes", "no")[n % 2]) for n in range(1200)]
    f1 = yes_measures()[0]
    one, other = f1.drop(examples, full, reduced), f1.drop(many, np.tile(full, 10), np.tile(reduced, 10))
    assert other.high - other.low < 0.5 * (one.high - one.low)


def test_the_interval_of_f1_holds_the_true_drop_as_often_as_it_says() -> None:
    """Drawn sets whose true drop is known: labels alternate, so F1 of the whole population is worked out exactly."""
    right, turned, n, missed = 0.85, 0.1, 120, 0
    after = right * (1 - turned) + (1 - right) * turned

    def f1(hit: float) -> float:
        return 2 * hit / (2 * hit + (1 - hit) + (1 - hit))

    truth = f1(right) - f1(after)
    examples = [example(k, str(k), ("yes", "no")[k % 2]) for k in range(n)]
    for seed in range(40):
        draw = np.random.default_rng(seed)
        full = (draw.random(n) < right).astype(float)
        reduced = np.where(draw.random(n) < turned, 1 - full, full)
        found = yes_measures()[0].drop(examples, full, reduced)
        missed += not found.low <= truth <= found.high
    assert missed <= 6  # of 40 at 95 %: more would happen once in 300
