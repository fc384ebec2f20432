"""How long work tells what it is doing, for whoever draws it or does not. Knows nothing about terminals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .texts import counted

if TYPE_CHECKING:
    from .searches.run import SearchResult, Trial


@dataclass(frozen=True)
class SearchPlan:
    """What a search is about to do."""

    method: str
    num_layers: int
    first_layer: int
    num_vision_tokens: int
    full_score: float
    max_drop: float | None  # None under a budget
    recorded: int  # evaluations found in the journal, which will not be run again
    expected: int  # evaluations in all, recorded ones included: an upper estimate that only gets smaller

    @property
    def resumed(self) -> str:
        """What a search that goes on has already, in words."""
        are = "is" if self.recorded == 1 else "are"
        return f"{counted(self.recorded, 'evaluation')} {are} in the journal and will not be run again"


@dataclass(frozen=True)
class Progress:
    """How far a search is. ``expected`` is an upper estimate of all evaluations, so the ETA only gets better."""

    layer: int | None  # None where whole schedules are searched
    evaluations: int
    expected: int
    seconds: float  # spent in evaluations so far, those of interrupted runs included

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to go at the mean speed so far; None before the first evaluation."""
        if self.evaluations == 0:
            return None
        return (self.expected - self.evaluations) * self.seconds / self.evaluations


class SearchObserver:
    """Receives what happens during a search, and ignores it: subclass it to override some."""

    def on_start(self, plan: SearchPlan) -> None:
        """Before the first evaluation."""

    def on_trial(self, trial: Trial, progress: Progress) -> None:
        """After every evaluation, also after one that was read from the journal."""

    def on_layer(self, layer: int, count: int, progress: Progress) -> None:
        """When a layer's count is settled."""

    def on_end(self, result: SearchResult) -> None:
        """After the last evaluation; not called when the search is interrupted."""


Silent = SearchObserver


class Watcher(SearchObserver):
    """Receives what happens during a job, a search's own events included, and ignores it: subclass it."""

    def on_stage(self, title: str) -> None:
        """A stage begins."""

    def on_note(self, text: str) -> None:
        """Something worth a line."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """So much of the present stage is done."""

    def on_workers(self, shown: str) -> None:
        """What each worker does now, in a few words, where there are any."""
