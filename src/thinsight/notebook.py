"""Draws progress where a notebook's kernel runs us: one place below the cell, redrawn; nothing anywhere else.

Knows nothing about what the work does, and never loads IPython: in a notebook it is loaded already.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .progress import Progress, SearchPlan, Watcher
from .shown import clock, tokens
from .texts import capped, counted, html, terminal

VARIABLE = "THINSIGHT_PROGRESS"  # 0: notebooks show none either
_LEAST = 0.2  # seconds between two drawings
_NOTES = 20  # lines that stay
_BAR = "height: .8em; width: 14em; vertical-align: middle; margin-right: .6em"


def shell() -> Any:
    """The IPython shell of the notebook that we run in; None elsewhere, a terminal's IPython included."""
    ipython = sys.modules.get("IPython")
    found = None if ipython is None or os.environ.get(VARIABLE) == "0" else ipython.get_ipython()
    return found if hasattr(found, "kernel") else None


def watcher() -> Watcher:
    """What draws a job's progress in a notebook, and ignores it elsewhere."""
    return Watcher() if shell() is None else NotebookWatcher()


def progress() -> Callable[[str, int, int], None] | None:
    """Likewise as a function ``progress(what, done, total)``; None elsewhere."""
    return None if shell() is None else NotebookWatcher().on_progress


class _Place:
    """The output of one cell in which all that runs there draws."""

    def __init__(self) -> None:
        self.cell: int | None = None
        self.handle: Any = None
        self.notes: deque[str] = deque(maxlen=_NOTES)
        self.searching, self.title, self.text = "", "", ""
        self.done, self.total = 0, 0
        self.began = self.drawn = time.monotonic()

    def draw(self, text: str, done: int = 0, total: int = 0, *, ended: bool = False) -> None:
        """Show a line with a bar, unless something was shown a moment ago; what has ended is shown always."""
        now = time.monotonic()
        self.text, self.done, self.total = text, done, total
        if self.handle is not None and not ended and now - self.drawn < _LEAST:
            return
        self.drawn = now
        line = f"✓ {text}  {clock(now - self.began)}" if ended else text
        bar = "" if ended or not total else f'<progress style="{_BAR}" value="{done}" max="{total}"></progress>'
        lines = [*self.notes, line]
        page = "".join(f"<div>{html(each)}</div>" for each in self.notes) + f"<div>{bar}{html(line)}</div>"
        shown = {"text/plain": "\n".join(lines), "text/html": f'<div class="thinsight-progress">{page}</div>'}
        told = {"raw": True, "metadata": {"thinsight": "progress"}}
        if self.handle is None:
            display = sys.modules["IPython"].display.display
            self.handle = display(shown, display_id=True, **told)
        else:
            self.handle.update(shown, **told)


_place = _Place()


def _here() -> _Place:
    """The place of the cell that runs."""
    global _place
    found = shell()
    cell = getattr(found, "execution_count", None)
    if _place.cell != cell:
        _place = _Place()
        _place.cell = cell
    return _place


class NotebookWatcher(Watcher):
    """Draws in the cell that runs. All of them share its one place, so that an evaluator's examples and the search that
    asks for them do not stand below each other."""

    def on_stage(self, title: str) -> None:
        place = _here()
        place.title, place.searching, place.began = terminal(title), "", time.monotonic()
        place.draw(place.title)

    def on_note(self, text: str) -> None:
        place = _here()
        place.notes.append(capped(terminal(text)).strip())
        place.draw(place.text or place.title, place.done, place.total)

    def on_progress(self, what: str, done: int, total: int) -> None:
        place = _here()
        if place.searching:
            place.draw(f"{place.searching} · {what} {done}/{total}", place.done, place.total)
            return
        if done <= 1 or done < place.done:
            place.began = place.began if place.title else time.monotonic()
        name = ": ".join(filter(None, (place.title, terminal(what))))
        place.draw(f"{name} {done}/{total}", done, total, ended=done >= total)

    def on_start(self, plan: SearchPlan) -> None:
        place = _here()
        place.began = time.monotonic()
        place.searching = plan.method
        if plan.recorded:
            self.on_note(plan.resumed)
        place.draw(place.searching, 0, plan.expected)

    def on_trial(self, trial: Any, progress: Progress) -> None:
        place = _here()
        left = "" if progress.seconds_left is None else f", at most {clock(progress.seconds_left)} left"
        where = trial.why if progress.layer is None else f"layer {progress.layer}, {tokens(trial.count)}"
        place.searching = place.searching.split(":")[0]
        place.searching = f"{place.searching}: {terminal(where)}: score {trial.score:.3f}{left}"
        place.draw(place.searching, progress.evaluations, progress.expected)

    def on_end(self, result: Any) -> None:
        place = _here()
        name, place.searching = place.searching.split(":")[0], ""
        place.draw(f"{name}: {counted(result.evaluations, 'evaluation')}", ended=True)
