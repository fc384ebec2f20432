"""Samples, agreement and other rankers of an evaluator, which searches under a budget live on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Adaptive, Schedule

LAYERS, NEW_TOKENS = 4, 4
STAIRS = Schedule([1, 1, 0.6, 0.3])
QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_llava(layers=LAYERS)
    model.generation_config.eos_token_id = [3, *range(40, 52)]  # so that answers end at various lengths
    return model


@pytest.fixture
def evaluator(model: Any) -> Evaluator:
    images = tiny_images(5)
    examples = [Example(f"e{i}", (images[i % 5],), QUESTIONS[i % 4]) for i in range(22)]
    return Evaluator(model, tiny_processor(), examples, batch_size=2, max_new_tokens=NEW_TOKENS)


def run_of(evaluation: Any) -> set[int]:
    return set(np.flatnonzero(~np.isnan(evaluation.per_example)).tolist())


def test_a_sample_is_a_part_of_the_whole(evaluator: Evaluator) -> None:
    whole = evaluator(STAIRS)
    before: set[int] = set()
    for share in (0.1, 0.25, 0.5, 1.0):
        sample = evaluator.sample(STAIRS, share)
        examples = run_of(sample)
        assert before <= examples
        assert run_of(evaluator.sample(Schedule([1, 0.5, 0.2, 0.1]), share)) == examples
        assert sample.share == len(examples) / 22
        assert abs(sample.share - share) <= 1 / 11
        assert sample.score == pytest.approx(np.mean([whole.per_example[i] for i in sorted(examples)]))
        before = examples
    assert sample.score == pytest.approx(whole.score)
    assert sample.agreement == pytest.approx(whole.agreement)


def test_a_sample_costs_what_it_runs_and_is_not_run_twice(evaluator: Evaluator) -> None:
    few = evaluator.sample(STAIRS, 0.25)
    more = evaluator.sample(STAIRS, 0.5)
    whole = evaluator(STAIRS)
    assert min(few.cost, more.cost, whole.cost) > 0
    again = evaluator.sample(STAIRS, 0.5)
    assert again.cost == 0
    assert again.score == more.score
    fresh = Evaluator(evaluator.model, tiny_processor(), evaluator.examples, batch_size=2, max_new_tokens=NEW_TOKENS)
    assert fresh(STAIRS).cost == pytest.approx(few.cost + more.cost + whole.cost)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_is_checked(evaluator: Evaluator, share: float) -> None:
    with pytest.raises(ThinsightError, match="share is"):
        evaluator.sample(STAIRS, share)


@torch.no_grad()
def probability(evaluator: Evaluator, index: int, schedule: Schedule) -> float:
    """That the model under a schedule gives to the full model's answer, one token at a time."""
    model, example = evaluator.model, evaluator.examples[index]
    inputs = tiny_processor()(
        text=f"USER: <image>\n{example.question} ASSISTANT:", images=example.images[0], return_tensors="pt"
    )
    length, total = inputs["input_ids"].shape[1], 0.0
    answer = evaluator.full_answers[index].tokens
    with apply(model, schedule) as handle:
        for place, token in enumerate(answer):
            ids = torch.cat([inputs["input_ids"], torch.tensor([list(answer[:place])]).long()], dim=1)
            is_prompt = torch.arange(ids.shape[1])[None] < length
            with handle.prompt(is_prompt):
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
    return float(np.exp(total))


@pytest.mark.parametrize("schedule", [Schedule.full(LAYERS), STAIRS], ids=["full", "stairs"])
def test_agreement_is_the_probability_of_the_full_models_answers(evaluator: Evaluator, schedule: Schedule) -> None:
    expected = np.mean([probability(evaluator, index, schedule) for index in range(22)])
    assert evaluator(schedule).agreement == pytest.approx(expected, rel=1e-3)
    assert evaluator.sample(schedule, 1.0).agreement == pytest.approx(expected, rel=1e-3)


def test_another_ranker_shares_what_was_computed(evaluator: Evaluator) -> None:
    evaluator.full  # noqa: B018
    other = evaluator.with_ranker("staged")
    assert (evaluator.first_layer, other.first_layer) == (1, 0)
    assert evaluator.first_layer_of("uniform") == 0
    assert other.full is evaluator.full
    assert other.fingerprint != evaluator.fingerprint
    early = Schedule([0.5, 0.5, 0.3, 0.3])
    assert other(early).score == evaluator(other.reduction(early)).score
    with pytest.raises(ThinsightError):
        evaluator(early)


def test_statistics_are_of_each_example_in_order(model: Any, evaluator: Evaluator) -> None:
    family = Adaptive("concentration", 2, (), (STAIRS,), (1.0,))
    reduction = Reduction(STAIRS, adaptive=family)
    values = evaluator.statistics(reduction)
    assert values.shape == (22,)
    one = Evaluator(model, tiny_processor(), evaluator.examples[:3], max_new_tokens=NEW_TOKENS, batch_size=1)
    np.testing.assert_allclose(one.statistics(reduction), values[:3], atol=1e-5)
    assert evaluator(reduction).cost == 0  # the same pass gave the answers
    assert evaluator(reduction).score == evaluator(STAIRS).score
    with pytest.raises(ThinsightError, match="the reduction is not adaptive"):
        evaluator.statistics(Reduction(STAIRS))


def test_an_adaptive_reduction_scores_each_prompt_under_its_own_schedule(evaluator: Evaluator) -> None:
    many, few = Schedule([1, 1, 0.9, 0.8]), Schedule([1, 1, 0.3, 0.1])
    values = evaluator.statistics(Reduction(STAIRS, adaptive=Adaptive("concentration", 2, (), (STAIRS,), (1.0,))))
    edge = float(np.median(values))
    family = Adaptive("concentration", 2, (edge,), (many, few), (0.5, 0.5))
    found = evaluator(Reduction(family.mean(), adaptive=family))
    wanted = np.where(values < edge, evaluator(many).per_example, evaluator(few).per_example)
    np.testing.assert_array_equal(found.per_example, wanted)
