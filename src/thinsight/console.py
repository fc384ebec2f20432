"""Draws a job's progress on the terminal: one line that moves, and one line for each thing that is done.

Knows nothing about what the job does. All goes to standard error, so that standard output holds only results.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from .progress import Progress as SearchProgress
from .progress import SearchPlan, Watcher
from .searches.run import SearchResult, Trial
from .shown import clock, tokens
from .texts import capped, counted, terminal


class ConsoleWatcher(Watcher):
    """Use as a context manager around the job."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TextColumn("{task.fields[workers]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._started = 0.0
        self._searching = False

    def __enter__(self) -> ConsoleWatcher:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._finish_stage()
        self._bar.stop()

    def on_stage(self, title: str) -> None:
        self._finish_stage()
        self._title, self._started = terminal(title), time.monotonic()
        self._task = self._bar.add_task(self._title, total=None, detail="", workers="")

    def on_note(self, text: str) -> None:
        log = not self._console.is_terminal  # there, a line stays in one piece
        self._console.print(Text(capped(terminal(text))), soft_wrap=log)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if self._task is not None and not self._searching:
            self._bar.update(self._task, completed=done, total=total, detail=f"{done}/{total}")

    def on_workers(self, shown: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, workers=shown)

    def on_start(self, plan: SearchPlan) -> None:
        self._searching = True  # from here on the bar counts evaluations, not the examples of each
        if plan.recorded:
            self.on_note(plan.resumed)

    def on_trial(self, trial: Trial, progress: SearchProgress) -> None:
        if self._task is None:
            return
        left = "" if progress.seconds_left is None else f", at most {clock(progress.seconds_left)} left"
        where = trial.why if progress.layer is None else f"layer {progress.layer}, {tokens(trial.count)}"
        detail = f"{where}: score {trial.score:.3f}{left}"
        self._bar.update(self._task, completed=progress.evaluations, total=progress.expected, detail=detail)

    def on_layer(self, layer: int, count: int, progress: SearchProgress) -> None:
        self.on_note(
            f"  layer {layer}: {counted(count, 'vision token')} ({counted(progress.evaluations, 'evaluation')} so far)"
        )

    def on_end(self, result: SearchResult) -> None:
        self._searching = False
        if result.full_forwards is not None:
            cost = f"the FLOPs of {result.full_forwards:.1f} runs of the full model over the calibration set"
            self.on_note(f"  {counted(result.evaluations, 'evaluation')}, {cost}")

    def _finish_stage(self) -> None:
        if self._task is None:
            return
        self._bar.remove_task(self._task)
        self._task = None
        seconds = time.monotonic() - self._started
        self._console.print(Text.assemble(("✓ ", "green"), self._title, (f"  {clock(seconds)}", "dim")))
