"""The command `thinsight convert`: a checkpoint in, a folder out, and every mistake as one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from original_checkpoints import write_checkpoint
from transformers import AutoConfig
from typer.testing import CliRunner, Result

from thinsight.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    write_checkpoint(tmp_path / "original", "InternVL2-2B")
    out = tmp_path / "a folder"
    result = run("convert", tmp_path / "original", "--out", out)
    assert result.exit_code == 0
    assert f"Model: {out}\n" in result.stdout
    assert f"Use it with: thinsight search --model '{out}'\n" in result.stdout
    assert "Converting the weights" in result.stderr
    assert AutoConfig.from_pretrained(out).model_type == "internvl"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-2B")
    for arguments, expected in {
        ("convert",): "Missing argument",
        ("convert", tmp_path / "original"): "Missing option '--out'",
        ("convert", tmp_path / "nowhere/at/all", "--out", tmp_path / "out"): "neither a folder that exists",
        ("convert", "demo", "--out", tmp_path / "out"): "model_type 'llava'",
        ("convert", tmp_path / "original", "--out", tmp_path): "is not empty",
    }.items():
        result = run(*arguments)
        assert result.exit_code == 2
        assert expected in result.stderr
        assert result.stderr.strip().split("\n")[-1].startswith("error: ")
