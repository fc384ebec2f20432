"""Progress on the terminal: one line per finished stage, a bar only where there is a terminal, and the
search's ETA."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from thinsight.console import ConsoleWatcher
from thinsight.schedule import Schedule
from thinsight.searches import Progress, SearchPlan, Trial


def trial() -> Trial:
    return Trial(
        layer=3,
        keep_rate=0.5,
        count=8,
        score=0.875,
        complete=True,
        accepted=True,
        schedule=Schedule.full(4),
        seconds=1.0,
    )


def job(watcher: ConsoleWatcher) -> None:
    with watcher:
        watcher.on_stage("Reading [the] data")
        watcher.on_progress("examples", 3, 10)
        watcher.on_stage("Searching")
        plan = SearchPlan("gsearch", 4, 2, 16, 1.0, 0.01, recorded=5, expected=10)
        watcher.on_start(plan)
        watcher.on_trial(trial(), Progress(layer=3, evaluations=6, expected=10, seconds=6.0))
        watcher.on_layer(3, 8, Progress(layer=4, evaluations=6, expected=6, seconds=6.0))


def test_lines_without_a_terminal() -> None:
    file = io.StringIO()
    job(ConsoleWatcher(Console(file=file, width=100)))
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("✓ Reading [the] data  0:0")
    assert lines[1] == "5 evaluations are in the journal and will not be run again"
    assert lines[2] == "  layer 3: 8 vision tokens (6 evaluations so far)"
    assert lines[3].startswith("✓ Searching  0:0")
    assert len(lines) == 4


def test_a_terminal_shows_what_each_worker_does() -> None:
    file = io.StringIO()
    with ConsoleWatcher(Console(file=file, width=100, force_terminal=True)) as watcher:
        watcher.on_stage("Searching")
        watcher.on_workers("workers #.-")
        watcher._bar.refresh()
    assert "workers #.-" in file.getvalue()


def test_a_note_in_a_log_is_one_line_however_long() -> None:
    file = io.StringIO()
    ConsoleWatcher(Console(file=file, width=20)).on_note("as long as it takes " * 5)
    assert file.getvalue().count("\n") == 1


def test_what_is_told_does_not_move_the_cursor() -> None:
    file = io.StringIO()
    with ConsoleWatcher(Console(file=file, width=100)) as watcher:
        watcher.on_stage("Testing\x1b[2J\nmine")
        watcher.on_note("warning: file \x1b]0;owned\x07\rerror")
    assert file.getvalue().split("\n")[0] == "warning: file \\x1b]0;owned\\x07 error"
    assert file.getvalue().split("\n")[1].startswith("✓ Testing\\x1b[2J mine  0:0")


def test_a_note_is_not_endless() -> None:
    file = io.StringIO()
    ConsoleWatcher(Console(file=file, width=20)).on_note("x" * 10_000 + " choose another")
    assert len(file.getvalue()) == 1001
    assert file.getvalue().endswith("x choose another\n")


def test_the_bar_tells_layer_score_and_time_left() -> None:
    file = io.StringIO()
    watcher = ConsoleWatcher(Console(file=file, width=120, force_terminal=True))
    with watcher:
        watcher.on_stage("Searching")
        watcher.on_trial(trial(), Progress(layer=3, evaluations=6, expected=10, seconds=6.0))
        watcher._bar.refresh()
    assert "layer 3, 8 tokens: score 0.875, at most 0:04 left" in file.getvalue()


def test_a_stage_that_fails_is_not_ticked_off() -> None:
    file = io.StringIO()

    def failing_job() -> None:
        with ConsoleWatcher(Console(file=file)) as watcher:
            watcher.on_stage("Reading the data")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_job()
    assert "✓" not in file.getvalue()
