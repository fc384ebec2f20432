"""The twelve benchmarks: how their data is asked, mixed, split and reported."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun
from tiny import tiny_images
from typer.testing import CliRunner

from thinsight import cli, load_examples
from thinsight.errors import BadInput
from thinsight.evaluation.benchmarks import BENCHMARKS, benchmark_of, longest_answer
from thinsight.evaluation.examples import read_examples
from thinsight.evaluation.metrics import METRICS, metric_for
from thinsight.job.opening import load_sets
from thinsight.job.options import JobOptions, SearchOptions
from thinsight.report.data import load_report_data

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(number: int = 0) -> str:
    buffer = io.BytesIO()
    tiny_images(number + 1)[number].save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def lines(folder: Path, *records: dict[str, Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    told = [{"id": n, "image": png(), "question": "what ?", "answer": "yes", **each} for n, each in enumerate(records)]
    path.write_text("\n".join(map(json.dumps, told)))
    return path


def table(folder: Path, columns: list[str], *rows: list[str]) -> Path:
    path = folder / "data.tsv"
    path.write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    return path


def asked(name: str, path: Path) -> list[tuple[str, tuple[str, ...]]]:
    examples = load_examples(f"benchmark:{name}={path}")
    assert {each.metric for each in examples} == {BENCHMARKS[name].metric}
    return [(each.question, each.answers) for each in examples]


def test_there_are_the_twelve_of_the_paper() -> None:
    wanted = "mme mmbench gqa mmmu mathvista ai2d textvqa chartqa docvqa pope realworldqa hallusionbench"
    assert list(BENCHMARKS) == wanted.split()
    for each in BENCHMARKS.values():
        assert each.metric in METRICS
        assert each.measures
        assert each.hub.startswith("hf:") or each.name == "gqa"


@pytest.mark.parametrize(
    ("name", "record", "question", "answers"),
    [
        ("mme", {"question": "Is it ? Please answer yes or no."}, f"Is it ?{SHORT}", ("yes",)),
        ("pope", {"question": "Is there a dog ?"}, f"Is there a dog ?{SHORT}", ("yes",)),
        ("gqa", {}, f"what ?{SHORT}", ("yes",)),
        ("docvqa", {"answers": ["a", "b"], "answer": None}, f"what ?{SHORT}", ("a", "b")),
        ("textvqa", {"question": "what IS it?"}, f"What is it?{SHORT}", ("yes",)),
        ("chartqa", {"type": "human_test"}, "what ?\nAnswer the question with a single word.", ("yes",)),
        ("realworldqa", {"question": "A. red\nB. blue\nOnly the letter.", "answer": "A"}, None, ("A",)),
        ("hallusionbench", {"answer": "1"}, "what ?", ("yes",)),
        ("ai2d", {"options": ["red", "blue"], "answer": "1"}, f"what ?\nA. red\nB. blue{LETTER}", ("B",)),
        ("mmmu", {"options": "['red', 'blue']", "answer": "B"}, f"what ?\nA. red\nB. blue\n{LETTER}", ("B",)),
        ("mmmu", {"options": "[]", "answer": "7"}, f"what ?\n{SHORT}", ("7",)),
        (
            "mathvista",
            {"answer_type": "float", "precision": 1.0, "answer": "1.2"},
            "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
            "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: what ?",
            ("1.2",),
        ),
        ("mathvista", {"question": "Hint: short.\nQuestion: what ?"}, "Hint: short.\nQuestion: what ?", ("yes",)),
    ],
)
def test_how_a_question_is_asked(
    tmp_path: Path, name: str, record: dict[str, Any], question: str | None, answers: tuple[str, ...]
) -> None:
    ((found, labels),) = asked(name, lines(tmp_path, record))
    assert found == (question or record["question"])
    assert labels == answers


def test_mathvista_lists_its_choices(tmp_path: Path) -> None:
    ((question, answers),) = asked("mathvista", lines(tmp_path, {"options": ["3/11", "8/11"], "answer": "8/11"}))
    assert question.endswith("Question: what ?\nChoices:\n(A) 3/11\n(B) 8/11")
    assert metric_for(answers, "mathvista", "")("(B)", answers, question) == 1


def test_images_of_mmmu_stand_where_each_is_named_once(tmp_path: Path) -> None:
    both = [png(0), png(1)]
    records = [
        {
            "id": "validation_Art_1",
            "image": None,
            "images": both,
            "question": "<image 1> or <image 2> ?",
            "answer": "x",
        },
        {
            "id": "validation_Art_Theory_2",
            "image": None,
            "images": both,
            "question": "<image 2> ? <image 2>",
            "answer": "x",
        },
    ]
    first, second = load_examples(f"benchmark:mmmu={lines(tmp_path, *records)}")
    assert first.question.startswith("<image 1> or <image 2> ?")
    assert second.question.startswith("image 2 ? image 2")
    assert (first.task, second.task) == ("Art", "Art_Theory")


def test_mmbench_is_turned_where_the_data_is_not(tmp_path: Path) -> None:
    columns = ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"]
    row = ["7", png(), "what ?", "look", "red", "blue", "green", "B", "color"]
    found = load_examples(f"benchmark:mmbench={table(tmp_path, columns, row)}")
    assert [each.question for each in found] == [
        f"look\nwhat ?\nA. red\nB. blue\nC. green{LETTER}",
        f"look\nwhat ?\nA. blue\nB. green\nC. red{LETTER}",
        f"look\nwhat ?\nA. green\nB. red\nC. blue{LETTER}",
    ]
    assert [each.answers for each in found] == [("B",), ("A",), ("C",)]
    assert [each.id for each in found] == ["7", "1000007", "2000007"]
    assert {each.extra["unit"] for each in found} == {"7"}
    turned = ["1000007", png(), "what ?", "look", "blue", "red", "", "A", "color"]
    found = load_examples(f"benchmark:mmbench={table(tmp_path, columns, row, turned)}")
    assert [each.id for each in found] == ["7", "1000007"]


def test_gqa_as_it_is_published(tmp_path: Path) -> None:
    tiny_images(1)[0].convert("RGB").save(tmp_path / "n1.jpg")
    path = tmp_path / "testdev.json"
    path.write_text(json.dumps({"q1": {"imageId": "n1", "question": "what ?", "answer": "dog", "types": {}}}))
    (found,) = load_examples(f"benchmark:gqa={path}")
    assert (found.id, found.answers, found.images) == ("q1", ("dog",), (tmp_path / "n1.jpg",))


def test_ids_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    path = lines(tmp_path, {"id": "a.png"}, {"id": "a.png"}, {"id": "b.png"})
    assert [each.id for each in load_examples(f"benchmark:mme={path}")] == ["a.png", "a.png#2", "b.png"]


def test_several_come_in_turn_by_their_weights(tmp_path: Path) -> None:
    one = lines(tmp_path, *({} for _ in range(9)), name="one.jsonl")
    other = lines(tmp_path, *({"task": "t"} for _ in range(30)), name="other.jsonl")
    told = f"benchmark:pope={one},mme*2={other}"
    found = load_examples(told)
    assert Counter(each.task for each in found) == {"pope": 9, "mme": 18}
    assert Counter(each.task for each in found[:6]) == {"pope": 2, "mme": 4}
    assert [each.id for each in found[:3]] == ["pope/0", "mme/0", "mme/1"]
    assert [each.extra.get("category") for each in found[:2]] == [None, "t"]
    assert [benchmark_of(each) for each in found[:2]] == [BENCHMARKS["pope"], BENCHMARKS["mme"]]
    assert longest_answer(found) == 16
    assert [each.id for each in load_examples(told, limit=2)] == ["pope/0", "mme/0"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("pop", "benchmark is 'pop'; did you mean 'pope'"),
        ("pope,pope", "name each once"),
        ("pope*0", "with a weight above 0"),
        ("pope*1.2.3", "with a weight above 0"),
        ("pope mme", "write NAME, NAME=DATA"),
        ("gqa", "benchmark 'gqa' has no place of its own: name its data, gqa=FILE"),
        ("", "write NAME"),
    ],
)
def test_what_is_no_benchmark(told: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        JobOptions(benchmark=told).check()
    with pytest.raises(BadInput, match=message):
        read_examples(f"benchmark:{told}")


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(BadInput, match="data is of one: write NAME=FILE"):
        JobOptions(benchmark="pope,mme", data="x.jsonl").check()
    with pytest.raises(BadInput, match="data is of one: write NAME=FILE"):
        SearchOptions(benchmark="pope=a", test_data="x.jsonl").check()
    assert JobOptions(benchmark="pope", data="x.jsonl").data_name == "benchmark:pope=x.jsonl"
    assert SearchOptions(benchmark="pope", data="x", test_data="y").tested == "benchmark:pope=y"
    with pytest.raises(BadInput, match="columns and annotations are of one benchmark's data"):
        read_examples("benchmark:pope=a,mme=b", columns={"image": "img"})


def test_what_belongs_together_is_not_split(tmp_path: Path) -> None:
    rows = [
        {"image": png(n), "answer": str(n % 2), "task": "VD", "subcategory": "x", "set_id": n // 2, "figure_id": n % 2}
        for n in range(16)
    ]
    sets = load_sets(f"benchmark:hallusionbench={lines(tmp_path, *rows)}", None, None)
    units = [{each.extra["unit"] for each in side} for side in (sets.calibration, sets.test)]
    assert units[0]
    assert units[1]
    assert not units[0] & units[1]
    assert {len(side) % 2 for side in (sets.calibration, sets.test)} == {0}


def test_a_benchmark_is_searched_and_reported(tmp_path: Path, small: SmallRun) -> None:
    rows = [{"image": png(n // 2), "question": f"is it {n} ?", "answer": ("yes", "no")[n % 2]} for n in range(24)]
    one = lines(tmp_path, *rows, name="one.jsonl")
    other = lines(tmp_path, *({**row, "task": "color"} for row in rows), name="other.jsonl")
    run = ["search", "--benchmark", f"pope={one},mme={other}", "--model", small.model]
    run += [
        "--budget",
        "0.5",
        "--method",
        "random",
        "--n-trials",
        "2",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(cli.app, run)
    assert result.exit_code == 0, result.output
    data = load_report_data(tmp_path / "out")
    names = [(each.benchmark, each.name) for each in data.measures]
    assert ("POPE", "F1") in names
    assert ("MME", "perception, of 2000") in names
    assert [row.task for row in data.per_task] == ["pope", "mme"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What the literature reports of each benchmark" in page
    told = json.loads((tmp_path / "out" / "reduction_config.json").read_text())["measured"]
    assert {each["benchmark"] for each in told["benchmarks"]} == {"POPE", "MME"}
    assert str(tmp_path) not in json.dumps(told)


def test_a_benchmark_is_evaluated_and_looked_at(tmp_path: Path, small: SmallRun) -> None:
    rows = [{"image": png(n // 2), "question": f"is it {n} ?", "answer": ("yes", "no")[n % 2]} for n in range(6)]
    told = ["--benchmark", "pope", "--data", str(lines(tmp_path, *rows)), "--model", small.model]
    result = CliRunner().invoke(cli.app, ["evaluate", *told, "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output
    assert "share of yes" in result.stdout
    result = CliRunner().invoke(cli.app, ["data", *told[:2], told[3]])
    assert result.exit_code == 0, result.output
    assert "F1, precision, recall, share of yes, accuracy" in result.stdout
    assert "Answer the question using a single word or phrase." in result.stdout
