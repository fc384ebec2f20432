"""The embedded demo: small, offline, sees, and shows on a few questions what the main job shows on all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thinsight as ts
from training.check import blind_accuracy

DEMO = Path(ts.__file__).parent / "demo"
QUESTIONS = 96


def _bytes(pattern: str) -> int:
    return sum(path.stat().st_size for path in DEMO.rglob(pattern) if path.is_file())


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return ts.load_demo()


@pytest.fixture(scope="module")
def questions() -> list[ts.Example]:
    return ts.load_examples("demo:test", limit=QUESTIONS, seed=1)


@pytest.fixture(scope="module")
def evaluator_of(demo: tuple[Any, Any], questions: list[ts.Example]) -> Callable[[str], ts.Evaluator]:
    return lambda ranker: ts.Evaluator(*demo, questions, batch_size=32, ranker=ranker)


@pytest.fixture(scope="module")
def evaluator(evaluator_of: Callable[[str], ts.Evaluator]) -> ts.Evaluator:
    return evaluator_of("text-attention")


def test_it_is_small_and_holds_no_pickle() -> None:
    assert _bytes("model/*") <= 40e6
    assert _bytes("*.webp") + _bytes("*.jsonl") <= 15e6
    assert not [path for path in DEMO.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_it_is_a_stock_llava(demo: tuple[Any, Any]) -> None:
    model, _ = demo
    assert type(model).__module__.startswith("transformers.")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.text_config.num_hidden_layers >= 12


def test_it_answers_and_needs_the_image(
    demo: tuple[Any, Any], questions: list[ts.Example], evaluator: ts.Evaluator
) -> None:
    assert evaluator.num_vision_tokens >= 256
    assert evaluator.full_score >= 0.85
    assert blind_accuracy(*demo, questions) < 0.3


def test_half_the_arithmetic_gives_the_same_answers(demo: tuple[Any, Any], evaluator: ts.Evaluator) -> None:
    schedule = ts.Schedule.stages(evaluator.num_layers, {2: 0.5, 6: 0.3, 10: 0.2})
    assert evaluator(schedule).drop <= 0.01
    size = {"n_vision": evaluator.num_vision_tokens, "n_text": 14}
    config = demo[0].config
    assert ts.cost.flops(config, **size) / ts.cost.flops(config, **size, schedule=schedule) >= 2


def test_ranking_by_text_attention_beats_chance(
    questions: list[ts.Example], evaluator: ts.Evaluator, evaluator_of: Callable[[str], ts.Evaluator]
) -> None:
    step = ts.Schedule.step(evaluator.num_layers, 2, 0.25)
    by_attention, by_chance = evaluator(step).per_example, evaluator_of("random")(step).per_example
    gain = ts.paired_bootstrap(by_attention, by_chance, groups=[e.group for e in questions])
    assert gain.low > 0


def test_layers_after_the_first_rank_alike(demo: tuple[Any, Any], questions: list[ts.Example]) -> None:
    consistency = ts.rank_consistency(*demo, questions[:16])
    first, *others = np.asarray(consistency.tau)
    assert first < min(others)
    assert not consistency.is_low
