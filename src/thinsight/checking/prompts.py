"""Prompts of text, images and videos for any model, as padded batches and as single rows.

A row is a list of parts. `Prompts` holds what is a model's own: what one image or one video looks like (ids, tensors,
which of its tokens form one image) and how a batch's tensors are put together. Knows nothing about schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.encoding import on_device

IS_TEXT, IS_IMAGE, IS_VIDEO, IS_ANSWER = range(4)

Spec = Sequence[int | str]
"""Lengths of a row's text pieces with an image between neighbours: ``[3, 5]`` is text, image, text; ``[6]``
is text only. "video" (or "image") between two lengths says what stands there: ``[3, "video", 5, 2]``."""

IMAGES: tuple[Spec, ...] = ([3, 5], [2, 3, 9], [4, 0, 2, 2], [7], [1, 1])
"""One image, two, three of which two stand side by side, text only, short: rows that every family runs."""

VIDEOS: tuple[Spec, ...] = ([3, "video", 5], [2, "video", 1, "video", 4], [5])

MIXED: tuple[Spec, ...] = ([3, "video", 5], [2, 1, "video", 4], [3, 6])

PADDED: tuple[Spec, ...] = ([3, 5], [2, 3, 9], [7])
"""One image, two, text only."""


class TokenTypes(NamedTuple):
    """The token types that a family's forward pass takes, and the value of each kind of token."""

    name: str
    text: int
    image: int
    video: int
    answer: int  # of generated tokens
    first_turn_only: bool = False  # what follows on an answer has the type of an answer
    also: str = ""  # another argument of the same values (ERNIE 4.5 VL)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its arguments."""
        return (self.name, self.also) if self.also else (self.name,)


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
    """Random pixels and words from one seed; `vocabulary` holds the ids of ordinary words."""

    def __init__(self, seed: int, vocabulary: Sequence[int]) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary

    def pixels(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self.generator)

    def words(self, count: int) -> list[int]:
        """Ids of ordinary words."""
        drawn = torch.randint(0, len(self.vocabulary), (count,), generator=self.generator)
        return [self.vocabulary[number] for number in drawn.tolist()]


Vision = Callable[[Draw, int], Part]
"""An image or a video; the number counts those of the batch, so that neighbours may differ in size."""


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
    token: int,
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


def collate(
    rows: list[Row], tensors: Collate = flat, types: TokenTypes | None = None, padding: str = "left", pad: int = 0
) -> Batch:
    """Put rows into one batch.

    Returns:
        The batch; `inputs` holds input_ids and attention_mask (batch, seq) int64, the token types if the
        family has them, and the tensors of its images and videos.
    """
    width = max(len(row.ids) for row in rows)
    inputs = {
        "input_ids": _padded([row.ids for row in rows], width, pad, padding),
        "attention_mask": _padded([[1] * len(row.ids) for row in rows], width, 0, padding),
    }
    if types is not None:
        inputs |= dict.fromkeys(types.names, _padded([_types(row, types) for row in rows], width, 0, padding))
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompts:
    """What a model's prompts look like."""

    image: Vision
    video: Vision | None = None
    mixes_video: bool = True  # images and videos can stand in one batch
    types: TokenTypes | None = None
    collate: Collate = flat
    vocabulary: Sequence[int]
    start: tuple[int, ...]  # what opens a prompt
    pad: int = 0

    def rows(self, specs: Sequence[Spec], seed: int = 0) -> list[Row]:
        """Prompts as described by `Spec`, each opened by `start`."""
        draw, seen = Draw(seed, self.vocabulary), {"image": 0, "video": 0}
        return [self._row(spec, draw, seen, list(self.start)) for spec in specs]

    def later_turn(self, spec: Spec, seed: int = 1) -> Row:
        """What follows on a prompt and its answer: as a row, without what opens one."""
        return self._row(spec, Draw(seed, self.vocabulary), {"image": 0, "video": 0}, [])

    def batch(self, rows: list[Row], padding: str = "left") -> Batch:
        """Rows put together."""
        return collate(rows, self.collate, self.types, padding, self.pad)

    @torch.no_grad()
    def later_inputs(self, model: PreTrainedModel, wholes: list[Row], turns: list[Row]) -> dict[str, Any]:
        """Keyword arguments of `generate` for a later turn on a cache.

        Args:
            model: whose encoder runs, where the stock model cannot take the turn's pixels alone.
            wholes: each row from its start: prompt, answers (`answer`), and the turn at its end.
            turns: the turns alone, all of one length, so that the padding is where the cache has it.
        """
        whole, turn = self.batch(wholes).inputs, self.batch(turns).inputs
        named = {"input_ids", "attention_mask", *(self.types.names if self.types else ())}
        pixels = {name: tensor for name, tensor in turn.items() if name not in named}
        inputs: dict[str, Any] = {name: whole[name] for name in whole if name in named}
        if "image_grid_thw" not in pixels:
            return {**inputs, **pixels}
        features = model.base_model.get_image_features(**on_device(model, pixels), return_dict=True)
        # positions count every image from the start
        return {**inputs, "image_grid_thw": whole["image_grid_thw"], "mm_encoder_outputs": {"image": features}}

    def _row(self, spec: Spec, draw: Draw, seen: dict[str, int], start: list[int]) -> Row:
        parts = [text(start)] if start else []
        last: int | str | None = None
        for piece in spec:
            if isinstance(piece, int) and isinstance(last, int):
                parts.append(self._vision("image", draw, seen))
            if isinstance(piece, str):
                parts.append(self._vision(piece, draw, seen))
            elif piece:
                parts.append(text(draw.words(piece)))
            last = piece
        return Row(parts)

    def _vision(self, what: str, draw: Draw, seen: dict[str, int]) -> Part:
        make = self.image if what == "image" else self.video
        assert make is not None, f"the model has no {what}"
        seen[what] += 1
        return make(draw, seen[what] - 1)
