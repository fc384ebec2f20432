"""A run's folder keeps whole results, refuses other settings, and says in one line what is wrong with it."""

from __future__ import annotations

import itertools
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import changes, failing_writes, full_disk, refused_or_same

from thinsight.errors import BadInput, StorageError, ThinsightError
from thinsight.evaluation.result import RankConsistency
from thinsight.job.compare import _Found
from thinsight.job.opening import RunFolder, Scores, check_writable_file
from thinsight.records import seal


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
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["test.json"]


def test_an_interrupted_stage_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)

    def interrupted() -> Result:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.once("test", Result, interrupted)
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


REMEDY = "; remove it, then resume"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"score": 1', "is not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[" * 500 + "]" * 500, "nested more than 64 deep"),
        (f'{{"score": {"1" * 5000}}}', "a whole number of 5000 digits is too long"),
        (f'{{"score": 1{"0" * 400}}}', "a whole number of 401 digits is too long"),
        ("[]", "is damaged .it is not a JSON object"),
        ('{"score": 1.0, "parts": []}', "is damaged .it has no checksum: .*an older thinsight wrote it"),
        ('{"score": 1.0, "parts": [], "checksum": "0"}', "is damaged .its checksum differs"),
        ('{"score": 1.0, "score": 1.0}', "a key is repeated, 'score'"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, named: str) -> None:
    folder = RunFolder(tmp_path, resume=True)
    (tmp_path / "stages" / "test.json").write_text(content)
    with pytest.raises(StorageError, match=rf"stages/test.json.*{named}.*{REMEDY}"):
        folder.once("test", Result, lambda: Result(1.0, ()))


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        (Result, {"score": "high", "parts": []}, r"\.score: expected a finite number, got 'high'"),
        (Result, {"score": None, "parts": []}, r"\.score: expected a finite number, got None"),
        (Result, {"score": True, "parts": []}, r"\.score: expected a finite number, got True"),
        (Result, {"score": 1, "parts": {}}, r"\.parts: expected a list, got {}"),
        (Result, {"score": 1, "parts": [0, [1]]}, r"\.parts\[1\]: expected a finite number"),
        (Result, {"score": 1}, ": key 'parts' is missing"),
        (Result, {"score": 1, "parts": [], "more": 1}, ": unknown key 'more'"),
        (Scores, {"score": 1.45, "per_example": [1]}, "a score is not from 0 to 1"),
        (Scores, {"score": 1, "per_example": [1, -0.5]}, "a score is not from 0 to 1"),
        (
            RankConsistency,
            {
                "tau": [0.5],
                "tau_matrix": [[1.0]],
                "topk_overlap": [1.0],
                "tied_share": [0.0, 0.0],
                "top_rate": 0.25,
                "examples": 3,
            },
            "tau_matrix must be 2 x 2",
        ),
    ],
)
def test_a_stage_is_read_strictly(tmp_path: Path, kind: Any, value: dict[str, Any], named: str) -> None:
    """With a checksum that fits."""
    folder = RunFolder(tmp_path, resume=True)
    (tmp_path / "stages" / "test.json").write_text(json.dumps(seal(value)))
    with pytest.raises(StorageError, match=rf"test.json.*{named}.*{REMEDY}"):
        folder.once("test", kind, lambda: None)


@pytest.mark.parametrize(
    "result",
    [
        Scores(2 / 3, (1.0, 0.0, 1.0)),
        _Found((1.0, 0.25), {"name": "random", "seed": 3, "of": [None, {}]}, 16.5, 1e-3, None),
        RankConsistency([0.1, math.nan], np.eye(3), [0.5, 1.0], [0.0, 0.25, 1 / 3], 0.25, 3),
        _Found((1.0,), {"name": "½ \ud800"}, 0.1, 0.25, 1.0, "½ \ud800"),
    ],
)
def test_one_changed_byte_is_told_or_changes_nothing(tmp_path: Path, result: Any) -> None:
    folder, kind = RunFolder(tmp_path, resume=True), type(result)
    path = tmp_path / "stages" / "test.json"
    folder.once("test", kind, lambda: result)
    kept, whole = folder.once("test", kind, lambda: None), path.read_bytes()
    refused = 0
    for changed in changes(whole, 300):
        path.write_bytes(changed)
        refused += refused_or_same(lambda: folder.once("test", kind, lambda: None), kept, path)
    assert refused > 200


def test_one_changed_byte_of_the_settings_is_told_or_changes_nothing(tmp_path: Path) -> None:
    settings = {"seed": 10, "model": "demo", "ranker": {"name": "random"}, "max_drop": 0.01, "limit": None}
    RunFolder(tmp_path, resume=False).bind(settings)
    path = tmp_path / "run.json"
    for changed in changes(path.read_bytes(), 300):
        path.write_bytes(changed)
        refused_or_same(lambda: RunFolder(tmp_path, resume=True).bind(settings), None, path)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", "[" * 100_000, '{"version": 1, "seed": 0}'])
def test_settings_that_are_damaged_are_not_to_be_removed(tmp_path: Path, content: str) -> None:
    """Without them nothing tells whose results those are."""
    folder = RunFolder(tmp_path, resume=False)
    folder.bind({"seed": 0})
    folder.once("test", Result, lambda: Result(1.0, ()))
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StorageError, match=r"run\.json is .*; restore it, or give another --out"):
        folder.bind({"seed": 0})
    (tmp_path / "run.json").unlink()
    with pytest.raises(StorageError, match=r"holds results but no run\.json.*restore it, or give another"):
        folder.bind({"seed": 1})


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_stage_that_cannot_be_written_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    for call in itertools.count():
        folder = RunFolder(tmp_path / str(call), resume=False)
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            folder.once("test", Result, lambda: Result(1.0, ()))
        names = [path.name for path in folder.path.rglob("*") if path.is_file()]
        assert names == ([] if failed else ["test.json"])
        if not failed:
            break
    assert call > 3


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)
    folder.once("test", Result, lambda: Result(1.0, ()))
    for where in (tmp_path, tmp_path / "stages"):
        (where / ".thinsight-0123456789abcdef.part").write_bytes(b"half")
    (tmp_path / "own.part").write_bytes(b"a user's")
    RunFolder(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["own.part", "test.json"]


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunFolder("~/run", resume=False).path == tmp_path / "run"
    check_writable_file(Path("~/new/picture.png"))
    assert (tmp_path / "new").is_dir()
    for refused in (lambda path: RunFolder(path, resume=False), lambda path: check_writable_file(Path(path))):
        with pytest.raises(BadInput, match="out '~nouser/x' begins with a user who has no home here"):
            refused("~nouser/x")
    assert not list(tmp_path.glob("~*"))


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
