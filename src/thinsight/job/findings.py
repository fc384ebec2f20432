"""What a report shows of a run: rows of scores and costs, and pictures of which vision tokens stay.

Knows how processors cut images into tokens. Knows nothing about how anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import cost
from ..budget import FlopsBudget
from ..errors import BadInput, Unsupported
from ..evaluation.benchmarks import Measured, measured
from ..evaluation.evaluator import Evaluator
from ..evaluation.examples import Example, open_image
from ..evaluation.metrics import metric_for
from ..evaluation.prompts import PromptReader
from ..evaluation.result import Evaluation, Interval, drop_interval
from ..families import family_of, field_of, size_of, tower_of
from ..reduction import Reduction
from ..report.data import MOST_CHANGED, ChangedAnswer, Changes, Headline, MethodRow, Picture, TaskRow
from ..runtime import apply, vision_token_mask
from ..schedule import Schedule
from ..timing import on_device

# Of a family's `tiles`: why its vision tokens form no grid.
_UNPLACED = {
    "lines": "some of which stand at the ends of lines",
    "pooled": "which are made of patches of crops that overlap",
    "resampled": "which are resampled from all of an image",
    "views": "which are of an overview and tiles of another size",
}
PICTURE_LAYERS = 12  # stops of the report's slider, besides the image: as many as a phone's width has room for


@dataclass(frozen=True)
class Grid:
    """A picture and its vision tokens, numbered from ``first`` in reading order."""

    image: Image.Image
    rows: int
    columns: int
    first: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.columns

    def inside(self, tokens: list[int]) -> tuple[int, ...]:
        """Those of a prompt's vision tokens that belong to the picture, as numbers within the grid."""
        last = self.first + self.rows * self.columns
        return tuple(token - self.first for token in tokens if self.first <= token < last)


def grid_of(model: Any, processor: Any, example: Example, inputs: Mapping[str, Any], n_vision: int) -> Grid:
    """The grid of an example's first image.

    Args:
        model: the loaded model.
        processor: its processor, which made ``inputs`` of this one example.
        example: what is asked.
        inputs: the processor's output.
        n_vision: vision tokens of the prompt.

    Raises:
        ThinsightError: the tokens form no grid that can be laid over a picture.
    """
    vision = model.config.vision_config
    if (why := _UNPLACED.get(family_of(model.config).tiles)) is not None:
        raise _no_grid(f"the {n_vision} vision tokens, {why},")
    if "image_position_ids" in inputs:
        found = _placed(model, inputs)
    elif inputs.get("image_grid_thw") is not None:
        said = inputs.get("image_merge_sizes")  # VideoLLaMA 3
        merge = math.isqrt(family_of(model.config).merge(model.config, vision)) if said is None else int(said[0])
        _, rows, columns = (int(side) for side in inputs["image_grid_thw"][0])
        found = Grid(open_image(example.images[0]), rows // merge, columns // merge)
    elif "spatial_shapes" in inputs:
        found = _listed(model, processor, example, inputs, n_vision)
    elif tower_of(model.config).images == "any" and "image_sizes" in inputs:
        found = _pixtral(model, processor, inputs)
    else:
        found = _tile(model, processor, len(example.images), inputs, n_vision)
    if found.first + found.rows * found.columns > n_vision:
        raise _no_grid(f"{n_vision} vision tokens are fewer than a grid of {found.rows} x {found.columns}")
    return found


def _pixtral(model: Any, processor: Any, inputs: Mapping[str, Any]) -> Grid:
    """An image of any size, padded to the largest of its batch."""
    height, width = (int(side) for side in inputs["image_sizes"][0])
    cell = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    pixels = inputs["pixel_values"][0, :, :height, :width]
    return Grid(_as_seen(processor, pixels), height // cell, width // cell)


def _placed(model: Any, inputs: Mapping[str, Any]) -> Grid:
    """An image as patches with their places, filled up to one number (Gemma 4); pixels are from 0 to 1."""
    vision = model.config.vision_config
    block = math.isqrt(family_of(model.config).merge(model.config, vision))
    places = inputs["image_position_ids"][0]
    columns, rows = (int(last) + 1 for last in places.amax(0))
    patches = inputs["pixel_values"][0][(places >= 0).all(-1)]
    side = math.isqrt(patches.shape[-1] // 3)
    pixels = patches.float().cpu().view(rows, columns, side, side, 3).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return Grid(image, rows // block, columns // block)


def _listed(model: Any, processor: Any, example: Example, inputs: Mapping[str, Any], n_vision: int) -> Grid:
    """An image, or tiles of it and all of it behind them, as patches filled up to one number (LFM2-VL)."""
    block = math.isqrt(family_of(model.config).merge(model.config, model.config.vision_config))
    sizes = [(int(height) // block, int(width) // block) for height, width in inputs["spatial_shapes"]]
    counts, images = [rows * columns for rows, columns in sizes], len(example.images)
    if sum(counts) != n_vision:
        raise _no_grid(f"{n_vision} vision tokens of images or tiles that make {sum(counts)}")
    if len(sizes) == images:
        shown = 0
    elif images == 1 and processor.image_processor.use_thumbnail:
        shown = len(sizes) - 1
    else:
        raise _no_grid(f"{images} images are cut into {len(sizes)} tiles")
    return Grid(open_image(example.images[0]), *sizes[shown], sum(counts[:shown]))


def _tile(model: Any, processor: Any, images: int, inputs: Mapping[str, Any], n_vision: int) -> Grid:
    """A tile of fixed size: the image itself, or its whole view."""
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))  # (..., tiles, 3, height, width)
    if pixels is None:
        raise _no_grid(f"{n_vision} vision tokens of something other than images")
    if pixels.ndim < 4:
        raise _no_grid(f"{n_vision} vision tokens of patches that a processor has put into a line")
    cut = family_of(model.config).tiles
    if field_of(model.config.vision_config, "patch_size") is None:  # timm's, which say it in words of their own
        rows = columns = math.isqrt(n_vision // pixels.flatten(0, -4).shape[0])
    else:
        patch = size_of(model.config.vision_config, "patch_size")
        rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if cut == "unpadded":  # the overview comes first
        block = math.isqrt(family_of(model.config).merge(model.config, model.config.vision_config))
        return Grid(_as_seen(processor, pixels.flatten(0, -4)[0]), rows // block, columns // block)
    tiles = pixels.flatten(0, -4)
    tokens, rest = divmod(n_vision, len(tiles))
    block = math.isqrt(rows * columns // tokens) if tokens else 0
    if rest or not block or tokens * block**2 != rows * columns or rows % block or columns % block:
        raise _no_grid(f"{n_vision} vision tokens of {len(tiles)} images or tiles of {rows} x {columns} patches")
    if len(tiles) == images or (images == 1 and cut == "overview first"):
        shown = 0
    elif images == 1 and cut == "overview last":
        shown = len(tiles) - 1
    else:
        raise _no_grid(f"{images} images are cut into {len(tiles)} tiles")
    return Grid(_as_seen(processor, tiles[shown]), rows // block, columns // block, shown * tokens)


def _no_grid(what: str) -> Unsupported:
    return Unsupported(f"{what} form no grid that could be drawn over one picture; show another example")


def _as_seen(processor: Any, pixels: torch.Tensor) -> Image.Image:
    """The image after the processor's crop and resize; ``pixels`` (channels, height, width), normalized."""
    settings = processor.image_processor
    # without either the pixels are not normalized
    mean = torch.tensor(getattr(settings, "image_mean", None) or [0.0] * 3)[:, None, None]
    std = torch.tensor(getattr(settings, "image_std", None) or [1.0] * 3)[:, None, None]
    unit = (pixels.float().cpu() * std + mean).clamp(0, 1)  # (channels, height, width) in [0, 1]
    return Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


@torch.inference_mode()
def picture_of(
    model: Any,
    processor: Any,
    example: Example,
    reduction: Reduction,
    *,
    max_new_tokens: int = 32,
    most_layers: int = 7,
    layers: Sequence[int] | None = None,
    reader: PromptReader | None = None,
    outcome: str = "",
) -> Picture:
    """The kept tokens of the example's (first) image at the layers where tokens are dropped, and both greedy answers.

    Of many such layers ``most_layers`` are shown, evenly chosen, or the ``layers`` that are given; ``reader`` is what
    has read the example, if any, and ``outcome`` what became of its score, see `Picture`.

    Raises:
        ThinsightError: a prompt without an image, or an image whose tokens form no grid.
    """
    if not example.images:
        raise BadInput(f"example {example.id!r} has no image: there are no vision tokens to show")
    inputs = on_device(model, (reader or PromptReader(model, processor)).batch([example]))
    n_vision = int(vision_token_mask(model, inputs["input_ids"]).sum())
    grid = grid_of(model, processor, example, inputs, n_vision)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    full = model.generate(**inputs, **options)  # (1, prompt + answer)
    dropping = sorted(reduction.schedule.reductions(n_vision))
    layers = layers or spread(dropping, most_layers) or [reduction.schedule.num_layers - 1]
    with apply(model, reduction) as handle:
        reduced = model.generate(**inputs, **options)
        # a full schedule drops none, and records none
        whole = list(range(n_vision)) if reduction.schedule.is_full else None
        kept = [whole or handle.kept(layer)[0].tolist() for layer in layers]
    answers = [tokens[0, inputs["input_ids"].shape[1] :] for tokens in (full, reduced)]
    texts = [str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
    return Picture(
        image=grid.image,
        grid=grid.size,
        kept=tuple(grid.inside(indices) for indices in kept),
        layers=tuple(layers),
        question=example.question,
        answer_full=texts[0],
        answer_reduced=texts[1],
        truth=example.answers[0] if example.answers else "",
        outcome=outcome,
    )


def outcomes(full: Evaluation, reduced: Evaluation) -> tuple[list[int], list[int]]:
    """The places of the examples that score worse under the reduction, and of those that score better; the largest
    change first."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    change = reduced.per_example - full.per_example
    worse, better = (
        [int(i) for i in np.argsort(-abs(change), kind="stable") if sign * change[i] > 0] for sign in (-1, 1)
    )
    return worse, better


def failures_first(
    examples: Sequence[Example], worse: Sequence[int], better: Sequence[int], count: int
) -> list[tuple[Example, str]]:
    """The examples to show, each with its `Picture.outcome`: those that score worse, those that score better, and where
    these are fewer than ``count``, others. Within each, as `varied` has them before more questions about an image."""
    chosen: list[tuple[Example, str]] = []
    for outcome, places in (("worse", worse), ("better", better)):
        group = [examples[place] for place in places]
        first = varied(group, count)
        taken = {example.id for example in first}
        chosen += [(example, outcome) for example in (*first, *(each for each in group if each.id not in taken))]
    seen = {example.group for example, _ in chosen[:count]}
    changed = {*worse, *better}
    rest = [example for place, example in enumerate(examples) if place not in changed and example.group not in seen]
    return [*chosen, *((example, "same") for example in varied(rest, count))][:count]


def pictures_of(
    evaluator: Evaluator,
    reduction: Reduction,
    full: Evaluation,
    reduced: Evaluation,
    most: int,
    note: Callable[[str], object],
) -> tuple[Picture, ...]:
    """The pictures of a report: examples that score differently first; ``note`` is told of what cannot be shown."""
    made = []
    for example, outcome in failures_first(evaluator.examples, *outcomes(full, reduced), most):
        try:
            picture = picture_of(
                evaluator.model,
                evaluator.processor,
                example,
                reduction,
                max_new_tokens=evaluator.rules.max_new_tokens,
                most_layers=PICTURE_LAYERS,
                reader=evaluator.reader,
                outcome=outcome,
            )
        except Unsupported as error:  # the report goes on without it
            note(f"No picture of example {example.id!r}: {error}")
        else:
            made.append(picture)
    return tuple(made)


def changed_answers(
    evaluator: Evaluator, reduction: Reduction, full: Evaluation, reduced: Evaluation, most: int = MOST_CHANGED
) -> Changes:
    """How many examples score differently, and both answers to the first ``most`` of them."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    worse, better = outcomes(full, reduced)
    places = [*worse, *better][:most]
    layers = reduction.schedule.num_layers
    told = [evaluator.predictions(each, places) if places else [] for each in (Schedule.full(layers), reduction)]
    rows = []
    for place, answer_full, answer_reduced in zip(places, *told, strict=True):
        example = evaluator.examples[place]
        rows.append(
            ChangedAnswer(
                id=example.id,
                question=example.question,
                expected=example.answers[0] if example.answers else "",
                answer_full=answer_full,
                answer_reduced=answer_reduced,
                full=float(full.per_example[place]),
                reduced=float(reduced.per_example[place]),
                task=example.task or "",
            )
        )
    return Changes(len(full.per_example), len(worse), len(better), tuple(rows))


def varied(examples: Sequence[Example], count: int) -> list[Example]:
    """One example of every task in turn, each on another image, the first ones of the file: no picking by
    result."""
    waiting: dict[str | None, list[Example]] = {}
    for example in examples:
        waiting.setdefault(example.task, []).append(example)
    chosen: list[Example] = []
    shown: set[str] = set()
    while any(waiting.values()):
        for group in waiting.values():
            group[:] = [example for example in group if example.group not in shown]
            if group and len(chosen) < count:
                shown.add(group[0].group)
                chosen.append(group[0])
        if len(chosen) == count:
            break
    return chosen


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, most).round().astype(int)
    return [values[place] for place in places]


# -- rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MedianPrompt:
    """The prompt whose cost stands for a data set: median vision tokens and median other tokens."""

    config: Any
    n_vision: int
    n_text: int

    @classmethod
    def of(cls, config: Any, sizes: Sequence[tuple[int, int]]) -> MedianPrompt:
        """From each prompt's (vision tokens, other tokens)."""
        vision, text = zip(*sizes, strict=True)
        return cls(config, median_low(vision), median_low(text))  # as `Evaluator.budget` has them

    def flops(self, schedule: Schedule | None = None) -> float:
        """Decoder prefill FLOPs of this prompt."""
        return cost.flops(self.config, n_vision=self.n_vision, n_text=self.n_text, schedule=schedule)

    def vision_flops(self) -> float | None:
        """FLOPs of the vision encoder, this prompt's vision tokens taken as one image's.

        None where they cannot be told from config and token count.
        """
        try:
            return cost.vision_flops(self.config, n_vision=self.n_vision)
        except Unsupported:
            return None

    def budget(self, schedule: Schedule) -> FlopsBudget:
        """What ``schedule`` spends on this prompt, for methods that are to cost the same."""
        return FlopsBudget.like(self.config, schedule, n_vision=self.n_vision, n_text=self.n_text)


def metric_words(examples: Sequence[Example]) -> str:
    """The metrics that the examples are scored with when none is asked for."""
    names = {metric_for(example.answers, example.metric, f"example {example.id!r}").name for example in examples}
    return ", ".join(sorted(names))


def ranker_words(ranker: Mapping[str, Any]) -> str:
    """``{"name": "text-attention", "queries": "last"}`` as "text-attention (queries last)"."""
    settings = ", ".join(f"{key} {value}" for key, value in ranker.items() if key != "name")
    return f"{ranker['name']} ({settings})" if settings else str(ranker["name"])


def drop_of(full: Evaluation, reduced: Evaluation, examples: Sequence[Example]) -> Interval:
    """Mean drop with its 95 % interval, questions about one image taken together."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    groups = [example.group for example in examples]
    return drop_interval(full.per_example, reduced.per_example, groups=groups)


def method_row(
    name: str,
    kind: str,
    schedule: Schedule,
    evaluation: Evaluation,
    drop: Interval | None,
    prompt: MedianPrompt,
    note: str = "",
) -> MethodRow:
    """One method's line in the comparison."""
    flops = prompt.flops(schedule)
    return MethodRow(
        name=name,
        keep_rates=schedule.keep_rates,
        score=evaluation.score,
        drop=drop,
        mean_keep_rate=schedule.mean_keep_rate,
        flops=flops,
        flops_ratio=prompt.flops() / flops,
        note=note,
        kind=kind,
    )


def headline_of(full: MethodRow, found: MethodRow, prompt: MedianPrompt) -> Headline:
    """The found reduction's line against the full model's, as the head of a report; no times."""
    assert found.drop is not None
    return Headline(
        full_score=full.score,
        score=found.score,
        drop=found.drop,
        mean_keep_rate=found.mean_keep_rate,
        flops_ratio=found.flops_ratio,
        flops_full=full.flops,
        flops=found.flops,
        vision_flops=prompt.vision_flops(),
    )


def measures_of(full: Evaluation, reduced: Evaluation, examples: Sequence[Example]) -> tuple[Measured, ...]:
    """What each benchmark among the examples reports; nothing where there is none."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    return measured(examples, full.per_example, reduced.per_example)


def task_rows(full: Evaluation, reduced: Evaluation, examples: Sequence[Example]) -> tuple[TaskRow, ...]:
    """Scores by task, in order of appearance; nothing when no example names its task."""
    assert full.per_example is not None
    assert reduced.per_example is not None
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if example.task is not None:
            places.setdefault(example.task, []).append(place)
    return tuple(
        TaskRow(task, len(at), float(full.per_example[at].mean()), float(reduced.per_example[at].mean()))
        for task, at in places.items()
    )
