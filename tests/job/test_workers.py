"""Commands with workers: what they find is what one device finds; checked before long work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulated import SimulatedTransport
from thinsight.errors import BadInput, MissingPackage
from thinsight.evaluation import ray_workers
from thinsight.job import options as told
from thinsight.job.commands import evaluate
from thinsight.job.workers import anywhere


def simulated(make: Any, workers: Any, *, address: Any, gpus_per_worker: Any) -> SimulatedTransport:
    return SimulatedTransport(make, workers)


def test_evaluate_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "RayTransport", simulated)
    monkeypatch.setattr(ray_workers, "import_ray", lambda: None)
    alone, together = (evaluate(told.EvaluateOptions(limit=12, workers=count)) for count in (None, 2))
    assert together.headline == alone.headline
    assert together.methods == alone.methods
    assert together.per_task == alone.per_task


@pytest.mark.parametrize("workers", ["many", 0, True])
def test_a_number_of_workers_that_is_none(workers: Any) -> None:
    with pytest.raises(BadInput, match="workers is"):
        told.EvaluateOptions(workers=workers).check()


def test_without_ray_workers_are_refused_at_once_and_one_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"pip install 'thinsight\[ray\]'"):
        told.SearchOptions(workers=2).check()
    told.EvaluateOptions(workers=1).check()
    with pytest.raises(BadInput, match="gpus_per_worker is 2 without workers"):
        told.EvaluateOptions(gpus_per_worker=2).check()


def test_workers_in_other_folders_are_told_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    found = anywhere(told.EvaluateOptions(data="mine.jsonl", cache_dir=Path("kept")))
    assert (found.data, found.cache_dir) == (str(tmp_path / "mine.jsonl"), tmp_path / "kept")
    assert found.model.model == "demo"
    assert anywhere(told.EvaluateOptions(data="demo:test")).data == "demo:test"
