"""A run's folder keeps whole results, refuses other settings, and says in one line what is wrong with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from thinsight.errors import ThinsightError
from thinsight.job.run_folder import RunFolder, check_writable_file


@dataclass(frozen=True)
class Result:
    score: float
    parts: tuple[float, ...]


def test_a_stage_is_computed_once(tmp_path: Path) -> None:
    folder, calls = RunFolder(tmp_path / "run", resume=False), []

    def compute() -> Result:
        calls.append(1)
        return Result(0.1 + 0.2, (1.0, 2.0))

    first = folder.once("test", Result, compute)
    again = RunFolder(tmp_path / "run", resume=True).once("test", Result, compute)
    assert first == again == Result(0.1 + 0.2, (1.0, 2.0))
    assert len(calls) == 1
    assert folder.has("test")
    assert not folder.has("other")


def test_an_interrupted_stage_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)

    def interrupted() -> Result:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.once("test", Result, interrupted)
    assert not folder.has("test")
    assert list((tmp_path / "stages").iterdir()) == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).bind({"seed": 0, "model": "demo"})
    resumed = RunFolder(tmp_path, resume=True)
    resumed.bind({"seed": 0, "model": "demo"})
    with pytest.raises(ThinsightError, match="made with seed 0, this run has 1"):
        resumed.bind({"seed": 1, "model": "demo"})


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).bind({"seed": 0})
    with pytest.raises(ThinsightError, match="--resume"):
        RunFolder(tmp_path, resume=False)


def test_damaged_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=True)
    (tmp_path / "stages" / "test.json").write_text('{"score": 1')
    with pytest.raises(ThinsightError, match="not valid JSON"):
        folder.once("test", Result, lambda: Result(1.0, ()))
    (tmp_path / "stages" / "test.json").write_text('{"score": "high", "parts": []}')
    with pytest.raises(ThinsightError, match="score"):
        folder.once("test", Result, lambda: Result(1.0, ()))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ThinsightError, match="is a file"):
        RunFolder(tmp_path / "out", resume=False)
    with pytest.raises(ThinsightError, match="cannot be written"):
        RunFolder(tmp_path / "out" / "below", resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ThinsightError, match="cannot be written"):
        RunFolder(tmp_path / "out", resume=False)


def test_writable_files(tmp_path: Path) -> None:
    check_writable_file(tmp_path / "new" / "picture.png")
    with pytest.raises(ThinsightError, match="is a folder"):
        check_writable_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ThinsightError, match="cannot be written"):
        check_writable_file(tmp_path / "file" / "picture.png")
