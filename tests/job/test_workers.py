"""Commands with workers: what they find is what one device finds; checked before long work."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun

from benchmarks.simulated import SimulatedTransport
from thinsight.errors import BadInput, MissingPackage
from thinsight.evaluation import ray_workers
from thinsight.job import opening, workers
from thinsight.job import options as told
from thinsight.job.commands import evaluate
from thinsight.job.compare import compare
from thinsight.job.pipeline import SearchOutcome, search_and_report
from thinsight.job.workers import anywhere
from thinsight.progress import Watcher


def simulated(make: Any, workers: Any, *, address: Any, gpus_per_worker: Any) -> SimulatedTransport:
    return SimulatedTransport(make, workers)


@pytest.fixture
def on_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "RayTransport", simulated)
    monkeypatch.setattr(ray_workers, "import_ray", lambda: None)


class Seen(Watcher):
    """What was told of workers, and stages."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.stages: list[str] = []

    def on_stage(self, title: str) -> None:
        self.stages.append(title)

    def on_workers(self, shown: str) -> None:
        self.shown.add(shown)


def given(small: SmallRun, out: Path) -> dict[str, Any]:
    about = {"model": told.ModelOptions(small.model, device="cpu"), "data": small.calibration, "test_data": small.test}
    return {**about, "max_new_tokens": 2, "batch_size": 2, "out": out}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_drop": 0.7, "certify": False, "step": 4},
        {"max_drop": 0.9, "confidence": 0.5, "step": 4},  # certified
        {"frontier": True, "budget": 0.55, "certify": False},
    ],
    ids=["estimated", "certified", "frontier"],
)
def test_search_finds_measures_and_promises_the_same(
    on_a_clock: None, small: SmallRun, changes: dict[str, Any], tmp_path: Path
) -> None:
    def searched(name: str, watcher: Watcher | None = None, **workers: Any) -> SearchOutcome:
        options = told.SearchOptions(
            **given(small, tmp_path / name), **changes, timing_runs=1, new_tokens=2, pictures=2, **workers
        )
        return search_and_report(options, watcher)

    seen = Seen()
    together, alone = searched("two", seen, workers=2), searched("none")
    first, second = (each.reduction.to_dict() for each in (together, alone))
    for each in (first, second):  # counted in FLOPs, which reused prefixes save, and in milliseconds
        each["search"].pop("evaluations")
        each["measured"].pop("latency")
    assert first == second
    for name in ("methods", "per_task", "frontier", "changes", "consistency", "certificate"):
        assert getattr(together.data, name) == getattr(alone.data, name), name
    assert (alone.data.certificate is None) == ("confidence" not in changes)
    assert {"workers --", "workers ##"} <= seen.shown


def test_compare_says_the_same(on_a_clock: None, small: SmallRun, tmp_path: Path) -> None:
    def compared(name: str, watcher: Watcher | None = None, **workers: Any) -> Any:
        options = told.CompareOptions(
            **given(small, tmp_path / name),
            budgets=(0.6, 0.3),
            methods=(
                "fastv",
                "uniform",
                "random",
                "search-adaptive",
                "search-random",
                "search-psigmoid",
                "search-sensitivity",
            ),
            n_trials=12,
            max_drop=0.9,
            confidence=0.5,
            **workers,
        )
        outcome = compare(options, watcher)
        return [replace(run, seconds=0.0, evaluations=0.0) for run in outcome.comparison.runs]

    seen = Seen()
    together, alone = compared("two", seen, workers=2), compared("none")
    assert "Scoring all baselines" in seen.stages  # none waits for the end of another
    assert together == alone
    assert len({run.method for run in alone}) == 7


def test_a_worker_of_several_devices_spreads_its_model(
    on_a_clock: None, small: SmallRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver's own model is loaded as ever; what Ray gives a worker, transformers shares out."""
    loaded: list[Any] = []
    load = opening.load_model

    def noted(*arguments: Any, **more: Any) -> Any:
        loaded.append(inspect.signature(load).bind(*arguments, **more).arguments.get("device_map"))
        return load(*arguments, **more)

    monkeypatch.setattr(opening, "load_model", noted)
    about = {name: value for name, value in given(small, tmp_path).items() if name not in ("out", "test_data")}
    evaluate(told.EvaluateOptions(**about, workers=2, gpus_per_worker=2))
    assert loaded == [None, "auto", "auto"]
    for each in (None, 0, 0.5, 1):
        assert workers.device_map_of(told.EvaluateOptions(workers=2, gpus_per_worker=each)) is None


def test_evaluate_says_the_same(on_a_clock: None) -> None:
    alone, together = (evaluate(told.EvaluateOptions(limit=12, workers=count)) for count in (None, 2))
    assert together.headline == alone.headline
    assert together.methods == alone.methods
    assert together.per_task == alone.per_task


@pytest.mark.parametrize("count", ["many", "2.5", "-1", 0, -1, 2.5, True])
def test_a_number_of_workers_that_is_none(count: Any) -> None:
    for options in (told.EvaluateOptions, told.SearchOptions, told.CompareOptions, told.AnswerOptions):
        with pytest.raises(BadInput, match="workers is"):
            options(workers=count).check()


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
