"""lmms-eval runs its own models under a reduction, on a local task: scores are thinsight's, failures end the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_task import DEMO, write_task
from PIL import ImageFile

import thinsight as ts
from thinsight.harness import RunFailed

COUNT = 12
NAME = "thinsight_demo"
MODELS = {"llava_hf": "model", "internvl_hf": "model-internvl"}
REDUCTIONS = {
    "llava_hf": ts.Reduction(ts.Schedule.step(12, 1, 0.04), {"name": "random", "seed": 1}),
    "internvl_hf": ts.Reduction(ts.Schedule.step(14, 1, 0.1), {"name": "random", "seed": 1}),
}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("lmms-eval") / "tasks", COUNT)


@pytest.fixture(scope="module")
def run(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One evaluation in this process: what the harness returns of the task."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def evaluate(model: str, of: str = "llava_hf", **arguments: Any) -> dict[str, Any]:
        told = {"pretrained": DEMO / MODELS[of], "device_map": "cpu", **arguments}
        found = simple_evaluate(
            model=model,
            model_args=",".join(f"{name}={value}" for name, value in told.items()),
            tasks=[NAME],
            task_manager=TaskManager(include_path=str(task), model_name=model),
            device="cpu",
            batch_size=1,
            log_samples=True,
        )
        assert found is not None
        return {
            "score": found["results"][NAME]["right,none"],
            "answers": [each["filtered_resps"][0] for each in found["samples"][NAME]],
            "right": [each["right"] for each in found["samples"][NAME]],
        }

    yield evaluate
    patch.undo()


def scored(task: Path, of: str, dtype: str, reduction: ts.Reduction | None) -> list[float]:
    """Each question's score by `thinsight evaluate`'s own evaluator."""
    model, processor = ts.load_model(DEMO / MODELS[of], dtype, "cpu")
    examples = ts.load_examples(task / "questions.jsonl")
    evaluator = ts.Evaluator(model, processor, examples, batch_size=1, max_new_tokens=8)
    found = evaluator.full if reduction is None else evaluator(reduction)
    assert found.per_example is not None
    return found.per_example.tolist()


@pytest.mark.parametrize(("of", "dtype"), [("llava_hf", "float32"), ("internvl_hf", "bfloat16")])
def test_scores_are_those_of_thinsight(run: Run, task: Path, tmp_path: Path, of: str, dtype: str) -> None:
    reduction = REDUCTIONS[of]
    reduction.save_pretrained(tmp_path / "reduction")
    told = {"dtype": dtype} if of == "llava_hf" else {}  # the other is always loaded in bfloat16
    full = run(of, of, **told)
    reduced = run(f"thinsight_{of}", of, reduction=tmp_path / "reduction", **told)
    assert full["right"] == scored(task, of, dtype, None)
    assert reduced["right"] == scored(task, of, dtype, reduction)
    assert reduced["score"] == pytest.approx(sum(reduced["right"]) / COUNT)
    assert reduced["score"] < full["score"]  # it was really on


def test_a_share_can_stand_in_place_of_a_folder(run: Run, task: Path) -> None:
    found = run("thinsight_llava_hf", dtype="float32", keep=0.1, layer=1, ranker="uniform")
    step = ts.Reduction(ts.Schedule.step(12, 1, 0.1), "uniform")
    assert found["right"] == scored(task, "llava_hf", "float32", step)


def test_truncated_images_are_not_shown_half(run: Run, task: Path, tmp_path: Path) -> None:
    import lmms_eval.api.task

    assert lmms_eval.api.task.ImageFile is ImageFile
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # what importing it does
    run("thinsight_llava_hf", dtype="float32", keep=0.1)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "reduction and keep: neither given"),
        ({"reduction": "a/b", "keep": 0.5}, "reduction and keep: both given"),
        ({"reduction": "a/b", "ranker": "uniform"}, "layer and ranker go with keep"),
        ({"reduction": "no-such-folder"}, "there is no folder no-such-folder"),
        ({"keep": 1.5}, "1.5"),
        ({"keep": 0.5, "layer": 99}, "99"),
        ({"keep": 0.5, "ranker": "no-such"}, "ranker is 'no-such'"),
        ({"keep": 0.5, "no_such": 1}, "no_such"),  # of the harness's own class
    ],
)
def test_arguments_that_cannot_be_right_end_the_run(run: Run, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(RunFailed, match="thinsight: ") as caught:
        run("thinsight_llava_hf", dtype="float32", **arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_harness_would_swallow_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlavaForConditionalGeneration

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no memory left")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fails)
    swallowed = run("llava_hf", dtype="float32")  # the harness as it is
    assert swallowed["answers"] == [""] * COUNT
    with pytest.raises(RunFailed, match=r"generate\(\) failed: ValueError: no memory left"):
        run("thinsight_llava_hf", dtype="float32", keep=0.5)


def test_questions_that_never_reach_the_model_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.models.chat.llava_hf import LlavaHf

    monkeypatch.setattr(LlavaHf, "generate_until", lambda self, requests: [""] * len(requests))
    with pytest.raises(RunFailed, match=f"{COUNT} of {COUNT} questions never reached"):
        run("thinsight_llava_hf", dtype="float32", keep=0.5)


def test_every_model_that_is_offered_is_one_of_the_harness() -> None:
    from lmms_eval.models import get_model_manifest

    from thinsight.lmms_eval import NAMES, PREFIX, manifests

    assert {each.model_id for each in manifests()} == {f"{PREFIX}{name}" for name in NAMES}
    for name in NAMES:
        ours, theirs = get_model_manifest(f"{PREFIX}{name}"), get_model_manifest(name)
        for kind in ("simple_class_path", "chat_class_path"):
            assert (getattr(ours, kind) is None) == (getattr(theirs, kind) is None)


@pytest.mark.parametrize("simple", [False, True])
def test_chat_and_simple_classes_are_both_there(simple: bool) -> None:
    from lmms_eval.models import get_model

    made, stock = get_model("thinsight_llava_hf", force_simple=simple), get_model("llava_hf", force_simple=simple)
    assert issubclass(made, stock)
    assert made.is_simple == stock.is_simple == simple
    assert get_model("thinsight_llava_hf", force_simple=simple) is made


def command(task: Path, out: Path, told: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m lmms_eval`, which finds the models by the entry point."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "thinsight_llava_hf", "--device", "cpu"),
            *("--model_args", f"pretrained={DEMO / 'model'},device_map=cpu,dtype=float32,{told}", "--tasks", NAME),
            *("--include_path", str(task), "--output_path", str(out), "--log_samples", "--batch_size", "1"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_writes_the_same_scores(run: Run, task: Path, tmp_path: Path) -> None:
    reduction = REDUCTIONS["llava_hf"]
    reduction.save_pretrained(tmp_path / "reduction")
    done = command(task, tmp_path / "out", f"reduction={tmp_path / 'reduction'}")
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    score = json.loads(results.read_text())["results"][NAME]["right,none"]
    assert score == pytest.approx(sum(scored(task, "llava_hf", "float32", reduction)) / COUNT)


def test_the_command_ends_with_an_error(task: Path, tmp_path: Path) -> None:
    """Where an exception alone would leave the exit code 0."""
    done = command(task, tmp_path / "out", f"reduction={tmp_path}")
    assert done.returncode == 1
    assert "has no reduction_config.json" in done.stderr
    assert "Traceback" not in done.stderr
