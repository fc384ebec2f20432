"""The embedded demos: small, offline, see, and show on a few questions what the main job shows on all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thinsight as ts
from thinsight.errors import ThinsightError
from training.check import blind_accuracy

DEMO = Path(ts.__file__).parent / "demo"
QUESTIONS = 96


@dataclass(frozen=True)
class Demo:
    """What an embedded model is, and what it must show."""

    name: str
    folder: str
    megabytes: float
    architecture: str
    layers: int
    vision_tokens: int
    stages: dict[int, float]  # keep rates from these layers on, under which it answers as well
    fewer_flops: float  # how many times fewer FLOPs that is, at least


DEMOS = [
    Demo("demo", "model", 40, "LlavaForConditionalGeneration", 12, 256, {2: 0.5, 6: 0.3, 10: 0.2}, 2.0),
    Demo("demo-internvl", "model-internvl", 30, "InternVLForConditionalGeneration", 14, 64,
         {3: 0.6, 7: 0.4, 12: 0.25}, 1.3),
]  # fmt: skip


def _bytes(pattern: str) -> int:
    return sum(path.stat().st_size for path in DEMO.rglob(pattern) if path.is_file())


@pytest.fixture(scope="module", params=DEMOS, ids=lambda demo: demo.name)
def expected(request: pytest.FixtureRequest) -> Demo:
    return request.param


@pytest.fixture(scope="module")
def demo(expected: Demo) -> tuple[Any, Any]:
    return ts.load_demo(name=expected.name)


@pytest.fixture(scope="module")
def questions() -> list[ts.Example]:
    return ts.load_examples("demo:test", limit=QUESTIONS, seed=1)


@pytest.fixture(scope="module")
def evaluator_of(demo: tuple[Any, Any], questions: list[ts.Example]) -> Callable[[str], ts.Evaluator]:
    return lambda ranker: ts.Evaluator(*demo, questions, batch_size=32, ranker=ranker)


@pytest.fixture(scope="module")
def evaluator(evaluator_of: Callable[[str], ts.Evaluator]) -> ts.Evaluator:
    return evaluator_of("text-attention")


def test_the_data_are_small_and_there_is_no_pickle() -> None:
    assert _bytes("*.webp") + _bytes("*.jsonl") <= 15e6
    assert not [path for path in DEMO.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_it_is_small(expected: Demo) -> None:
    assert 0 < _bytes(f"{expected.folder}/*") <= expected.megabytes * 1e6


def test_it_is_a_stock_model(expected: Demo, demo: tuple[Any, Any]) -> None:
    model, processor = demo
    for part in (model, processor):
        assert type(part).__module__.startswith("transformers.")
    assert type(model).__name__ == expected.architecture
    assert model.config.text_config.num_hidden_layers == expected.layers


def test_it_answers_and_needs_the_image(
    expected: Demo, demo: tuple[Any, Any], questions: list[ts.Example], evaluator: ts.Evaluator
) -> None:
    assert evaluator.num_vision_tokens == expected.vision_tokens
    assert evaluator.full_score >= 0.85
    assert blind_accuracy(*demo, questions) < 0.3


def test_less_arithmetic_gives_the_same_answers(expected: Demo, demo: tuple[Any, Any], evaluator: ts.Evaluator) -> None:
    schedule = ts.Schedule.stages(evaluator.num_layers, expected.stages)
    assert evaluator(schedule).drop <= 0.01
    size = {"n_vision": evaluator.num_vision_tokens, "n_text": 14}
    config = demo[0].config
    full, reduced = (ts.cost.flops(config, **size, schedule=s) for s in (None, schedule))
    assert full / reduced >= expected.fewer_flops


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


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ThinsightError, match="name is 'demo-qwen': the embedded models are demo, demo-internvl"):
        ts.load_demo(name="demo-qwen")
