"""Each kind of data that users have: what is read of it, and that what is wrong is one line with row and column."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_images

from thinsight import load_examples
from thinsight.errors import BadInput, ThinsightError
from thinsight.evaluation.example import Example
from thinsight.evaluation.examples import read_examples, reader_of, stream_examples
from thinsight.evaluation.readers import READERS
from thinsight.registry import Registry
from thinsight.testing import ReaderContract


def encoded(image: Image.Image, format_: str = "PNG") -> str:
    return base64.b64encode(content(image, format_)).decode()


def content(image: Image.Image, format_: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in zip("ab", tiny_images(2), strict=True):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def written(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def asked(examples: list[Example]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.id, each.question, each.answers) for each in examples]


# -- JSON lines ----------------------------------------------------------------------------------------------

LINE = {"id": "1", "image": "a.png", "question": "what ?", "answer": "red"}


def lines(folder: Path, *records: dict[str, Any]) -> Path:
    return written(folder, "data.jsonl", "\n".join(map(json.dumps, records)))


def test_a_question_id_is_an_id(folder: Path) -> None:
    one = {**LINE, "question_id": 7}
    del one["id"]
    assert [each.id for each in load_examples(lines(folder, one))] == ["7"]
    both = load_examples(lines(folder, {**LINE, "question_id": 7}))
    assert (both[0].id, both[0].extra) == ("1", {"question_id": 7})


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_images_that_stand_in_the_line(folder: Path, format_: str) -> None:
    image = tiny_images(1, size=32)[0]
    plain = encoded(image, format_)
    address = f"data:image/{format_.lower()};base64,{plain}"
    wrapped = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    records = [{**LINE, "id": str(n), "image": each} for n, each in enumerate((plain, address, wrapped))]
    found = load_examples(lines(folder, *records))
    assert len({each.image_keys for each in found}) == 1  # one image, kept once
    assert len({each.group for each in found}) == 1
    assert found[0].open_images()[0].size == image.size
    assert isinstance(found[0].images[0], Path)
    assert found[0].images[0].read_bytes() == content(image, format_)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,AAAA", "line 1: field 'image' holds 3 bytes that are no image"),
        ("data:image/png;base64,A!", "line 1: field 'image' holds base64 that cannot be decoded"),
        ("data:image/png,abc", "line 1: field 'image' holds a data address without base64"),
        ("iVBORw0KGgo" + "A" * 89, "line 1: field 'image' holds 75 bytes that are no image"),
        ("https://example.org/a.png", "line 1: field 'image' holds the address 'https://example.org/a.png'"),
        ({"bytes": None, "path": None}, "line 1: field 'image' holds None"),
    ],
)
def test_what_is_no_image_is_named_by_line_and_field(folder: Path, image: Any, message: str) -> None:
    with pytest.raises(ThinsightError, match=message) as caught:
        load_examples(lines(folder, {**LINE, "image": image}))
    assert "\n" not in str(caught.value)


def test_columns_by_the_users_own_names(folder: Path) -> None:
    path = lines(folder, {"key": 3, "img": "a.png", "q": "what ?", "a": ["red", "blue"]})
    columns = {"id": "key", "image": "img", "question": "q", "answers": "a"}
    (found,) = load_examples(path, columns=columns)
    assert asked([found]) == [("3", "what ?", ("red", "blue"))]
    assert found.extra == {}
    with pytest.raises(BadInput, match="line 1 has no field 'imag', which columns names: it has key, img, q, a"):
        load_examples(path, columns={**columns, "image": "imag"})
    with pytest.raises(BadInput, match="columns names the field 'picture': choose among id, image"):
        load_examples(path, columns={"picture": "img"})
    with pytest.raises(BadInput, match="columns has 'images' as 'img'"):
        load_examples(path, columns={"image": "img", "images": "img"})
    path = lines(folder, {"key": 3, "img": "a.png", "q": 5, "a": "red"})
    with pytest.raises(BadInput, match="line 1: field 'q' is 5"):
        load_examples(path, columns=columns)


def test_an_image_folder(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "questions"
    inner.mkdir()
    path = written(inner, "data.jsonl", json.dumps(LINE))
    assert load_examples(path, image_folder=folder)[0].images == (folder / "a.png",)
    with pytest.raises(BadInput, match=r"a\.png' does not exist"):
        load_examples(path)
    with pytest.raises(BadInput, match=r"image_folder .*gone' does not exist"):
        load_examples(path, image_folder=folder / "gone")


def test_a_list_of_such_objects(folder: Path) -> None:
    path = written(folder, "data.json", [LINE, {**LINE, "id": "2"}])
    assert [each.id for each in load_examples(path)] == ["1", "2"]
    path = written(folder, "data.json", '[\n {"id": "1"},\n {"id": }]')
    with pytest.raises(BadInput, match=r"data.json, entry 1 \(line 2\) has no field 'image'"):
        load_examples(path)
    with pytest.raises(BadInput, match=r"data.json, entry 2 \(line 3\) is not JSON \(Expecting value, line 3\)"):
        load_examples(written(folder, "data.json", json.dumps([LINE])[:-1] + ',\n\n {"id": }]'))
    with pytest.raises(BadInput, match=r"entry 2 .* is not JSON"):
        load_examples(written(folder, "data.json", json.dumps([LINE])[:-1]))


def test_no_more_is_read_than_is_asked_for(folder: Path) -> None:
    path = written(folder, "data.jsonl", json.dumps(LINE) + "\nnot JSON\n")
    assert [each.id for each in load_examples(path, limit=1)] == ["1"]
    stream = stream_examples(path)
    assert next(stream).id == "1"
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        next(stream)
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        load_examples(path, limit=1, seed=0)  # drawn from all
    listed = written(folder, "data.json", json.dumps([LINE])[:-1] + ", not JSON]")
    assert [each.id for each in load_examples(listed, limit=1)] == ["1"]


def test_a_long_list_is_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinsight.evaluation.readers.stream._PIECE", 7)
    path = written(folder, "data.json", json.dumps([{**LINE, "id": str(n)} for n in range(30)], indent=1))
    assert [each.id for each in load_examples(path)] == [str(n) for n in range(30)]


# -- tables --------------------------------------------------------------------------------------------------


def table(folder: Path, *rows: list[str], name: str = "data.tsv") -> Path:
    mark = "," if name.endswith("csv") else "\t"
    return written(folder, name, "\n".join(mark.join(row) for row in rows) + "\n")


CHOICE = ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"]


def test_a_table_of_vlmevalkit(folder: Path) -> None:
    one, other = (encoded(image) for image in tiny_images(2))
    path = table(
        folder,
        CHOICE,
        ["0", one, "what is it ?", "look", "red", "blue", "", "B", "color"],
        ["1", other, '"two ""quoted""\nlines"', "", "1", "2", "3", "C", "count"],
        ["1000000", "0", "what is it ?", "", "blue", "red", "", "A", "color"],
    )
    first, second, third = load_examples(path)
    assert first.question == (
        "Hint: look\nQuestion: what is it ?\nOptions:\nA. red\nB. blue\n"
        "Please select the correct answer from the options above."
    )
    assert (first.id, first.answers, first.metric, first.task) == ("0", ("B",), "multiple_choice", "color")
    assert second.question.startswith('Question: two "quoted"\nlines\nOptions:\nA. 1\nB. 2\nC. 3\n')
    assert third.images == first.images  # by the index of the row that has it
    assert first.images != second.images


def test_a_table_of_open_questions_by_path(folder: Path) -> None:
    path = table(
        folder, ["index", "image_path", "question", "answer"], ["7", "a.png", "what ?", "['red', 'a red one']"]
    )
    (found,) = load_examples(path)
    assert found == Example("7", (folder / "a.png",), "what ?", ("red", "a red one"), None, "a.png")
    path = table(folder, ["pic", "question"], ["\"['a.png', 'b.png']\"", "what ?"], name="data.csv")
    (found,) = load_examples(path, columns={"image": "pic"})
    assert found.images == (folder / "a.png", folder / "b.png")
    assert (found.id, found.answers) == ("0", ())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["index", "image", "question"], ["0", "a.png"]], "line 2 has 2 cells for 3 columns"),
        ([["index", "image", "question"], ["0", "a.png", ""]], "line 2 has no column 'question'"),
        ([["index", "image", "question"], ["0", "", "what ?"]], "line 2 has no column 'image'"),
        ([["index", "image", "image"], ["0", "", "what ?"]], "line 1: columns are index, image, image"),
        ([["index", "image", "frage"], ["0", "a.png", "what ?"]], "no column that is called question .*--columns"),
        (
            [["index", "image", "question"], ["0", "data:image/png;base64,AAAA", "?"]],
            "line 2: column 'image' holds 3 by",
        ),
        ([["id", "image", "question"], ["0", "a.png", "?"], ["1", "gone.png", "?"]], "example '1': .*does not exist"),
        ([["id", "image", "question", "metric"], ["0", "a.png", "?", "bleu"]], "line 2: metric is 'bleu'"),
        (
            [["id", "image", "question"], ["0", "a.png", '"two'], ["1", "a.png", "?"]],
            "line 2 has 3 cells|cannot be read",
        ),
    ],
)
def test_a_bad_table_is_named_by_line_and_column(folder: Path, rows: list[list[str]], message: str) -> None:
    if "two" in str(rows):
        rows = rows[:2]  # quotes that never end take the rest of the file
        rows[1] = ["0", "a.png"]
        message = "line 2 has 2 cells"
    with pytest.raises(ThinsightError, match=message) as caught:
        load_examples(table(folder, *rows))
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(folder: Path) -> None:
    path = table(folder, ["index", "image", "question"], ["0", "a.png", "?"])
    with pytest.raises(
        BadInput, match="no column 'img', which columns names: it has the columns index, image, question"
    ):
        load_examples(path, columns={"image": "img"})


# -- LLaVA ---------------------------------------------------------------------------------------------------


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_conversations(folder: Path) -> None:
    entries = [
        {"id": "x", "image": "a.png", "conversations": turns("<image>\nwhat ?", "red", "how many ?", "2")},
        {"id": "text only", "conversations": turns("what ?", "red")},
        {"id": "y", "image": ["a.png", "b.png"], "conversations": turns("<image> or <image> ?", "the first")},
    ]
    with pytest.warns(UserWarning, match="data.json: 1 entries without an image were left out"):
        found = load_examples(written(folder, "data.json", entries))
    assert asked(found) == [
        ("x#1", "<image>\nwhat ?", ("red",)),
        ("x#2", "how many ?", ("2",)),
        ("y", "<image> or <image> ?", ("the first",)),
    ]
    assert [len(each.images) for each in found] == [1, 1, 2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"conversations": "hello"}, r"entry 1 \(line 1\): field 'conversations' is no list of turns"),
        ({"conversations": turns("what ?")}, "field 'conversations' has no question with its answer"),
        ({"conversations": turns("what ?", "red")[::-1]}, "turn 1 is from 'gpt' and 'human'"),
        ({"conversations": [{"from": "human", "value": 3}, turns("", "red")[1]]}, "turn 1: field 'value' is 3"),
        ({"conversations": turns("what ?", "")}, "turn 1: field 'value' holds an empty text"),
    ],
)
def test_a_bad_conversation_is_named_by_entry_and_turn(folder: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_examples(written(folder, "data.json", [{"id": "1", "image": "a.png", **entry}]))


# -- VQA -----------------------------------------------------------------------------------------------------

QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 10, "image_id": 1, "question": "what ?"},
        {"question_id": 20, "image_id": 2, "question": "how many ?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 20, "answers": [{"answer": "2"}, {"answer": "3"}], "multiple_choice_answer": "2"},
        {"question_id": 10, "multiple_choice_answer": "red"},
    ]
}


def vqa(folder: Path, questions: Any = QUESTIONS, annotations: Any = ANNOTATIONS) -> Path:
    for number, image in enumerate(tiny_images(2), start=1):
        image.convert("RGB").save(folder / f"COCO_val2014_{number:012d}.jpg")
    written(folder, "v2_mscoco_val2014_annotations.json", annotations)
    return written(folder, "v2_OpenEnded_mscoco_val2014_questions.json", questions)


def test_questions_with_the_annotations_beside_them(folder: Path) -> None:
    found = load_examples(vqa(folder))
    assert asked(found) == [("10", "what ?", ("red",)), ("20", "how many ?", ("2", "3"))]
    assert [each.metric for each in found] == [None, "vqa_accuracy"]
    assert found[0].images == (folder / "COCO_val2014_000000000001.jpg",)


def test_questions_with_annotations_and_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    path = vqa(folder)
    inner = tmp_path / "inner"
    inner.mkdir()
    moved = path.rename(inner / "mine.json")
    told = {"annotations": folder / "v2_mscoco_val2014_annotations.json", "image_folder": folder}
    assert [each.answers for each in load_examples(moved, **told)] == [("red",), ("2", "3")]
    assert [each.answers for each in load_examples(moved, image_folder=folder)] == [(), ()]
    with pytest.raises(
        BadInput, match=r"question 1: image_id 1 has no file in .*inner', such as COCO_val2014_0.*1.jpg"
    ):
        load_examples(moved)
    with pytest.raises(BadInput, match=r"annotations .*gone.json' does not exist"):
        load_examples(moved, annotations=folder / "gone.json")


def test_images_are_named_by_a_list_of_them_or_by_the_question(folder: Path) -> None:
    images = [{"id": 1, "file_name": "a.png"}]
    entries = [{"id": 5, "image_id": 1, "question": "what ?", "answer": "red"}]
    path = written(folder, "q.json", {"info": {}, "images": images, "annotations": entries})
    assert load_examples(path)[0] == Example("5", (folder / "a.png",), "what ?", ("red",), None, "a.png")
    entries = [{"question_id": 5, "image": "b.png", "question": "what ?", "answers": ["red"] * 10}]
    (found,) = load_examples(written(folder, "q.json", {"data": entries}))
    assert (found.images, found.metric) == ((folder / "b.png",), "vqa_accuracy")


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ({"questions": {}}, ANNOTATIONS, "has no list 'questions'"),
        ({"questions": [3]}, ANNOTATIONS, "question 1 is not a JSON object"),
        ({"questions": [{"question_id": 1, "question": "?"}]}, {"annotations": []}, "question_id 1 has no annotation"),
        ({"questions": [{"question_id": 10, "question": "?"}]}, ANNOTATIONS, "question 1 has no field 'image_id'"),
        (QUESTIONS, {"annotations": [{}]}, "annotation 1 has no field 'question_id'"),
        (QUESTIONS, {"labels": []}, "has no list 'annotations'"),
        (
            {"questions": [{"question_id": 10, "image_id": 1, "image": "a.png"}]},
            ANNOTATIONS,
            "question 1 has no field 'que",
        ),
        ('{"questions":\n [}', ANNOTATIONS, r"questions.json, line 2 is not JSON"),
    ],
)
def test_bad_questions_are_named(folder: Path, questions: Any, annotations: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_examples(vqa(folder, questions, annotations))


# -- which reader --------------------------------------------------------------------------------------------


def test_a_reader_is_known_by_the_data_or_by_its_name(folder: Path) -> None:
    conversations = written(
        folder, "talk.json", [{"id": "1", "image": "a.png", "conversations": turns("what ?", "red")}]
    )
    for path, name in (
        (lines(folder, LINE), "jsonl"),
        (table(folder, ["image", "question"]), "tsv"),
        (conversations, "llava"),
        (vqa(folder), "vqa"),
        (written(folder, "lines.json", json.dumps(LINE)), "jsonl"),
        (written(folder, "unknown.txt", json.dumps(LINE)), "jsonl"),
    ):
        assert reader_of(path)[0].name == name
    renamed = conversations.rename(folder / "talk.txt")
    assert asked(load_examples(f"llava:{renamed}")) == [("1", "what ?", ("red",))]
    with pytest.raises(BadInput, match=r"data 'tsv:.*gone.tsv' does not exist"):
        load_examples(f"tsv:{folder / 'gone.tsv'}")
    with pytest.raises(BadInput, match=f"data 'llava:{folder}' is a folder"):
        load_examples(f"llava:{folder}")


def test_every_reader_says_what_its_data_looks_like() -> None:
    assert isinstance(READERS, Registry)
    assert [*READERS][:5] == ["jsonl", "tsv", "llava", "vqa", "hf"]
    assert all(reader.form and "\n" not in reader.form for reader in READERS.values())


def test_data_that_needs_a_package_says_which(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (folder / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ThinsightError, match=r"data '.*data.parquet' needs the package datasets .*thinsight\[datasets\]"
    ):
        read_examples(str(folder / "data.parquet"))


class TestEveryReader(ReaderContract):
    @pytest.fixture(params=["jsonl", "tsv", "llava", "vqa"])
    def reader(self, request: pytest.FixtureRequest) -> Any:
        return READERS[request.param]

    @pytest.fixture
    def data(self, reader: Any, folder: Path) -> Path:
        talk = turns("what ?", "red", "how many ?", "2")
        return {
            "jsonl": lambda: lines(folder, LINE, {**LINE, "id": "2"}),
            "tsv": lambda: table(folder, ["image", "question"], ["a.png", "what ?"], ["b.png", "how many ?"]),
            "llava": lambda: written(folder, "talk.json", [{"id": "1", "image": "a.png", "conversations": talk}]),
            "vqa": lambda: vqa(folder),
        }[reader.name]()
