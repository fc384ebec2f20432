"""The two token spaces of one forward pass: what its new tokens are, and which of them are still there.

*Logical* columns number the pass's new tokens as the caller gave them, padding included: 0..seq-1. *Physical*
columns number the tokens that really run through a layer. Masks, positions and cache lengths are always
logical; hidden states, keys and values are physical. Knows nothing about models, caches or attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


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

    def join(self, index: Tensor, valid: Tensor | None = None) -> Columns:
        """These and, behind them, others: index (batch, n), valid (batch, n) or None for all."""
        joined = torch.cat([self.index, index.to(self.index.device)], dim=1)
        if self.valid is None and valid is None:
            return Columns(joined, None)
        first = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        second = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        return Columns(joined, torch.cat([first, second.to(first.device)], dim=1))

    def drop_first(self, count: int) -> Columns:
        """Without the first `count`."""
        return Columns(self.index[:, count:], None if self.valid is None else self.valid[:, count:])

    def physical(self, seq: int, *logical: Tensor) -> tuple[Tensor, ...]:
        """Where logical columns, each (batch, any), of `seq` are now; meaningless for those that were
        dropped."""
        place = torch.arange(self.length, device=self.index.device).expand_as(self.index)
        inverse = torch.zeros(self.index.shape[0], seq, dtype=torch.long, device=self.index.device)
        inverse = inverse.scatter(1, self.index, place)
        return tuple(inverse.gather(1, each) for each in logical)


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


@dataclass(frozen=True)
class Vision:
    """Vision tokens of one modality in a pass."""

    mask: Tensor  # (batch, seq) bool
    lengths: list[int] | None = None  # tokens of each image or video over the whole batch, where known


def build_layout(parts: Sequence[Vision], real: Tensor, by_run: bool = False) -> Layout | None:
    """Describe a pass from its vision positions.

    Args:
        parts: the vision tokens, by modality; no position belongs to two.
        real: (batch, seq) bool, False at padding.
        by_run: an image is an unbroken run of vision tokens, whatever the lengths say.

    Returns:
        The layout, or None when there is no vision token. Where lengths are not known or do not fit the rows,
        an image is an unbroken run.
    """
    device, batch = real.device, real.shape[0]
    sizes: list[list[int]] = [[] for _ in range(batch)]
    tables: list[list[np.ndarray]] = [[] for _ in range(batch)]  # (4, n) each: column, image, index, size
    for part in parts:
        marks = (part.mask & real).cpu().numpy()
        columns = [row.nonzero()[0] for row in marks]
        split = None if by_run else _split([len(c) for c in columns], part.lengths)
        for row, places in enumerate(columns):
            groups = _runs(places) if split is None else split[row]
            tables[row].append(_table(places, groups, first=len(sizes[row])))
            sizes[row] += groups
    rows = [np.concatenate(row, axis=1) for row in tables]
    counts = [row.shape[1] for row in rows]
    tokens = max(counts)
    if tokens == 0:
        return None
    table = np.zeros((4, batch, tokens), dtype=np.int64)
    for number, found in enumerate(rows):
        table[:, number, : counts[number]] = found[:, found[0].argsort()]
    column, image, index, size = torch.from_numpy(table).to(device)
    text = (real.sum(1).cpu() - torch.tensor(counts)).tolist()
    valid = torch.arange(tokens) < torch.tensor(counts)[:, None]
    return Layout(
        real=real,
        column=column,
        valid=valid.to(device),
        image=image,
        index=index,
        size=size,
        sizes=tuple(map(tuple, sizes)),
        text=tuple(text),
    )


def _table(columns: np.ndarray, groups: list[int], first: int) -> np.ndarray:
    """Column, image, index and size of a row's tokens of one modality, (4, n) int64."""
    lengths = np.array(groups, dtype=np.int64)
    image = np.repeat(np.arange(first, first + len(groups)), lengths)
    start = np.repeat(lengths.cumsum() - lengths, lengths)
    return np.stack([columns, image, np.arange(len(columns)) - start, np.repeat(lengths, lengths)])


def _split(per_row: list[int], lengths: list[int] | None) -> list[list[int]] | None:
    """Image sizes per row, from sizes over the whole batch; None when they do not fit the rows."""
    if lengths is None:
        return None
    queue = [length for length in lengths if length]
    rows: list[list[int]] = []
    for wanted in per_row:
        row: list[int] = []
        while sum(row) < wanted and queue:
            row.append(queue.pop(0))
        if sum(row) != wanted:
            return None
        rows.append(row)
    return None if queue else rows


def _runs(columns: np.ndarray) -> list[int]:
    """Lengths of the unbroken runs in ascending columns."""
    if not len(columns):
        return []
    ends = (np.diff(columns) != 1).nonzero()[0] + 1
    return np.diff(np.array([0, *ends, len(columns)])).tolist()


def query_columns(layout: Layout, prompt: Tensor, queries: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The prompt's text tokens whose attention ranks.

    Args:
        layout: of the pass.
        prompt: (batch, seq) bool, False at padding and at tokens that continue the prompt (an answer).
        queries: "last", or "instruction" (text after the row's last vision token; the last token if there is
            none).
        most: of a row with more such tokens, this many, evenly spaced from the first to the last; None: all.

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
    if most is not None and most < width:
        columns = columns.gather(1, _evenly(asked.sum(dim=1, keepdim=True), most))
    return columns, asked.gather(1, columns)


def _evenly(found: Tensor, most: int) -> Tensor:
    """Places 0, 1, ... of `found` (batch, 1) things, or `most` evenly spaced ones, the last among them:
    (batch, most) int64."""
    place = torch.arange(most, device=found.device).expand(len(found), -1)
    spaced = (place + 1) * found // most - 1
    return torch.where(found > most, spaced, place)


def last_of_prompt(layout: Layout, prompt: Tensor) -> Tensor | None:
    """Which vision token is the last token of its prompt: (batch, tokens) bool, or None if none is.

    Args:
        layout: of the pass.
        prompt: (batch, seq) bool, as for `query_columns`.
    """
    place = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
    last = torch.where(prompt, place, -1).amax(dim=1, keepdim=True)  # (batch, 1)
    found = layout.valid & (layout.column == last)
    return found if bool(found.any()) else None


def text_marks(layout: Layout) -> Tensor:
    """(batch, seq) int64: 1 at tokens that are neither vision nor padding."""
    return (layout.real & ~layout.vision).long()


def shrink(
    layout: Layout, text: Tensor, alive: Tensor, kept: list[int], before: Columns | None
) -> tuple[Tensor, Columns]:
    """Drop the vision tokens that are not `alive`, and padding where the batch gets shorter for it.

    Args:
        layout: of the pass.
        text: its `text_marks`, the same for every reduction of the pass.
        alive: (batch, tokens) bool, the vision tokens to keep.
        kept: how many of them there are in each row (the same numbers, known without asking the device).
        before: the columns so far; None when all are still there.

    Returns:
        take: (batch, physical) int64, the physical columns so far that go on; and what they are now.
    """
    rows = [text + vision for text, vision in zip(layout.text, kept, strict=True)]
    length = max(1, *rows)
    wanted = text.scatter_add(1, layout.column, alive.long())  # (batch, seq), 0 or 1
    if before is not None:
        wanted = wanted.gather(1, before.index)  # filling was not wanted then, so it is not wanted now
    take = wanted.argsort(dim=1, descending=True, stable=True)[:, :length]  # (batch, length)
    ragged = any(row < length for row in rows)
    if ragged:
        take = take.sort(dim=1).values  # filling was behind
    index = take if before is None else before.index.gather(1, take)
    return take, Columns(index, wanted.gather(1, take) > 0 if ragged else None)
