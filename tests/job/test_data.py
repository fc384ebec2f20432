"""`thinsight data`: what it says of data, and the options by which every command reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import SmallRun
from tiny import tiny_images
from typer.testing import CliRunner

from thinsight import cli
from thinsight.errors import BadInput
from thinsight.evaluation.example import Example
from thinsight.evaluation.prompts import prompt_text
from thinsight.job.data import kind_of, look
from thinsight.job.options import DataOptions, JobOptions, columns_from
from thinsight.loading import load_processor


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Data with names of its own, its images in a folder beside it."""
    (tmp_path / "images").mkdir()
    for name, image in zip("ab", tiny_images(2), strict=True):
        image.save(tmp_path / "images" / f"{name}.png")
    asked = [("what ?\nA. red\nB. blue", "B"), ("is it red ?", "no"), ("how many ?", 3), ("who ?", None)]
    records = [
        {"id": n, "pics": ["a.png", "b.png"] if n == 3 else "a.png", "q": question, "a": answer, "task": "t" * (n + 1)}
        for n, (question, answer) in enumerate(asked)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def options(own: Path, **changes: object) -> DataOptions:
    columns = {"image": "pics", "question": "q", "answers": "a"}
    given = {"columns": columns, "image_folder": own.parent / "images", **changes}
    return DataOptions(data=str(own), **given)  # type: ignore[arg-type]


def test_what_was_understood(own: Path) -> None:
    found = look(options(own))
    assert (found.reader, found.examples, found.images, found.most_images) == ("jsonl", 4, 2, 2)
    assert dict(found.kinds) == {"2 options": 1, "yes or no": 1, "number": 1, "no label": 1}
    assert dict(found.metrics) == {"exact_match": 3, "agreement": 1}
    assert [each.id for each in found.rendered] == ["0", "3"]  # each about another image
    assert found.lines()[:5] == [
        "Example 0, 1 image:",
        "    what ?",
        "    A. red",
        "    B. blue",
        "  answers: B (exact_match)",
    ]


def test_prompts_as_a_model_gets_them(own: Path, small: SmallRun) -> None:
    found = look(options(own, model=small.model))
    processor = load_processor(small.model)
    image = tiny_images(1)[0]
    assert found.rendered[0].text == prompt_text(processor, Example("0", (image,), "what ?\nA. red\nB. blue"))
    assert found.rendered[0].text.count("<image>") == 1
    assert found.rendered[1].text.count("<image>") == 2


def test_the_command(own: Path, small: SmallRun) -> None:
    told = ["--columns", "image=pics,question=q,answers=a", "--image-folder", str(own.parent / "images")]
    result = CliRunner().invoke(cli.app, ["data", str(own), *told, "--model", small.model, "--limit", "3"])
    assert result.exit_code == 0, result.output
    for words in ("questions", "2 options (1)", "exact_match (3)", "Example 0, 1 image:", "<image>", "answers: B"):
        assert words in result.stdout
    result = CliRunner().invoke(cli.app, ["data", str(own)])
    assert result.exit_code == 2
    assert "line 1 has no field 'image'" in result.stderr


def test_every_command_reads_so(own: Path, small: SmallRun) -> None:
    told = ["--columns", "image=pics,question=q,answers=a", "--image-folder", str(own.parent / "images")]
    run = ["evaluate", "--model", small.model, "--data", str(own), *told, "--limit", "3", "--max-new-tokens", "2"]
    result = CliRunner().invoke(cli.app, run)
    assert result.exit_code == 0, result.output
    assert "3 test questions" in result.stdout


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("image=img", {"image": "img"}),
        (" image = my pic , answers=a=b", {"image": "my pic", "answers": "a=b"}),
        ("image", None),
        ("image=", None),
        ("image=a,image=b", None),
        ("", None),
    ],
)
def test_columns_on_the_command_line(text: str, columns: dict[str, str] | None) -> None:
    if columns is None:
        with pytest.raises(BadInput, match=r"columns is .*: write image=NAME"):
            columns_from(text)
    else:
        assert columns_from(text) == columns


def test_what_is_said_of_no_data_is_refused() -> None:
    with pytest.raises(BadInput, match="columns is of data of your own: give it with --data"):
        JobOptions(columns={"image": "img"}).check()
    with pytest.raises(BadInput, match="image_folder is of data of your own"):
        DataOptions(image_folder=Path()).check()
    with pytest.raises(BadInput, match="columns names the field 'pic'"):
        DataOptions(data="x.jsonl", columns={"pic": "img"}).check()


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (("Yes.",), "yes or no"),
        (("true",), "yes or no"),
        (("12.5 %", "1,200"), "number"),
        (("a red dog",), "short text"),
        (("a", "a big red dog"), "text"),
        ((), "no label"),
    ],
)
def test_kinds_of_questions(answers: tuple[str, ...], kind: str) -> None:
    assert kind_of(Example("1", (tiny_images(1)[0],), "what ?", answers)) == kind
