"""VLMEvalKit asks the demo on a local table under a reduction: answers are thinsight's, failures end the run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import thinsight as ts

COUNT = 12
NAME = "demo_table"
DEMO = Path(ts.__file__).parent / "demo"
REDUCTION = ts.Reduction(ts.Schedule.step(12, 1, 0.04), {"name": "random", "seed": 1})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is $LMUData, with a table of the demo's questions."""
    folder = tmp_path_factory.mktemp("LMUData")
    with (DEMO / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(COUNT), strict=False)]
    with (folder / f"{NAME}.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image_path", "question", "answer"])
        table.writerows([n, DEMO / row["image"], row["question"], row["answer"]] for n, row in enumerate(rows))
    return folder


def run(data: Path, out: Path, *told: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LMUData": str(data), "HF_HUB_OFFLINE": "1"}
    options = ["--data", NAME, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8", "--work-dir", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "thinsight.vlmevalkit", "--model", "demo", *options, *told],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def answers(out: Path) -> list[str]:
    """What the harness wrote."""
    (table,) = out.rglob(f"*{NAME}.xlsx")
    return [str(each) for each in pd.read_excel(table)["prediction"]]


def asked(data: Path, reduction: ts.Reduction | None) -> list[float]:
    """Each question's score by thinsight on the same table."""
    model, processor = ts.load_model("demo", "float32", "cpu")
    examples = ts.load_examples(data / f"{NAME}.tsv")
    evaluator = ts.Evaluator(model, processor, examples, batch_size=1, max_new_tokens=8)
    found = evaluator.full if reduction is None else evaluator(reduction)
    assert found.per_example is not None
    return found.per_example.tolist()


@pytest.mark.parametrize("reduced", [False, True])
def test_answers_are_those_of_thinsight(data: Path, tmp_path: Path, reduced: bool) -> None:
    REDUCTION.save_pretrained(tmp_path / "reduction")
    told = ("--reduction", str(tmp_path / "reduction")) if reduced else ()
    done = run(data, tmp_path, "--mode", "infer", *told)
    assert done.returncode == 0, done.stderr
    right = [example.answers[0] for example in ts.load_examples(data / f"{NAME}.tsv")]
    scores = [float(said == true) for said, true in zip(answers(tmp_path), right, strict=True)]
    assert scores == asked(data, REDUCTION if reduced else None)
    assert (sum(scores) < COUNT - 2) == reduced  # it was really on


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["--reduction", "no-such-folder"], "there is no folder no-such-folder"),
        (["--keep", "0.5", "--reduction", "a/b"], "reduction and keep: both given"),
        (["--keep", "0.5", "--layer", "99", "--mode", "infer"], "99"),  # known once the model is loaded
        (["--keep", "0.5"], "data 'demo_table' failed"),  # VLMEvalKit scores no table of its users
    ],
)
def test_what_fails_ends_the_run(data: Path, tmp_path: Path, told: list[str], why: str) -> None:
    done = run(data, tmp_path, *told)
    assert done.returncode == 1
    last: Any = done.stderr.strip().splitlines()[-1]
    assert last.startswith("thinsight: ")
    assert why in last
