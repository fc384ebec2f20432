"""`--cache-dir`: what a run keeps there is read by the next one, which comes to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun
from typer.testing import CliRunner, Result

from thinsight import load_examples
from thinsight.cli import app
from thinsight.evaluation import Evaluator, features
from thinsight.evaluation.full_model import FullModel
from thinsight.loading import load_model

SETTINGS = {
    "search": ["--max-drop", 0.7, "--limit", 4],
    "compare": ["--budget", 0.5, "--methods", "search-random,divprune,fastv", "--n-trials", 8],
}


def invoke(command: str, small: SmallRun, *more: object) -> Result:
    words = [command, "--model", small.model, "--device", "cpu", "--max-new-tokens", 2, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def run(command: str, small: SmallRun, out: Path, *more: object) -> Result:
    data = ["--data", small.calibration, "--test-data", small.test, "--batch-size", 4, "--out", out]
    return invoke(command, small, *data, *SETTINGS[command], *more)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and the encoder and the full model's passes are forbidden."""

    def computed(*_: Any) -> None:
        raise AssertionError("computed again")

    def forbid() -> None:
        monkeypatch.setattr(FullModel, "_answer_all", computed)
        monkeypatch.setattr(features, "encode_images", computed)

    return forbid


def test_a_second_comparison_reads_what_the_first_one_kept(small: SmallRun, tmp_path: Path, refuse: Any) -> None:
    def runs(name: str, *more: object) -> list[dict[str, Any]]:
        result = run("compare", small, tmp_path / name, *more)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / name / "comparison.json").read_text())["runs"]
        return [{**each, "seconds": None} for each in found]

    kept = tmp_path / "kept"
    plain = runs("plain")
    assert not kept.exists()
    assert runs("first", "--cache-dir", kept) == plain
    assert {path.name.split("-")[0] for path in kept.iterdir()} == {"answers", "vision"}
    refuse()
    assert runs("second", "--cache-dir", kept) == plain


def test_a_search_keeps_what_the_next_one_needs(small: SmallRun, tmp_path: Path, refuse: Any) -> None:
    kept = tmp_path / "kept"
    result = run("search", small, tmp_path / "out", "--cache-dir", kept)
    assert result.exit_code == 0, result.output
    refuse()
    model, processor = load_model(small.model, device="cpu")
    for data in (small.calibration, small.test):
        examples = load_examples(data, 4)
        evaluator = Evaluator(model, processor, examples, batch_size=4, max_new_tokens=2, cache_dir=str(kept))
        assert len(evaluator.full_answers) == 4
        assert evaluator._full_model.vision.inputs(examples)


def test_an_evaluation_reads_what_a_search_kept(small: SmallRun, tmp_path: Path, refuse: Any) -> None:
    """Of the test set, which is encoded in the same batches."""
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert run("search", small, out, "--cache-dir", kept).exit_code == 0
    on_it = ("--reduction", out, "--data", small.test, "--limit", 4, "--batch-size", 4)
    plain = invoke("evaluate", small, *on_it)
    assert plain.exit_code == 0, plain.output
    refuse()
    again = invoke("evaluate", small, *on_it, "--cache-dir", kept)
    assert again.exit_code == 0, again.output
    assert again.stdout == plain.stdout


@pytest.mark.parametrize("command", ["search", "compare", "evaluate"])
def test_a_folder_that_cannot_be_written_is_one_line(command: str, small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unwritable = ("--cache-dir", tmp_path / "file")
    if command == "evaluate":
        result = invoke(command, small, "--data", small.test, *unwritable)
    else:
        result = run(command, small, tmp_path / "out", *unwritable)
    assert result.exit_code == 2
    assert "cache_dir" in result.stderr
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
