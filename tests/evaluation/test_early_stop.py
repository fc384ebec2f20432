"""`Evaluator.at_least` with a confidence, on a tiny random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example
from thinsight.schedule import Schedule

STAIRS, NOTHING = Schedule([1, 1, 0.6, 0.3]), Schedule([1, 0.5, 0, 0])
QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")


def make_evaluator() -> Evaluator:
    images = tiny_images(6)
    examples = [Example(f"e{i}", (images[i % 6],), QUESTIONS[i % 4]) for i in range(24)]
    return Evaluator(tiny_llava(layers=4), tiny_processor(), examples, batch_size=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return make_evaluator()


def run_of(evaluation: Any) -> list[int]:
    return np.flatnonzero(~np.isnan(evaluation.per_example)).tolist()


def test_what_reaches_the_floor_is_given_up_no_more_often_than_promised(evaluator: Evaluator) -> None:
    score = evaluator(STAIRS).score  # from here on its answers are known
    assert 0 < score < 1
    found = [evaluator.at_least(STAIRS, score, confidence=0.8, seed=seed) for seed in range(80)]
    given_up = [each for each in found if not each.complete]
    assert 0 < len(given_up) <= 0.2 * len(found)  # never to give up would be easy
    assert all(each.score == score for each in found if each.complete)


def test_what_is_below_the_floor_is_given_up_or_run_whole(evaluator: Evaluator) -> None:
    exact = evaluator(NOTHING)
    assert exact.score < 0.9
    for seed in range(20):
        found = evaluator.at_least(NOTHING, 0.9, confidence=0.95, seed=seed)
        run = run_of(found)
        assert found.complete == (len(run) == 24)
        assert found.per_example[run].tolist() == exact.per_example[run].tolist()
        assert found.score <= 0.9


def test_the_order_depends_on_seed_and_schedule_alone() -> None:
    def order_of(evaluator: Evaluator, schedule: Schedule, seed: int) -> list[list[int]]:
        return evaluator._draw(evaluator._bind(schedule), 0.5, 0.9, seed)[0]

    fresh, used = make_evaluator(), make_evaluator()
    used(STAIRS)
    used.at_least(NOTHING, 0.9)
    order = order_of(fresh, STAIRS, 0)
    assert sorted(order) == sorted(fresh._batches)
    assert order_of(used, STAIRS, 0) == order
    assert order_of(fresh, STAIRS, 1) != order
    assert order_of(fresh, NOTHING, 0) != order


def test_without_a_confidence_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an order was drawn")

    monkeypatch.setattr(Evaluator, "_draw", refuse)
    one, other = make_evaluator(), make_evaluator()
    for floor in (0.2, 0.6, 0.95):
        early, plain = one.at_least(NOTHING, floor, confidence=None), other.at_least(NOTHING, floor)
        assert (early.score, early.complete) == (plain.score, plain.complete)
        assert run_of(early) == run_of(plain)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_bad_confidence_is_named(evaluator: Evaluator, confidence: float) -> None:
    with pytest.raises(ThinsightError, match="confidence is"):
        evaluator.at_least(STAIRS, 0.5, confidence=confidence)
