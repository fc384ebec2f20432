"""Drivers that are interrupted and killed on a Ray of their own, as `--workers` without `--ray` begins it."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import psutil
from drivers import Driver, left, lines, workers_of

import thinsight as ts
from thinsight.job.options import SearchOptions
from thinsight.job.pipeline import search_and_report


def test_an_interrupt_while_ray_begins_leaves_nothing() -> None:
    """Ray itself crashes where it is interrupted then."""
    driver = Driver("evaluate", "--limit", "8", "--workers", "2")
    ours = psutil.Process(driver.process.pid)
    below = driver.wait_for(lambda: any(each.name() == "raylet" for each in ours.children(recursive=True)))
    code, said = driver.interrupt()
    assert code == 130
    assert said.endswith("interrupted\n")
    assert not left(below)


def test_a_search_that_is_interrupted_and_then_killed_goes_on(tmp_path: Path) -> None:
    """Whatever ends it, its workers and its Ray end within seconds, and the reduction is that of one device."""
    settings = ["--limit", "24", "--step", "32", "--max-drop", "0.05", "--no-certify", "--workers", "2", "--resume"]
    out = tmp_path / "together"
    journal = out / "study.jsonl"

    def begun() -> Driver:
        return Driver("search", *settings, "--out", str(out))

    driver = begun()
    below = driver.wait_for(lambda: lines(journal) > 3)
    assert len(workers_of(below)) == 2
    code, said = driver.interrupt()
    assert code == 130
    assert "interrupted: what is done is kept; continue with" in said
    assert not left(below)

    done = lines(journal)
    driver = begun()
    below = driver.wait_for(lambda: lines(journal) > done + 2)
    assert len(workers_of(below)) == 2
    assert driver.kill()[0] == -signal.SIGKILL
    assert not left(workers_of(below))  # agents of Ray's notice it after a minute

    code, said = begun().end(300)
    assert code == 0, said
    assert "evaluations are in the journal" in said
    alone = search_and_report(
        SearchOptions(limit=24, step=32, max_drop=0.05, certify=False, out=tmp_path / "alone", pictures=0)
    )
    found = ts.Reduction.from_pretrained(out)  # but for milliseconds and FLOPs
    assert replace(found, measured=None, search=None) == replace(
        alone.reduction, measured=None, search=None
    )  # times, FLOPs
    assert not alone.reduction.schedule.is_full
