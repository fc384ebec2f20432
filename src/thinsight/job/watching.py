"""How a long job tells what it is doing, for whoever draws it or does not.

Knows nothing about terminals, and nothing about the jobs.
"""

from __future__ import annotations

from ..searches.progress import Silent

__all__ = ["Watcher"]


class Watcher(Silent):
    """Receives what happens during a job, a search's own events included. This one ignores all of it;
    subclass it."""

    def on_stage(self, title: str) -> None:
        """A stage begins."""

    def on_note(self, text: str) -> None:
        """Something worth a line."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """So much of the present stage is done."""
