"""Prompts of text, images and videos for any family, as padded batches and as single rows.

A row is a list of parts; a family says what one image or one video looks like (ids, tensors, which of its
tokens form one image) and how a batch's tensors are put together. Knows nothing about models, schedules or
how a prompt is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

PAD, UNK, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, TILE = range(10)
FIRST_WORD = 12
VOCABULARY = 96

IS_TEXT, IS_IMAGE, IS_VIDEO, IS_ANSWER = range(4)

Spec = Sequence[int | str]
"""Lengths of a row's text pieces with an image between neighbours: ``[3, 5]`` is text, image, text; ``[6]``
is text only. "video" (or "image") between two lengths says what stands there: ``[3, "video", 5, 2]``."""


class TokenTypes(NamedTuple):
    """The token types that a family's forward pass takes, and the value of each kind of token."""

    name: str
    text: int
    image: int
    video: int
    answer: int  # of generated tokens
    first_turn_only: bool = False  # what follows on an answer has the type of an answer


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt: its tokens, and the pixels behind them."""

    ids: list[int]
    kinds: list[int]  # of each token: IS_TEXT, IS_IMAGE, IS_VIDEO, or IS_ANSWER if it was generated
    groups: list[int] = field(default_factory=list)  # how its vision tokens split into images, in order
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One prompt without padding."""

    parts: list[Part]

    def __add__(self, other: Row) -> Row:
        return Row(self.parts + other.parts)

    @property
    def ids(self) -> list[int]:
        """Every token."""
        return [token for part in self.parts for token in part.ids]

    @property
    def kinds(self) -> list[int]:
        """IS_TEXT, IS_IMAGE, IS_VIDEO or IS_ANSWER of every token."""
        return [kind for part in self.parts for kind in part.kinds]

    @property
    def vision(self) -> list[int]:
        """Positions of the vision tokens."""
        return [place for place, kind in enumerate(self.kinds) if kind in (IS_IMAGE, IS_VIDEO)]

    @property
    def groups(self) -> list[list[int]]:
        """The positions of each image's tokens: the images within which tokens compete to be kept."""
        positions = iter(self.vision)
        sizes = [size for part in self.parts for size in part.groups]
        return [[next(positions) for _ in range(size)] for size in sizes]


Collate = Callable[[list[Row]], dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Rows and the keyword arguments of `forward` and `generate` that they make."""

    rows: list[Row]
    inputs: dict[str, Tensor]


class Draw:
    """Random pixels and words from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def pixels(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self.generator)

    def words(self, count: int) -> list[int]:
        """Ids of ordinary words."""
        return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=self.generator).tolist()


def text(ids: Sequence[int]) -> Part:
    """Tokens that are words, or markers such as "image starts here"."""
    return Part(list(ids), [IS_TEXT] * len(ids))


def answer(ids: Sequence[int]) -> Part:
    """Generated tokens."""
    return Part(list(ids), [IS_ANSWER] * len(ids))


def vision(
    pieces: Sequence[int | list[int]],
    groups: Sequence[int],
    tensors: dict[str, Tensor],
    *,
    token: int = IMAGE,
    kind: int = IS_IMAGE,
) -> Part:
    """An image or a video: vision tokens by count, and the ids of the markers that stand among them.

    ``vision([[START], 4, [BREAK], 4, [END]], [8], ...)`` is two rows of four tokens that form one image.
    """
    ids: list[int] = []
    kinds: list[int] = []
    for piece in pieces:
        ids += [token] * piece if isinstance(piece, int) else piece
        kinds += [kind] * piece if isinstance(piece, int) else [IS_TEXT] * len(piece)
    assert sum(groups) == sum(kind != IS_TEXT for kind in kinds)
    return Part(ids, kinds, list(groups), tensors)


def flat(rows: list[Row]) -> dict[str, Tensor]:
    """The tensors of all images of a batch end to end, padded with zeros where shapes differ."""
    collected: dict[str, list[Tensor]] = {}
    for row in rows:
        for part in row.parts:
            for name, tensor in part.tensors.items():
                collected.setdefault(name, []).append(tensor)
    return {name: torch.cat(_same_shape(tensors)) for name, tensors in collected.items()}


def per_row(rows: list[Row]) -> dict[str, Tensor]:
    """One line of images per row, filled up with images of zeros: (batch, images, ...)."""
    collected: dict[str, list[Tensor]] = {}
    names = {name: tensor for row in rows for part in row.parts for name, tensor in part.tensors.items()}
    for name, like in names.items():
        for row in rows:
            mine = [part.tensors[name] for part in row.parts if part.tensors]
            line = torch.cat(mine) if mine else like.new_zeros(1, *like.shape[1:])
            collected.setdefault(name, []).append(line[None])
    return {name: torch.cat(_same_shape(lines)) for name, lines in collected.items()}


def collate(rows: list[Row], tensors: Collate = flat, types: TokenTypes | None = None, padding: str = "left") -> Batch:
    """Put rows into one batch.

    Returns:
        The batch; `inputs` holds input_ids and attention_mask (batch, seq) int64, the token types if the
        family has them, and the tensors of its images and videos.
    """
    width = max(len(row.ids) for row in rows)
    inputs = {
        "input_ids": _padded([row.ids for row in rows], width, PAD, padding),
        "attention_mask": _padded([[1] * len(row.ids) for row in rows], width, 0, padding),
    }
    if types is not None:
        inputs[types.name] = _padded([_types(row, types) for row in rows], width, 0, padding)
    return Batch(rows, {**inputs, **tensors(rows)})


def _types(row: Row, types: TokenTypes) -> list[int]:
    value = {IS_TEXT: types.text, IS_IMAGE: types.image, IS_VIDEO: types.video, IS_ANSWER: types.answer}
    result = [value[kind] for kind in row.kinds]
    if types.first_turn_only and IS_ANSWER in row.kinds:
        first = row.kinds.index(IS_ANSWER)
        result[first:] = [types.answer] * (len(result) - first)
    return result


def _padded(lines: list[list[int]], width: int, value: int, padding: str) -> Tensor:
    result = torch.full((len(lines), width), value)
    for number, line in enumerate(lines):
        start = width - len(line) if padding == "left" else 0
        result[number, start : start + len(line)] = torch.tensor(line)
    return result


def _same_shape(tensors: list[Tensor]) -> list[Tensor]:
    """All tensors with the largest shape among them from the second dimension on, zeros where they end."""
    shape = [max(tensor.shape[d] for tensor in tensors) for d in range(1, tensors[0].ndim)]
    result = []
    for tensor in tensors:
        whole = tensor.new_zeros(tensor.shape[0], *shape)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        result.append(whole)
    return result
