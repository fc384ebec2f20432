"""Tasks of lmms-eval as data: asked and scored as the task does, refused where its score is no mean."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from local_task import write_task
from PIL import ImageFile

import thinsight as ts
from thinsight.evaluation.metrics import get_metric

COUNT = 8


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


def test_documents_are_asked_and_scored_by_the_task(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", COUNT)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    found = ts.load_examples(f"lmms-eval:{folder}/thinsight_demo:test")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    ours = ts.load_examples(folder / "questions.jsonl")
    assert [(each.question, each.answers) for each in found] == [(each.question, each.answers) for each in ours]
    assert len(ts.load_examples(f"lmms-eval:{folder}/thinsight_demo", limit=3)) == 3
    for each in found:
        metric, question = get_metric(each.metric), pickle.loads(pickle.dumps(each)).question
        assert metric(f" {each.answers[0].upper()}.", each.answers, question) == 1.0
        assert metric("nothing", each.answers, question) == 0.0
    model, processor = ts.load_demo()
    scores = [
        ts.Evaluator(model, processor, each, max_new_tokens=8).full.per_example.tolist() for each in (found, ours)
    ]
    assert scores[0] == scores[1]


def test_examples_with_one_text_are_scored_by_their_own_document(tmp_path: Path) -> None:
    """The task's scoring reads its document, which two questions of the same words do not share."""
    folder = write_task(tmp_path / "tasks", COUNT, "by_document")
    utils = folder / "by_document_utils.py"
    utils.write_text(
        utils.read_text().replace('results[0].strip().rstrip(".").lower() == doc["answer"]', 'doc["id"] == "test-0001"')
    )
    found = ts.load_examples(f"lmms-eval:{folder}/by_document:test:right")
    assert [get_metric(each.metric)("x", each.answers, each.question) for each in found][:3] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("aggregation", "told", "why"),
    [
        ("!function refused_utils.spread", ":test", "right by spread"),
        ("mean", ":train", "has no split 'train', but test"),
        ("mean", ":test:wrong", "the task has right by mean"),
        ("mean", ":test:right:more", "write lmms-eval:TASK"),
    ],
)
def test_what_has_no_mean_is_refused(tmp_path: Path, aggregation: str, told: str, why: str) -> None:
    folder = write_task(tmp_path / "tasks", COUNT, "refused", aggregation)
    with pytest.raises(ts.BadInput, match="lmms-eval:") as caught:
        ts.load_examples(f"lmms-eval:{folder}/refused{told}")
    assert why in str(caught.value)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ts.BadInput, match="has no task 'no_such_task'"):
        ts.load_examples("lmms-eval:no_such_task")


def test_scores_that_are_no_shares_are_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", COUNT, "large")
    utils = folder / "large_utils.py"
    utils.write_text(utils.read_text().replace('"right": float(', '"right": 7 * float('))
    example = ts.load_examples(f"lmms-eval:{folder}/large")[0]
    with pytest.raises(ts.BadInput, match=r"with 7.0 as 'right'"):
        get_metric(example.metric)(example.answers[0], example.answers, example.question)
