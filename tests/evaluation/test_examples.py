"""Reading and checking data: what is accepted, and that each kind of bad data is one clear line."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tiny import tiny_images

from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example, load_examples, open_image, read_examples, validate_examples


@pytest.fixture
def folder(tmp_path):
    for name, image in zip("ab", tiny_images(2), strict=True):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def record(**changes):
    return {"id": "1", "image": "a.png", "question": "what ?", "answer": "red"} | changes


def test_every_field_is_read(folder):
    path = write(
        folder,
        record(task="color"),
        "",
        record(id=2, images=["a.png", "b.png"], image=None, answer=None, answers=["1", 2], metric="anls"),
        record(id="3", answer=None),
    )
    first, second, third = load_examples(path)
    assert first == Example("1", (folder / "a.png",), "what ?", ("red",), None, "a.png")
    assert first.task == "color"
    assert (second.id, second.images) == ("2", (folder / "a.png", folder / "b.png"))
    assert (second.answers, second.metric, second.group) == (("1", "2"), "anls", "a.png+b.png")
    assert second.task is None
    assert third.answers == ()
    assert first.image_keys == third.image_keys
    assert second.image_keys[0] == first.image_keys[0] != second.image_keys[1]


def test_a_line_separator_inside_a_text_is_no_line_break(folder):
    path = folder / "data.jsonl"
    path.write_text(json.dumps(record(question="one\u2028two"), ensure_ascii=False), encoding="utf-8")
    assert load_examples(path)[0].question == "one\u2028two"


def test_limit_takes_the_first_or_a_seeded_draw(folder):
    path = write(folder, *(record(id=str(n)) for n in range(20)))
    assert [e.id for e in load_examples(path, limit=3)] == ["0", "1", "2"]
    drawn = [e.id for e in load_examples(path, limit=5, seed=1)]
    assert drawn == [e.id for e in load_examples(path, limit=5, seed=1)]
    assert drawn == sorted(drawn, key=int)
    assert drawn != ["0", "1", "2", "3", "4"]
    assert len(load_examples(path, limit=99)) == 20


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no examples"),
        ([record(), "{not json"], "line 2 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        ([record(question=None)], "line 1 has no field 'question'"),
        ([record(question=" ")], "field 'question' is ' '"),
        ([record(image=None)], r"line 1 has no field 'image' \(or 'images'\)"),
        ([record(images=["a.png"])], "both 'image' and 'images'"),
        ([record(id=None)], "line 1 has no field 'id'"),
        ([record(), record()], "id '1' occurs twice"),
        ([record(metric="bleu")], "line 1: metric is 'bleu'"),
        ([record(answer=None, metric="anls")], "has no answer, which metric 'anls' needs"),
        ([record(answer=None, anwser="red")], "unknown field 'anwser': did you mean 'answer'"),
        ([record(answer=["red"])], r"field 'answer' holds \['red'\]: it must be a text"),
        ([record(answers=[], answer=None)], "field 'answers' must be a list that is not empty"),
        ([record(image="gone.png")], "gone.png' does not exist"),
        ([record(image=".")], "does not exist"),
        ([record(image="x" * 5000)], "example '1': image .* cannot be read"),
        (["[" * 100_000], "line 1 is not JSON"),
        (['{"id": "1", "image": ' + "[" * 980 + "]" * 980 + "}"], "line 1 (is not JSON|: field 'image' holds)"),
        (['{"id": "1", "metric": ' + "[" * 980 + "]" * 980 + "}"], "line 1 (is not JSON|has no field)"),
        ([record(question="half \ud800")], "example '1': .* half of a surrogate pair"),
        ([record(answer="half \ud800")], "example '1': .* half of a surrogate pair"),
        ([record(answer=None, answers=["red", "half \udfff"])], "example '1': .* half of a surrogate pair"),
        ([record(id="half \ud800")], r"example 'half \\ud800': .* half of a surrogate pair"),
        ([record(task="half \ud800")], "example '1': .* half of a surrogate pair"),
        ([record(note="half \ud800")], "example '1': .* half of a surrogate pair"),
        ([record(**{"half \ud800": 1})], "example '1': .* half of a surrogate pair"),
        ([record(metric="half \ud800")], r"line 1: metric is 'half \\ud800'"),
        ([record(image="half \ud800.png")], r"'half \\ud800.png' holds half of a surrogate pair"),
        ([record(task=["a"])], "example '1': task is a list: write a text"),
        ([record(task=float("nan"))], "example '1': task is nan: write a text, or null"),
        ([record(answer=float("nan"))], "line 1: field 'answer' holds nan: .*null means that there is no label"),
        ([record(answer=float("inf"))], "line 1: field 'answer' holds inf: "),
        ([record(answer=None, answers=["red", float("nan")])], "line 1: field 'answers' holds nan: "),
        ([record(answer="")], "line 1: field 'answer' holds an empty text: .*null, where there is no label"),
        ([record(answer=" \n")], "line 1: field 'answer' holds an empty text"),
        ([record(answer=None, answers=["red", " "])], "line 1: field 'answers' holds an empty text"),
        ([record(answer=True)], "line 1: field 'answer' holds True"),
        ([record(image="")], "line 1: field 'image' holds an empty text"),
        ([record(image=float("nan"))], "line 1: field 'image' holds nan"),
        ([record(id=float("nan"))], "line 1: field 'id' is nan"),
        ([record(question=float("nan"))], "line 1: field 'question' is nan"),
        (['{"id": ' + "9" * 5000 + "}"], "line 1 cannot be read .*write the number as a text"),
        ([json.dumps(record(n=0)).replace("0", "9" * 5000)], "line 1 cannot be read"),
        ([json.dumps(record(answer=0)).replace("0", "1e999")], "line 1: field 'answer' holds inf"),
    ],
)
def test_bad_data_is_one_line_that_says_where(folder, lines, message):
    with pytest.raises(ThinsightError, match=message) as caught:
        load_examples(write(folder, *lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_", ["png", "webp", "jpeg"])
def test_a_truncated_image_is_named(folder, format_):
    whole = folder / f"whole.{format_}"
    tiny_images(1, size=64)[0].save(whole)
    cut = folder / f"cut.{format_}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "text.png").write_text("not an image")
    assert load_examples(write(folder, record(image=whole.name)))
    for bad in (cut.name, "text.png"):
        with pytest.raises(ThinsightError, match=f"example '1': image .*{bad}' is truncated or no image"):
            load_examples(write(folder, record(image=bad)))


@pytest.mark.parametrize(
    ("source", "message"),
    [("demo:train", "use demo:calibration, demo:test, demo:certification"), ("nowhere.jsonl", "does not exist")],
)
def test_unknown_source(source, message):
    with pytest.raises(ThinsightError, match=message):
        load_examples(source)


def test_a_folder_is_no_data_file(folder):
    with pytest.raises(ThinsightError, match="is a folder"):
        load_examples(folder)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_bad_limit(folder, limit):
    with pytest.raises(ThinsightError, match="limit is"):
        load_examples(write(folder, record()), limit=limit)


def test_examples_from_images_in_memory():
    one, other = tiny_images(2)
    examples = [Example("1", (one,), "what ?"), Example("2", (one.copy(),), "how ?"), Example("3", (other,), "how ?")]
    validate_examples(examples)
    assert examples[0].group == examples[1].group != examples[2].group
    assert examples[0].image_keys == examples[1].image_keys != examples[2].image_keys


def test_no_label_is_written_as_null(folder):
    path = write(folder, record(answer=None), record(id="2", answer=None, answers=None), record(id="3", answer=0))
    assert [example.answers for example in load_examples(path)] == [(), (), ("0",)]


def test_a_long_number_is_a_text(folder):
    assert load_examples(write(folder, record(answer=10**400)))[0].answers == (str(10**400),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ("red", "")}, "example '1' has an empty answer"),
        ({"id": "a\ud800"}, "half of a surrogate pair"),
        ({"group": "\ud800"}, "half of a surrogate pair"),
        ({"extra": {"task": "\ud800"}}, "half of a surrogate pair"),
        ({"images": ("gone.png",)}, "example '1': image 'gone.png' does not exist"),
    ],
)
def test_what_is_wrong_in_a_file_is_wrong_by_hand(changes, message):
    fields = {"id": "1", "images": tuple(tiny_images(1)), "question": "what ?", **changes}
    with pytest.raises(ThinsightError, match=message):
        validate_examples([Example(**fields)])


def test_a_pil_image_that_cannot_be_decoded_is_named(folder):
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    with (
        Image.open(folder / "cut.png") as image,
        pytest.raises(ThinsightError, match="example '1': image is truncated or no image"),
    ):
        Example("1", (image,), "what ?")


def test_the_limit_counts_before_images_are_opened(folder):
    (folder / "text.png").write_text("not an image")
    lines = [record(), record(id="2", image="text.png"), record(id="3", image="gone.png")]
    assert [example.id for example in load_examples(write(folder, *lines), limit=1)] == ["1"]
    with pytest.raises(ThinsightError, match=r"example '2': image .*text.png' is truncated"):
        load_examples(write(folder, *lines), limit=2)
    assert len(read_examples(write(folder, *lines))) == 3  # not looked at


def test_progress_is_told_while_images_are_decoded(folder):
    said = []
    load_examples(write(folder, record(), record(id="2")), progress=lambda *each: said.append(each))
    assert said == [("images", 1, 2), ("images", 2, 2)]


def test_examples_made_by_hand_are_checked(folder):
    with pytest.raises(ThinsightError, match="has no image"):
        validate_examples([Example("1", (), "what ?")])
    with pytest.raises(ThinsightError, match="answers is a text"):
        Example("1", (folder / "a.png",), "what ?", "red")
    with pytest.raises(ThinsightError, match="images must be a tuple"):
        Example("1", folder / "a.png", "what ?")


@pytest.mark.parametrize("examples", [None, "demo:test", 5])
def test_what_is_no_list_of_examples(examples):
    with pytest.raises(ThinsightError, match="pass a list of Example"):
        validate_examples(examples)


def test_what_is_no_example():
    with pytest.raises(ThinsightError, match="one is a dict"):
        validate_examples([record()])
    image = tiny_images(1)[0]
    with pytest.raises(ThinsightError, match="question holds None; it must be a text"):
        Example(id="1", images=(image,), question=None)
    with pytest.raises(ThinsightError, match="answers holds 3; it must be a text"):
        Example(id="1", images=(image,), question="how many ?", answers=(3,))
    assert Example(id="1", images=(image,), question="how many ?", answers=None).answers == ()


def test_images_open_as_rgb(folder):
    Image.new("RGBA", (4, 3), (255, 0, 0, 128)).save(folder / "alpha.png")
    opened = open_image(folder / "alpha.png")
    assert (opened.mode, opened.size) == ("RGB", (4, 3))
    assert open_image(Image.new("L", (2, 2))).mode == "RGB"
