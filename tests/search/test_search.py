"""The package under its two names: a room that is light to import, and the one-call search."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight.search
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation import Evaluator, Example

SOURCE = Path(__file__).parents[2] / "src"


def test_searching_imports_no_model_code() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from thinsight.search import gsearch\n"
        "from thinsight.evaluation import Evaluation\n"
        "class Oracle:\n"
        "    num_layers, num_vision_tokens, full_score = 4, 8, 1.0\n"
        "    def __call__(self, schedule): return Evaluation(score=float(schedule.counts(8)[2] >= 3))\n"
        "assert gsearch(Oracle(), 0.0).schedule.counts(8) == (8, 8, 3, 0)\n"
        "print([name for name in ('torch', 'transformers', 'optuna') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_lazy_name_is_there() -> None:
    assert all(getattr(thinsight.evaluation, name) is not None for name in thinsight.evaluation.__all__)


def examples(folder: Path) -> list[Example]:
    """Four questions without answers, so that agreement with the full model is what counts."""
    result = []
    for number, image in enumerate(tiny_images(2)):
        path = folder / f"{number}.png"
        image.save(path)
        for question in ("what color is the square ?", "how many are left ?"):
            result.append(Example(f"{number} {question}", (path,), question, metric="agreement"))
    return result


def test_one_call_searches_a_model(tmp_path: Path) -> None:
    model, processor, asked = tiny_llava(), tiny_processor(), examples(tmp_path)
    options = {"ranker": "uniform", "max_new_tokens": 3}
    result = thinsight.search(model, processor, asked, 0.25, study=tmp_path / "s", **options)  # type: ignore[operator]
    evaluator = Evaluator(model, processor, asked, **options)
    assert result.score == evaluator(result.schedule).score >= 0.75
    assert result.schedule == thinsight.search.gsearch(evaluator, 0.25).schedule
    assert result.reduction.ranker["name"] == "uniform"
    assert result.reduction.model_type == "llava"
    assert result.cost is not None
    assert result.cost > 0


def test_one_call_refuses_labels_that_no_answer_meets(tmp_path: Path) -> None:
    wrong = [replace(each, answers=("zzz",), metric=None) for each in examples(tmp_path)]
    for options in ({"max_drop": 0.1}, {"budget": 0.5, "n_trials": 8}):
        with pytest.raises(
            BadInput, match=r"scores 0.0 % .*it says '.*', the label is 'zzz' \(exact_match\)"
        ):
            thinsight.search(tiny_llava(), tiny_processor(), wrong, max_new_tokens=3, **options)  # type: ignore[operator]


def test_one_call_reads_examples_from_a_path(tmp_path: Path) -> None:
    with pytest.raises(ThinsightError, match=r"nowhere\.jsonl"):
        thinsight.search(tiny_llava(), tiny_processor(), tmp_path / "nowhere.jsonl")  # type: ignore[operator]
