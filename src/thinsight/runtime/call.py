"""Reads one call of a multimodal model: what of its input is vision, what is padding, what is prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from ..errors import BadInput, Unsupported
from ..families import family_of
from ..ranking import Context
from .anatomy import MODALITIES, vision_placeholders
from .cache import cache_of
from .encoding import received_of, settle, vision_outputs
from .tensors import Mapped


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
        marks = torch.zeros(self.real.shape, dtype=torch.long, device=self.real.device)
        return marks.scatter_add(1, self.column, self.valid.long()) > 0

    @cached_property
    def text_marks(self) -> Tensor:
        """(batch, seq) int64: 1 at tokens that are neither vision nor padding."""
        return (self.real & ~self.vision).long()


@dataclass(frozen=True)
class Call:
    """One forward pass whose new tokens hold vision tokens."""

    seq: int  # new tokens per row
    past: int  # logical columns already in the cache
    layout: Layout
    prompt: Tensor  # (batch, seq) bool: not padding, not a continuation
    received: Tensor | None  # (batch, tokens) float32: attention inside the vision tower, if it was read

    def context(self, **more: Any) -> Context:
        """What a ranker is told."""
        layout = self.layout
        return Context(image=layout.image, index=layout.index, size=layout.size, vision_attention=self.received, **more)


@dataclass(frozen=True)
class Plan(Mapped):
    """All that a pass needs to know of its inputs: with it, the pass asks the device for nothing."""

    call: Call  # what was read
    queries: tuple[Tensor, Tensor] | None  # (batch, queries): columns int64 of the text that ranks, bool which are real
    last: Tensor | None  # (batch, tokens) bool: the vision tokens in which prompts end; None where none does
    ends: tuple[int, ...] | None  # per row, the group of that token, -1 where there is none; None as `last` is
    quota: Tensor | None  # (stages, batch, groups) int64: what a group may keep; None where the pass itself decides


@dataclass(frozen=True)
class Said:
    """What the caller says of the inputs beyond what is in them."""

    prompt: Tensor | None = None  # (batch, seq) bool: False at a continuation of the prompt
    vision: Tensor | None = None  # (batch, seq) bool or int64: vision positions of `inputs_embeds`
    candidates: int = 0  # last columns that an assistant proposed


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs


def encode_pixels(model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
    """The call with its pixels replaced by the tower's output, so that each image's token count is known."""
    outputs = dict(call.get("mm_encoder_outputs") or {})
    for output in filter(None, outputs.values()):  # encoded by `generate` itself, under the tap
        settle(output)
    raw = [name for name, pixels in MODALITIES.items() if call.get(pixels) is not None and outputs.get(name) is None]
    if not raw:
        return call
    outputs.update({name: vision_outputs(model, call, name) for name in raw})
    return {**call, **{MODALITIES[name]: None for name in raw}, "mm_encoder_outputs": outputs}


def read_call(model: PreTrainedModel, call: Mapping[str, Any], said: Said | None = None) -> Call | None:
    """Describe a call, pixels already encoded; None when there is no vision token in it (decoding, text).

    Raises:
        ThinsightError: vision tokens cannot be told from the arguments, or a mask has another shape.
    """
    said = said or Said()
    given = _given(call)
    if given is None:
        return None
    batch, seq = given.shape[:2]
    past = _length(cache_of(call))
    real = _real(call.get("attention_mask"), batch, seq, past, given.device)
    layout = build_layout(_vision(model, call, said, real), real, family_of(model.config).runs)
    if layout is None:
        return None
    prompt = real if said.prompt is None else real & _rows(said.prompt, real, "prompt").bool()
    if said.prompt is None and said.candidates:
        prompt = prompt & (torch.arange(seq, device=real.device) < seq - said.candidates)
    outputs = call.get("mm_encoder_outputs") or {}
    return Call(seq, past, layout, prompt, _per_row(layout, received_of(outputs.get("image"))))


def same_shape(plan: Plan, call: Mapping[str, Any]) -> bool:
    """Whether a plan describes a call: not one new token per row. Refuses more or fewer tokens than the plan's, or a
    cache of other length."""
    given = _given(call)
    if given is None:
        return False
    wanted = (plan.call.prompt.shape[0], plan.call.seq, plan.call.past)
    found = (*given.shape[:2], _length(cache_of(call)))
    if found != wanted:
        raise BadInput(
            f"the plan is for {wanted[0]} rows of {wanted[1]} tokens behind {wanted[2]} cached ones, but the "
            f"pass has {found[0]} rows of {found[1]} behind {found[2]}; make a plan of these inputs"
        )
    return True


def _given(call: Mapping[str, Any]) -> Any:
    """The ids or embeddings of a call's new tokens; None where there is one per row, as in decoding, or no input."""
    given = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    return None if given is None or given.shape[1] == 1 else given


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _real(mask: Any, batch: int, seq: int, past: int, device: torch.device) -> Tensor:
    """(batch, seq) bool: not padding. `generate` hands over finished masks where the cache is static."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if isinstance(mask, BlockMask):  # the last query sees all that is not padding
        rows = torch.arange(batch, device=device)[:, None]
        keys = torch.arange(past, past + seq, device=device)[None]
        return mask.mask_mod(rows, rows * 0, torch.full_like(keys, seq - 1), keys).expand(batch, seq)
    if not isinstance(mask, Tensor):
        return torch.ones((batch, seq), dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -seq:].to(device, torch.bool)
    seen = mask[:, 0, :, past : past + seq].to(device)
    if seen.is_floating_point():
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen.any(1).expand(batch, -1)


@dataclass(frozen=True)
class Vision:
    """Vision tokens of one modality in a pass."""

    mask: Tensor  # (batch, seq) bool
    lengths: list[int] | None = None  # tokens of each image or video over the whole batch, where known


def _vision(model: PreTrainedModel, call: Mapping[str, Any], said: Said, real: Tensor) -> list[Vision]:
    ids = call.get("input_ids")
    if ids is None:
        if said.vision is None:
            raise BadInput(
                "inputs_embeds without input_ids does not say where vision tokens are; pass input_ids, or "
                "say it: `with handle.vision(mask):`, mask (batch, seq) bool"
            )
        rows = _rows(said.vision, real, "vision")
        if rows.dtype == torch.bool:
            return [Vision(rows)]
        counts = [row[row > 0].unique(return_counts=True)[1].tolist() for row in rows]
        return [Vision(rows > 0, [count for row in counts for count in row])]
    masks = vision_placeholders(model, ids)
    outputs = call.get("mm_encoder_outputs") or {}
    found = {name: [len(f) for f in output.pooler_output] for name, output in outputs.items() if output}
    if set(masks) == {"image"} and "video" in found:  # both stand behind one placeholder
        found = {} if "image" in found else {"image": found["video"]}
    return [Vision(mask, found.get(name)) for name, mask in masks.items()]


def _rows(mask: Tensor, real: Tensor, name: str) -> Tensor:
    """A mask over prompts as a mask over rows: the beams of a prompt follow each other."""
    copies = real.shape[0] // max(1, mask.shape[0])
    if mask.ndim != 2 or (mask.shape[0] * copies, mask.shape[1]) != tuple(real.shape):
        raise BadInput(f"{name} mask has shape {tuple(mask.shape)}; make it {tuple(real.shape)} like the inputs")
    return mask.to(real.device).repeat_interleave(copies, dim=0)


def _per_row(layout: Layout, received: list[Tensor] | None) -> Tensor | None:
    """Attention per image -> (batch, tokens). Beams share the images of their prompt."""
    if not received:
        return None
    wanted = sum(map(sum, layout.sizes))
    have = sum(map(len, received))
    copies = wanted // max(1, have)
    result = torch.zeros(layout.valid.shape, dtype=torch.float32, device=layout.valid.device)
    values, first = torch.cat(list(received)).to(result), 0
    for row, sizes in enumerate(layout.sizes):
        count = sum(sizes)
        if have * copies != wanted or first + count > have:
            raise Unsupported(
                "vision attention does not fit the prompt's images; encode the images of this prompt, or "
                "rank by text-attention"
            )
        result[row, :count] = values[first : first + count]
        if (row + 1) % copies == 0:
            first += count
    return result


def build_layout(parts: Sequence[Vision], real: Tensor, by_run: bool = False) -> Layout | None:
    """Describe a pass from its vision tokens, by modality, and what is `real`, (batch, seq) bool, False at padding.
    None: no vision token. `by_run`: an image is an unbroken run, as it is where lengths are not known or do not fit."""
    device, batch = real.device, real.shape[0]
    sizes: list[list[int]] = [[] for _ in range(batch)]
    tables: list[list[np.ndarray]] = [[] for _ in range(batch)]  # (4, n) each: column, image, index, size
    for part in parts:
        # on the host, so that no count has to be asked of the device again in the whole pass
        marks = (part.mask & real).cpu().numpy()
        columns = [row.nonzero()[0] for row in marks]
        split = None if by_run else _split([len(c) for c in columns], part.lengths)
        for row, places in enumerate(columns):
            groups = _runs(places) if split is None else split[row]
            lengths, first = np.array(groups, dtype=np.int64), len(sizes[row])
            image = np.repeat(np.arange(first, first + len(groups)), lengths)
            start = np.repeat(lengths.cumsum() - lengths, lengths)
            tables[row].append(np.stack([places, image, np.arange(len(places)) - start, np.repeat(lengths, lengths)]))
            sizes[row] += groups
    rows = [np.concatenate(row, axis=1) for row in tables]
    counts = [row.shape[1] for row in rows]
    tokens = max(counts)
    if tokens == 0:
        return None
    table = np.zeros((4, batch, tokens), dtype=np.int64)
    for number, found in enumerate(rows):
        table[:, number, : counts[number]] = found[:, found[0].argsort()]
    text = (real.sum(1).cpu() - torch.tensor(counts)).tolist()
    valid = (torch.arange(tokens) < torch.tensor(counts)[:, None]).to(device)
    column, image, index, size = torch.from_numpy(table).to(device)
    return Layout(real, column, valid, image, index, size, tuple(map(tuple, sizes)), tuple(text))


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
    ends = (np.diff(columns) != 1).nonzero()[0] + 1
    return [len(run) for run in np.split(columns, ends) if len(run)]


def query_columns(layout: Layout, prompt: Tensor, queries: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The prompt's text tokens whose attention ranks: columns (batch, queries) int64, and (same) bool which are real.

    `prompt` is (batch, seq) bool; `queries` "last", or "instruction" (text after the row's last vision token; the last
    token if there is none). Of more such tokens than `most`, that many, evenly spaced and the last among them.
    """
    place = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)  # (batch, seq)
    last = _last(prompt)
    if queries == "last":
        last = last.clamp(min=0)
        return last, torch.ones_like(last, dtype=torch.bool)
    image_end = _last(layout.vision)
    asked = prompt & ~layout.vision & (place > image_end)
    # a row without text after its image, or without an image, is read at its last token
    single = ~asked.any(dim=1, keepdim=True) | (image_end < 0)
    asked = torch.where(single, place == last.clamp(min=0), asked)
    width = int(asked.sum(1).max())
    columns = (~asked).long().argsort(dim=1, stable=True)[:, :width]
    if most is not None and most < width:
        found = asked.sum(dim=1, keepdim=True)
        number = torch.arange(most, device=asked.device).expand(len(asked), -1)
        # evenly spaced by each row's own count, so that a prompt asks alike alone and in a batch
        spaced = torch.where(found > most, (number + 1) * found // most - 1, number)
        columns = columns.gather(1, spaced)
    return columns, asked.gather(1, columns)


def _last(marks: Tensor) -> Tensor:
    """The last column that is marked in each row of (batch, seq) bool, -1 where none is: (batch, 1) int64."""
    place = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    return torch.where(marks, place, -1).amax(dim=1, keepdim=True)


def last_of_prompt(layout: Layout, prompt: Tensor) -> Tensor | None:
    """Which vision token is the last token of its prompt: (batch, tokens) bool, or None if none is."""
    found = layout.valid & (layout.column == _last(prompt))
    return found if bool(found.any()) else None
