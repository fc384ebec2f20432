"""Where one forward pass stands between its layers: which vision tokens are left, where they are, and what
was read to rank them.

A thread runs one pass at a time, and only sees its own. Knows nothing about how tokens are chosen.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cache import Kept
from .call import Plan, Said
from .layout import Columns
from .scoring import Probe

__all__ = ["Pass", "PassState", "ThreadState"]


@dataclass(frozen=True)
class PassState:
    """What a pass knows of its vision tokens on the way into a layer; see the fields of `Pass`."""

    alive: Tensor
    columns: Columns | None
    take: Tensor | None
    kept: Kept | None
    spread: bool
    attention: Tensor | None
    scores: Tensor | None
    ranked: tuple[int | None, ...]
    levels: tuple[int, ...]
    trace: tuple[tuple[int, Tensor], ...]


class Pass:
    """One forward pass with vision tokens."""

    def __init__(self, plan: Plan, first: int = 0) -> None:
        self.plan = plan
        self.call = plan.call
        self.alive = plan.call.layout.valid  # (batch, tokens) bool
        self.columns: Columns | None = None  # of the pass's own tokens; None: all are there
        self.take: Tensor | None = None  # (batch, physical) int64, columns of the states that go on
        self.kept: Kept | None = None  # the cache's record after this pass, at this stage
        self.spread = False  # whether hidden states are in logical columns although tokens were dropped
        # (batch, heads, queries, tokens) float32, of the layer before, or pooled: (batch, tokens)
        self.attention: Tensor | None = None
        self.armed: Probe | None = None  # of the layer that runs
        self.scores: Tensor | None = None  # (batch, tokens) float32, of each row's last ranking
        # per row, how many tokens that ranking kept
        self.ranked: list[int | None] = [None] * len(plan.call.layout.sizes)
        self.text: Tensor | None = None  # (batch, seq) int64, see `text_marks`; None until a token is dropped
        self.weights: Tensor | None = None  # (batch, queries) float32, of rows of attention that are pooled
        self.queries = plan.queries  # logical columns (batch, queries), which are real
        self.trace: list[tuple[int, Tensor]] = [(0, self.alive)]  # from which layer on, alive
        self.last = plan.last  # (batch, tokens) bool
        self.levels = [0] * len(plan.call.layout.sizes)  # per row, which of an adaptive reduction's schedules
        self.quota = plan.quota  # (stages, batch, groups) int64 for these levels; None: not made yet
        self.counts: dict[int, list[tuple[int, ...]]] = {}  # likewise, by layer: see `Quotas.rows`
        self.first = first  # layers before it do not run: see prefix.py

    def places(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns (batch, any) stand in the states that come next; dropped ones: anywhere."""
        if self.columns is None or self.spread:
            return columns
        return self.columns.physical(self.call.seq, *columns)

    def follow(self, levels: list[int]) -> None:
        """From here on, each row goes by this one of an adaptive reduction's schedules."""
        if levels != self.levels:
            self.levels, self.quota, self.counts = levels, None, {}

    def disarm(self) -> None:
        """Take over what the layer before was to read."""
        probe, self.armed = self.armed, None
        request = None if probe is None else probe.disarm()
        if request is not None:
            self.attention = request.result

    def state(self) -> PassState:
        """Where the pass stands, on the way into a layer."""
        read = None if self.armed is None else self.armed.answer()
        return PassState(
            self.alive,
            self.columns,
            self.take,
            self.kept,
            self.spread,
            self.attention if read is None else read,
            self.scores,
            tuple(self.ranked),
            tuple(self.levels),
            tuple(self.trace),
        )

    def restore(self, state: PassState) -> None:
        """Go on from there."""
        self.alive, self.columns, self.take, self.kept = state.alive, state.columns, state.take, state.kept
        self.spread, self.attention, self.scores = state.spread, state.attention, state.scores
        self.follow(list(state.levels))
        self.ranked, self.trace = list(state.ranked), list(state.trace)


class ThreadState(threading.local):
    """What a thread has said of its passes to come, and knows of the one under way and the last."""

    said = Said()
    plan: Plan | None = None  # that its passes follow
    first = 0  # layer at which its passes begin
    candidates = 0  # last tokens of the next pass that an assistant proposed
    run: Pass | None = None  # under way; None where no vision token passes, as in decoding
    reduced = False  # whether a pass that the reduction has begun is under way, vision tokens or not
    trace: list[tuple[int, Tensor]] | None = None  # of the last pass, see `Pass`
    statistic: list[float] | None = None  # per row of the last pass, of an adaptive reduction

    def __init__(self) -> None:
        self.masks: dict[Any, Any] = {}  # masks and rotary tables that layers of the pass share
