"""The two token spaces of one forward pass: what its new tokens are, and which of them are still there.

*Logical* columns number the pass's new tokens as the caller gave them, padding included: 0..seq-1. *Physical*
columns number the tokens that really run through a layer. Masks, positions and cache lengths are always
logical; hidden states, keys and values are physical. Knows nothing about models, caches or attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Columns", "Layout", "build_layout", "query_columns", "shrink"]


@dataclass(frozen=True)
class Columns:
    """The logical column that each physical column holds, ascending in every row.

    Rows with fewer tokens than the longest are filled up with columns that nobody may see.
    """

    index: Tensor  # (batch, physical) int64
    valid: Tensor | None  # (batch, physical) bool, False at filling; None when there is none

    @property
    def length(self) -> int:
        """How many physical columns there are."""
        return self.index.shape[1]

    def select(self, rows: Tensor) -> Columns:
        """The columns of the given batch rows (repeats allowed)."""
        rows = rows.to(self.index.device)
        return Columns(self.index[rows], None if self.valid is None else self.valid[rows])

    def physical(self, logical: Tensor, seq: int) -> Tensor:
        """Where logical columns (batch, n) are now; meaningless for those that were dropped."""
        place = torch.arange(self.length, device=self.index.device).expand_as(self.index)
        inverse = torch.zeros(self.index.shape[0], seq, dtype=torch.long, device=self.index.device)
        return inverse.scatter(1, self.index, place).gather(1, logical)


@dataclass(frozen=True)
class Layout:
    """Which new tokens of a pass are vision tokens, and of which image; `tokens` is the most in one row."""

    real: Tensor  # (batch, seq) bool: not padding
    column: Tensor  # (batch, tokens) int64: logical column of each vision token, 0 at padding
    valid: Tensor  # (batch, tokens) bool: not padding
    image: Tensor  # (batch, tokens) int64: which image of its row
    index: Tensor  # (batch, tokens) int64: place within that image
    size: Tensor  # (batch, tokens) int64: N of that image
    sizes: tuple[tuple[int, ...], ...]  # per row, N of each of its images
    text: tuple[int, ...]  # per row, how many tokens are neither vision nor padding

    @cached_property
    def vision(self) -> Tensor:
        """(batch, seq) bool: the vision tokens."""
        return self.spread(self.valid)

    def spread(self, tokens: Tensor) -> Tensor:
        """From (batch, tokens) bool to (batch, seq) bool."""
        marks = torch.zeros(self.real.shape, dtype=torch.long, device=self.real.device)
        return marks.scatter_add(1, self.column, (tokens & self.valid).long()) > 0


def build_layout(vision: Tensor, real: Tensor, lengths: list[int] | None = None) -> Layout | None:
    """Describe a pass from its vision positions.

    Args:
        vision: (batch, seq) bool.
        real: (batch, seq) bool, False at padding.
        lengths: tokens of each image, in the order of the prompt, row after row. Without it (or when it does
            not fit the rows) every unbroken run of vision tokens counts as one image.

    Returns:
        The layout, or None when there is no vision token.
    """
    vision = vision & real
    per_row: list[int] = vision.sum(1).tolist()
    tokens = max(per_row)
    if tokens == 0:
        return None
    text = (real & ~vision).sum(1).tolist()
    sizes = _split(per_row, lengths) or _runs(vision)
    image = torch.full((len(per_row), tokens), 0)
    index, size = image.clone(), image.clone()  # (batch, tokens) each
    for row, row_sizes in enumerate(sizes):
        ends = torch.tensor(row_sizes, dtype=torch.long)
        count = per_row[row]
        image[row, :count] = torch.repeat_interleave(torch.arange(len(row_sizes)), ends)
        size[row, :count] = torch.repeat_interleave(ends, ends)
        starts = torch.repeat_interleave(ends.cumsum(0) - ends, ends)
        index[row, :count] = torch.arange(count) - starts
    device = vision.device
    column = (~vision).long().argsort(dim=1, stable=True)[:, :tokens]  # vision columns first, in order
    valid = torch.arange(tokens, device=device) < torch.tensor(per_row, device=device)[:, None]
    return Layout(
        real=real,
        column=column.masked_fill(~valid, 0),
        valid=valid,
        image=image.to(device),
        index=index.to(device),
        size=size.to(device),
        sizes=tuple(map(tuple, sizes)),
        text=tuple(text),
    )


def _split(per_row: list[int], lengths: list[int] | None) -> list[list[int]] | None:
    """Image sizes per row, from sizes over the whole batch; None when they do not fit the rows."""
    if lengths is None:
        return None
    queue = list(lengths)
    rows: list[list[int]] = []
    for wanted in per_row:
        row: list[int] = []
        while sum(row) < wanted and queue:
            row.append(queue.pop(0))
        if sum(row) != wanted:
            return None
        rows.append(row)
    return None if queue else rows


def _runs(vision: Tensor) -> list[list[int]]:
    """Lengths of the unbroken runs of vision tokens, per row."""
    rows: list[list[int]] = []
    for row in vision.tolist():
        lengths: list[int] = []
        before = False
        for here in row:
            if here and before:
                lengths[-1] += 1
            elif here:
                lengths.append(1)
            before = here
        rows.append(lengths)
    return rows


def query_columns(layout: Layout, prompt: Tensor, queries: str) -> tuple[Tensor, Tensor]:
    """The prompt's text tokens whose attention ranks.

    Args:
        layout: of the pass.
        prompt: (batch, seq) bool, False at padding and at tokens that continue the prompt (an answer).
        queries: "last", or "instruction" (text after the row's last vision token; the last token if there is
            none).

    Returns:
        Logical columns (batch, queries) int64, and which of them are real (batch, queries) bool.
    """
    seq = prompt.shape[1]
    place = torch.arange(seq, device=prompt.device).expand_as(prompt)  # (batch, seq)
    last = torch.where(prompt, place, -1).amax(dim=1, keepdim=True).clamp(min=0)  # (batch, 1)
    if queries == "last":
        return last, torch.ones_like(last, dtype=torch.bool)
    image_end = torch.where(layout.vision, place, -1).amax(dim=1, keepdim=True)  # (batch, 1)
    asked = prompt & ~layout.vision & (place > image_end)
    # a row without text after its image, or without an image, is read at its last token
    single = ~asked.any(dim=1, keepdim=True) | (image_end < 0)
    asked = torch.where(single, place == last, asked)
    width = int(asked.sum(1).max())
    columns = (~asked).long().argsort(dim=1, stable=True)[:, :width]
    return columns, asked.gather(1, columns)


def shrink(layout: Layout, alive: Tensor, kept: list[int], before: Columns | None) -> tuple[Tensor, Columns]:
    """Drop the vision tokens that are not `alive`, and padding where the batch gets shorter for it.

    Args:
        layout: of the pass.
        alive: (batch, tokens) bool, the vision tokens to keep.
        kept: how many of them there are in each row (the same numbers, known without asking the device).
        before: the columns so far; None when all are still there.

    Returns:
        take: (batch, physical) int64, the physical columns so far that go on; and what they are now.
    """
    rows = [text + vision for text, vision in zip(layout.text, kept, strict=True)]
    length = max(1, *rows)
    vision = layout.vision
    wanted = (layout.real & ~vision) | layout.spread(alive)  # (batch, seq)
    if before is not None:
        wanted = wanted.gather(1, before.index)  # filling was not wanted then, so it is not wanted now
    take = (~wanted).long().argsort(dim=1, stable=True)[:, :length].sort(dim=1).values  # (batch, length)
    index = take if before is None else before.index.gather(1, take)
    ragged = any(row < length for row in rows)
    return take, Columns(index, wanted.gather(1, take) if ragged else None)
