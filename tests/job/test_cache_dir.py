"""`--cache-dir`: what a run keeps there is read by the next one, which comes to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun, make_small_run
from typer.testing import CliRunner, Result

from thinsight import load_examples
from thinsight.cli import app
from thinsight.evaluation import Evaluator
from thinsight.evaluation.full_model import FullModel
from thinsight.evaluation.vision_cache import VisionCache
from thinsight.loading import load_model

SETTINGS = {
    "search": ["--max-drop", 0.7, "--limit", 4],
    "compare": ["--budget", 0.5, "--methods", "search-random,divprune,fastv", "--n-trials", 8],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


def run(command: str, small: SmallRun, out: Path, *more: object) -> Result:
    data = ["--model", small.model, "--device", "cpu", "--data", small.calibration, "--test-data", small.test]
    rest = ["--max-new-tokens", 2, "--batch-size", 4, "--out", out]
    words = [command, *data, *SETTINGS[command], *rest, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and the encoder and the full model's passes are forbidden."""

    def computed(*_: Any) -> None:
        raise AssertionError("computed again")

    def forbid() -> None:
        monkeypatch.setattr(FullModel, "_answer_all", computed)
        monkeypatch.setattr(VisionCache, "_encode", computed)

    return forbid


def test_a_second_comparison_reads_what_the_first_one_kept(
    small: SmallRun, tmp_path: Path, refuse: Any
) -> None:
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


@pytest.mark.parametrize("command", ["search", "compare"])
def test_a_folder_that_cannot_be_written_is_one_line(command: str, small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(command, small, tmp_path / "out", "--cache-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert "cache_dir" in result.stderr
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
