"""The searches' room, which is light to import, and the one-call search."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from thinsight import evaluation
from thinsight.budget import KeepBudget, LatencyModel, make_budget
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation import Evaluator, Example
from thinsight.searches import frontier, psigmoid

SOURCE = Path(__file__).parents[2] / "src"


def test_searching_imports_no_model_code() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from thinsight.searches import gsearch\n"
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


def test_an_empty_method_is_not_the_default() -> None:
    for budget, max_drop in ((None, 0.1), (0.5, None)):
        with pytest.raises(ThinsightError, match="method is ''; choose one of gsearch"):
            ts.search(None, None, [], max_drop, budget=budget, method="")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": 5}, "max_drop is 5, but scores lie between 0 and 1: .*, 0.05 for 5 points"),
        ({"budget_unit": "furlongs"}, "budget_unit is 'furlongs' without a budget"),
        ({"max_drop": 0.01, "budget_unit": "ms"}, "budget_unit is 'ms' without a budget"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        ts.search(None, None, [], **options)


def test_every_lazy_name_is_there() -> None:
    assert all(getattr(evaluation, name) is not None for name in evaluation._LAZY)


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
    result = ts.search(model, processor, asked, 0.25, study=tmp_path / "s", certify=False, **options)
    assert result.certificate is None
    evaluator = Evaluator(model, processor, asked, **options)
    assert result.score == evaluator(result.schedule).score >= 0.75
    assert result.schedule == ts.gsearch(evaluator, 0.25).schedule
    assert result.reduction.ranker["name"] == "uniform"
    assert result.reduction.model_type == "llava"
    assert result.cost is not None
    assert result.cost > 0


def test_one_call_refuses_labels_that_no_answer_meets(tmp_path: Path) -> None:
    wrong = [replace(each, answers=("zzz",), metric=None) for each in examples(tmp_path)]
    for options in ({"max_drop": 0.1}, {"budget": 0.5, "n_trials": 8}):
        with pytest.raises(BadInput, match=r"scores 0.0 % .*it says '.*', the label is 'zzz' \(exact_match\)"):
            ts.search(tiny_llava(), tiny_processor(), wrong, max_new_tokens=3, **options)


@pytest.mark.parametrize("unit", ["keep", "flops", "ms"])
def test_a_number_is_a_budget_of_the_evaluators_median_prompt(
    unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = LatencyModel("cpu", "float32", 8, 1e-3, (1.0, 64.0), (1e-3, 64e-3))
    profiled = []
    monkeypatch.setattr("thinsight.timing.profile", lambda *_: profiled.append(1) or latency)
    evaluator = Evaluator(tiny_llava(), tiny_processor(), examples(tmp_path), max_new_tokens=2)
    value = {"keep": 0.5, "flops": 0.6, "ms": 60.0}[unit]
    result = psigmoid(evaluator, value, budget_unit=unit, n_trials=1)
    expected = make_budget(
        value,
        unit,
        config=evaluator.model.config,
        n_vision=evaluator.num_vision_tokens,
        n_text=sorted(text for _, text in evaluator.prompt_sizes)[1],
        latency=latency,
    )
    assert result.budget == expected.to_dict()
    assert result.schedule == psigmoid(evaluator, expected, n_trials=1).schedule
    points = frontier(evaluator, [value, value * 1.2], budget_unit=unit, n_trials=4).points
    assert [point.budget["unit"] for point in points] == [unit, unit]
    assert points[1].budget["limit"] == pytest.approx(1.2 * points[0].budget["limit"])
    assert len(profiled) == (2 if unit == "ms" else 0)


def test_the_signature_says_what_there_is() -> None:
    assert inspect.isfunction(ts.search)
    parameters = inspect.signature(ts.search).parameters
    assert [*parameters][:4] == ["model", "processor", "examples", "max_drop"]
    assert {"budget", "budget_unit", "method", "batch_size", "cache_dir", "progress"} <= {*parameters}
    assert parameters["batch_size"].annotation == "int | str"


def test_what_is_wrong_is_said_before_an_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("an evaluator was made")

    monkeypatch.setattr("thinsight.evaluation.evaluator.Evaluator", opened)
    for wrong, said in {
        "n_trails": "takes no option 'n_trails': did you mean 'n_trials'?",
        "batchsize": "did you mean 'batch_size'?",
        "cachedir": "did you mean 'cache_dir'?",
        "evaluator": "takes no option 'evaluator'",
        "zzz": "it takes n_trials, seed, first_layer, warm_start, rankers, study, resume, observer",
    }.items():
        with pytest.raises(BadInput, match=re.escape(said)):
            ts.search(None, None, [], budget=0.5, **{wrong: 1})
    with pytest.raises(BadInput, match="method 'psigmoid' takes no option 'rankers'"):
        ts.search(None, None, [], budget=0.5, method="psigmoid", rankers=())
    with pytest.raises(BadInput, match="method 'gsearch' takes no option 'warm_start'"):
        ts.search(None, None, [], 0.1, warm_start=None)
    for options, said in (
        ({"budget": 0.5, "n_trials": 7}, "n_trials is 7; it must be a whole number of at least 8"),
        ({"budget": 0.5, "method": "random", "n_trials": 0}, "n_trials is 0"),
        ({"budget": 0.5, "seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"solver": "newton"}, "solver is 'newton'"),
        ({"step": 0}, "step is 0"),
        ({"solver": "bayes", "step": 2}, "step is 2, which solver 'bayes' does not take"),
        ({"solver": "bayes", "early_stop": 0.9}, "early_stop is 0.9, but solver 'bayes'"),
        ({"early_stop": 2}, "early_stop is 2"),
        ({"confidence": 2}, "confidence is 2"),
        ({"max_drop": 0}, "max_drop is 0, and no number of examples can show"),
        ({"budget": 0.5, "early_stop": 0.9}, "method 'sensitivity' takes no option 'early_stop'"),
    ):
        with pytest.raises(BadInput, match=re.escape(said)):
            ts.search(None, None, [], **options)
    for max_drop in (True, float("nan"), -0.1, "0.1"):
        with pytest.raises(BadInput, match="max_drop is"):
            ts.search(None, None, [], max_drop)
    for budget in (True, 0, float("nan"), "0.25"):
        with pytest.raises(BadInput, match="budget is"):
            ts.search(None, None, [], budget=budget)


def test_the_evaluator_gets_cache_and_progress(tmp_path: Path) -> None:
    told = []
    ts.search(
        tiny_llava(),
        tiny_processor(),
        examples(tmp_path),
        budget=KeepBudget(4, 16, 0.5),
        method="random",
        batch_size="auto",
        ranker="uniform",
        max_new_tokens=2,
        cache_dir=tmp_path / "cache",
        progress=lambda what, done, total: told.append((what, done, total)),
        n_trials=1,
    )
    assert ("full model", 4, 4) in told
    assert any((tmp_path / "cache").iterdir())


def test_one_call_reads_examples_from_a_path(tmp_path: Path) -> None:
    with pytest.raises(ThinsightError, match=r"nowhere\.jsonl"):
        ts.search(tiny_llava(), tiny_processor(), tmp_path / "nowhere.jsonl")
