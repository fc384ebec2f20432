"""`thinsight answer`: every question once, in the set's order, whatever is killed, interrupted or run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks.simulated import SimulatedTransport
from thinsight.errors import BadInput, MissingPackage, StorageError
from thinsight.evaluation import ray_workers
from thinsight.evaluation.answering import Answerer
from thinsight.evaluation.examples import load_examples
from thinsight.job.answering import answer
from thinsight.job.options import AnswerOptions

COUNT = 10


def options(out: Path, **given: Any) -> AnswerOptions:
    return AnswerOptions(**{"out": out, "limit": COUNT, "batch_size": 3, "max_new_tokens": 3, "kept": True, **given})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("answers") / "a.jsonl"
    answer(options(out))
    return out.read_text()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of each batch that is answered; an interrupt comes at the third."""
    made: list[list[str]] = []
    answers = Answerer.answers

    def noted(self: Answerer, examples: Any) -> Any:
        made.append([each.id for each in examples])
        if len(made) == 3:
            raise KeyboardInterrupt
        return answers(self, examples)

    monkeypatch.setattr(Answerer, "answers", noted)
    return made


def test_each_question_has_one_row_in_the_order_of_the_set(expected: str) -> None:
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["id"] for row in rows] == [each.id for each in load_examples("demo:test", COUNT)]
    assert all(row["answer"] and sorted(row) == ["answer", "id", "kept"] for row in rows)
    assert len({row["answer"] for row in rows}) > 1


def test_an_interrupted_run_goes_on_and_answers_nothing_twice(
    expected: str, batches: list[list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(options(out))
    assert not out.exists()
    journal = tmp_path / "a.jsonl.part.jsonl"
    with journal.open("a") as file:
        file.write('[{"id": "cut o')  # as a kill leaves it
    done = answer(options(out))
    assert (done.count, done.before) == (COUNT, 6)
    assert out.read_text() == expected
    assert not journal.exists()
    assert batches[2] == batches[3]  # the one that was interrupted
    assert len(batches) == 5


def test_answers_of_something_else_are_not_continued(batches: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(options(out))
    for other in ({"max_new_tokens": 4}, {"data": str(of_other_questions(tmp_path))}, {"kept": False}):
        with pytest.raises(BadInput, match="holds answers of other data, another model or other settings"):
            answer(options(out, **other))
    assert answer(options(out, batch_size=2)).before == 6


def of_other_questions(folder: Path) -> Path:
    """A set of the same ids."""
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    rows = [{"id": each.id, "image": "a.png", "question": "what ?"} for each in load_examples("demo:test", COUNT)]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "other.jsonl"


def test_questions_may_be_added_and_removed_meanwhile(expected: str, batches: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(options(out, limit=8))
    fewer = answer(options(tmp_path / "a.jsonl", limit=4))
    assert (fewer.count, fewer.before) == (4, 4)
    assert out.read_text() == "".join(expected.splitlines(keepends=True)[:4])
    out.unlink()
    batches.clear()
    with pytest.raises(KeyboardInterrupt):
        answer(options(out, limit=8))
    more = answer(options(out))
    assert (more.count, more.before) == (COUNT, 6)
    assert out.read_text() == expected


def test_a_damaged_line_is_told_with_its_number(batches: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(options(out))
    journal = tmp_path / "a.jsonl.part.jsonl"
    head, first, *rest = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([head, first[1:], *rest]))
    with pytest.raises(StorageError, match=r"line 2 is damaged: remove the line"):
        answer(options(out))


def test_a_parquet_file_has_the_same_answers(expected: str, tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    answer(options(out))
    rows = [json.loads(line) for line in expected.splitlines()]
    found = pyarrow.parquet.read_table(out).to_pylist()
    assert [(row["id"], row["answer"]) for row in found] == [(row["id"], row["answer"]) for row in rows]
    assert [json.loads(row["kept"]) for row in found] == [row["kept"] for row in rows]


@pytest.mark.parametrize("kills", [(), (2.5, 3.5, 6.0)])
def test_workers_that_are_killed_write_the_same(
    expected: str, kills: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SimulatedTransport] = []

    def simulated(make: Any, workers: Any, *, address: Any, gpus_per_worker: Any) -> SimulatedTransport:
        made.append(SimulatedTransport(make, workers, lambda *_: 2.0, starts=0.5, kills=kills))
        return made[-1]

    monkeypatch.setattr(ray_workers, "RayTransport", simulated)
    monkeypatch.setattr(ray_workers, "import_ray", lambda: None)
    out = tmp_path / "a.jsonl"
    answer(options(out, workers=2))
    assert out.read_text() == expected
    assert made[0].stopped == 1
    assert len(made[0].calls) >= 4 + bool(kills)


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"pip install 'thinsight\[parquet\]', or name a \.jsonl file"):
        answer(options(tmp_path / "a.parquet"))
    with pytest.raises(BadInput, match=r"must end in \.jsonl or \.parquet"):
        answer(options(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(BadInput, match="exists already"):
        answer(options(tmp_path / "a.jsonl"))
    with pytest.raises(BadInput, match="batch_size is 0"):
        answer(options(tmp_path / "b.jsonl", batch_size=0))
