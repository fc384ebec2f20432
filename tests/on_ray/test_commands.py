"""Commands with workers write what they write without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun

import thinsight as ts
from thinsight.job.commands import evaluate
from thinsight.job.compare import compare
from thinsight.job.options import CompareOptions, EvaluateOptions, ModelOptions, SearchOptions
from thinsight.job.pipeline import SearchOutcome, search_and_report
from thinsight.progress import Watcher


class Seen(Watcher):
    """What was told of workers."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def on_workers(self, shown: str) -> None:
        self.shown.add(shown)


def given(small: SmallRun, out: Path) -> dict[str, Any]:
    model = ModelOptions(small.model, device="cpu")
    return {
        "model": model,
        "data": small.calibration,
        "test_data": small.test,
        "max_new_tokens": 2,
        "batch_size": 2,
        "out": out,
    }


def test_search_writes_one_reduction_with_two_workers_with_one_and_without(address: str, tmp_path: Path) -> None:
    def searched(name: str, watcher: Watcher | None = None, **workers: Any) -> dict[str, Any]:
        options = SearchOptions(
            limit=24, max_drop=0.05, step=64, certify=False, out=tmp_path / name, pictures=0, timing_runs=1, **workers
        )
        outcome = search_and_report(options, watcher)
        assert outcome.reduction == ts.Reduction.from_pretrained(outcome.folder)
        assert not outcome.reduction.schedule.is_full
        written: dict[str, Any] = json.loads((outcome.folder / "reduction_config.json").read_text())
        written["search"].pop("evaluations")  # counted in full runs' FLOPs, which reused prefixes save
        written["measured"].pop("latency")
        return written

    seen = Seen()
    together = searched("two", seen, workers=2, ray=address)
    assert {"workers ##", "workers --"} <= seen.shown
    assert together == searched("one", workers=1) == searched("none")


def test_search_along_a_frontier(address: str, small: SmallRun, tmp_path: Path) -> None:
    def searched(name: str, **workers: Any) -> SearchOutcome:
        about = given(small, tmp_path / name)
        options = SearchOptions(
            **about, frontier=True, budget=0.55, certify=False, timing_runs=1, pictures=0, **workers
        )
        return search_and_report(options)

    together, alone = searched("two", workers=2, ray=address), searched("none")
    assert replace(together.reduction, measured=None) == replace(alone.reduction, measured=None)  # in milliseconds
    assert together.data.frontier == alone.data.frontier
    assert len(alone.data.frontier) > 2


def test_compare(address: str, small: SmallRun, tmp_path: Path) -> None:
    def compared(name: str, **workers: Any) -> Any:
        methods = ("fastv", "search-random", "search-psigmoid")
        about = given(small, tmp_path / name)
        options = CompareOptions(**about, budgets=(0.6, 0.3), methods=methods, n_trials=6, **workers)
        return [replace(run, seconds=0.0) for run in compare(options).comparison.runs]

    together, alone = compared("two", workers=2, ray=address), compared("none")
    assert together == alone
    assert len(alone) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluate(address: str, workers: int, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ts.Reduction(ts.Schedule.step(4, 1, 0.25)).save_pretrained(tmp_path)
    about = {name: value for name, value in given(small, tmp_path).items() if name not in ("out", "test_data")}

    def evaluated(**given: Any) -> Any:
        return evaluate(EvaluateOptions(**about, reduction=str(tmp_path), **given))

    if workers == 1:
        together = evaluated(workers=1, ray=address)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
        together = evaluated(workers=2)
    alone = evaluated()
    assert together.methods == alone.methods
    assert (together.headline, together.per_task) == (alone.headline, alone.per_task)
