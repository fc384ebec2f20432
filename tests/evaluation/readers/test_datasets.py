"""Data of the package `datasets`: files, folders, what it saves itself, and folders of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_images

from thinsight import load_examples
from thinsight.errors import BadInput
from thinsight.evaluation.examples import stream_examples
from thinsight.evaluation.readers import READERS
from thinsight.testing import ReaderContract

datasets = pytest.importorskip("datasets", reason="thinsight[datasets] is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def made(**columns: Any) -> Any:
    """Three questions about two images."""
    one, other = tiny_images(2)
    rows = {"image": [one, other, one], "question": ["a ?", "b ?", "c ?"], "answer": ["1", "2", "3"], **columns}
    dataset = datasets.Dataset.from_dict({name: values for name, values in rows.items() if values is not None})
    if rows["image"] is not None:
        dataset = dataset.cast_column("image", datasets.Image())
    return dataset


def test_a_file_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    made().to_parquet(path)
    found = load_examples(path)
    assert [(each.id, each.question, each.answers) for each in found] == [
        ("0", "a ?", ("1",)),
        ("1", "b ?", ("2",)),
        ("2", "c ?", ("3",)),
    ]
    assert found[0].images == found[2].images != found[1].images
    assert found[0].open_images()[0].tobytes() == tiny_images(1)[0].convert("RGB").tobytes()
    assert [each.id for each in load_examples(path, limit=2)] == ["0", "1"]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    made().to_parquet(tmp_path / "train-00000-of-00001.parquet")
    made(question=["x ?", "y ?", "z ?"]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(BadInput, match=r"has the splits train, test: name one, hf:.*:test"):
        load_examples(tmp_path)
    assert [each.question for each in load_examples(f"hf:{tmp_path}:test")] == ["x ?", "y ?", "z ?"]
    with pytest.raises(BadInput, match="has no split 'dev', but train, test"):
        load_examples(f"hf:{tmp_path}:dev")


def test_what_the_package_saved(tmp_path: Path) -> None:
    made().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made(), "val": made(answer=None)}).save_to_disk(tmp_path / "two")
    assert [each.answers for each in load_examples(tmp_path / "one")] == [("1",), ("2",), ("3",)]
    assert [each.answers for each in load_examples(f"hf:{tmp_path / 'two'}:val")] == [(), (), ()]


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    rows = []
    for number, image in enumerate(tiny_images(2)):
        image.save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "question": f"{number} ?", "answers": ["x", "y"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_examples(tmp_path)
    assert [(each.question, each.answers) for each in found] == [("0 ?", ("x", "y")), ("1 ?", ("x", "y"))]
    assert [each.open_images()[0].size for each in found] == [image.size for image in tiny_images(2)]


def test_options_labels_and_several_images(tmp_path: Path) -> None:
    one, other = tiny_images(2)
    features = datasets.Features(
        {
            "qid": datasets.Value("int64"),
            "image_1": datasets.Image(),
            "image_2": datasets.Image(),
            "query": datasets.Value("string"),
            "options": datasets.Value("string"),
            "answer": datasets.Value("int64"),
            "category": datasets.ClassLabel(names=["easy", "hard"]),
            "hint": datasets.Value("string"),
        }
    )
    rows = {
        "qid": [5, 6],
        "image_1": [one, one],
        "image_2": [None, other],
        "query": ["what ?", "<image 1> or <image 2> ?"],
        "options": ["['red', 'blue']", "[]"],
        "answer": [1, 4],
        "category": [1, 0],
        "hint": ["look", None],
    }
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    first, second = load_examples(path)
    assert first.question == (
        "look\nwhat ?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert (first.id, first.answers, first.metric, first.task) == ("5", ("B",), "multiple_choice", "hard")
    assert (len(first.images), len(second.images)) == (1, 2)
    assert (second.question, second.answers, second.task) == ("<image 1> or <image 2> ?", ("4",), "easy")


def test_own_column_names(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    dataset = made().rename_columns({"image": "pic", "question": "q", "answer": "a"})
    dataset.to_parquet(path)
    with pytest.raises(BadInput, match=r"no column that is called image .*--columns image=NAME; it has the"):
        load_examples(path)
    columns = {"image": "pic", "question": "q", "answers": "a"}
    assert [each.answers for each in load_examples(path, columns=columns)] == [("1",), ("2",), ("3",)]
    with pytest.raises(BadInput, match="no column 'p', which columns names"):
        load_examples(path, columns={**columns, "image": "p"})


def test_a_bad_row_is_named_with_its_column(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    made(image=None, img=[{"bytes": b"no image", "path": None}] * 3).to_parquet(path)
    with pytest.raises(BadInput, match=r"data.parquet, row 0: column 'img' holds 8 bytes that are no image"):
        load_examples(path)
    made(question=["a ?", " ", "c ?"]).to_parquet(path)
    with pytest.raises(BadInput, match=r"data.parquet, row 1: column 'question' is ' '"):
        load_examples(path)
    assert next(stream_examples(path)).id == "0"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("hf:", "write a Hub id"),
        ("hf:a/b:c:d:e", "write a Hub id"),
        ("hf:/nowhere/at all:test", "does not exist: write a Hub id"),
        ("hf:nobody/nothing:test", "cannot be (read|found)"),
    ],
)
def test_what_is_no_data_set(told: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(told)
    assert "\n" not in str(caught.value)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"data '.*data.parquet' cannot be read") as caught:
        load_examples(tmp_path / "data.parquet")
    assert "\n" not in str(caught.value)


class TestTheReader(ReaderContract):
    @pytest.fixture
    def reader(self) -> Any:
        return READERS["hf"]

    @pytest.fixture(params=["data.parquet", "data"])
    def data(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / request.param
        made().to_parquet(path) if path.suffix else made().save_to_disk(path)
        return path
