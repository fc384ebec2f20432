"""A loaded model as something that can be checked: its prompts, made with its processor or from its config alone.

Without a processor, pixels are random and of whatever shape the model's own encoder takes; it also says how many vision
tokens they make. Where no shape is taken, features stand in for what the encoder would give.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import Unsupported
from ..evaluation.examples import Example
from ..evaluation.prompts import PromptReader
from ..families import Family, family_of, field_of
from ..runtime.anatomy import attention_implementation, base_model, decoder, vision_token_mask
from ..runtime.call import encode_pixels, read_call
from ..runtime.encoding import encoder_inputs, on_device, projected
from .prompts import (
    IS_IMAGE,
    IS_VIDEO,
    Batch,
    Collate,
    Draw,
    Part,
    Prompts,
    Row,
    TokenTypes,
    Vision,
    collate,
    flat,
    per_row,
    vision,
)

_WORDS = 512  # of the vocabulary, enough to draw from
_FEWEST = 4  # tokens of an image that can be ranked
_SPECIAL = re.compile(r"token_(id|ids|index)$")  # fields of a config that name tokens which are no words
_PIXELS = "pixel_values"
_FEATURES = "features"  # of an image, where no pixels are taken
_TYPES = ("mm_token_type_ids", "token_type_ids")
_SHAPES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))  # height and width of pictures, so that neighbours differ

Recipe = Callable[[Draw, int], dict[str, Tensor]]


class Loaded:
    """A model that someone loaded, in the way that `comparing.Subject` asks for."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, suppressed: list[int]) -> None:
        self.stock = model
        self.prompts = prompts
        self.suppressed = suppressed  # tokens that it must not write: a later pass would read an image of them
        self.own = attention_implementation(model)

    def model(self, attn: str | None = None) -> PreTrainedModel:
        """The model, which from here on runs with this attention, or its own."""
        wanted = self.own if attn is None else attn
        if attention_implementation(self.stock) != wanted:
            decoder(self.stock).set_attn_implementation(wanted)  # the vision tower keeps its own
        return self.stock

    @property
    def masked(self) -> str:
        """The attention nearest to its own that takes any mask."""
        return self.own if self.own in ("sdpa", "eager") else "sdpa"

    def batch(self, rows: list[Row], padding: str = "left") -> Batch:
        """Rows put together, on the model's device."""
        return Batch(rows, on_device(self.stock, self.prompts.batch(rows, padding).inputs))

    @contextmanager
    def lent(self) -> Iterator[Loaded]:
        """The model is as it was when this ends."""
        try:
            yield self
        finally:
            self.model()


def loaded(model: PreTrainedModel, processor: Any = None) -> tuple[Loaded, str]:
    """The model with its prompts, and how those are made.

    Raises:
        ThinsightError: none can be made.
    """
    prompts, how = (_by_config if processor is None else _by_processor)(model, processor)
    special = _special(model, getattr(processor, "tokenizer", None))
    ends = {_token(model, "eos_token_id")}
    return Loaded(model, prompts, sorted(special - ends)), how


# -- words ---------------------------------------------------------------------------------------------------


def _special(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens that are no words."""
    found: set[int] = set()
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    for config in configs:
        for name, value in ({} if config is None else config.to_dict()).items():
            if _SPECIAL.search(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {each for each in values if isinstance(each, int) and each >= 0}
    if tokenizer is not None:
        found |= set(getattr(tokenizer, "all_special_ids", ()))
        found |= set(getattr(tokenizer, "added_tokens_decoder", ()))
    return {token for token in found if token < _vocabulary(model)}


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _words(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    size = min(_vocabulary(model), int(model.config.get_text_config().vocab_size))
    special = _special(model, tokenizer)
    # the first tokens of a vocabulary are often bytes and markers
    return [token for token in range(min(size // 8, 1000), size) if token not in special][:_WORDS]


def _token(model: PreTrainedModel, name: str) -> int | None:
    for config in (model.generation_config, model.config.get_text_config(), model.config):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return None


def _prompts(
    model: PreTrainedModel, tokenizer: Any, image: Vision, collated: Collate, types: TokenTypes | None, **more: Any
) -> Prompts:
    start = _token(model, "bos_token_id")
    return Prompts(
        image=image,
        types=types,
        collate=collated,
        vocabulary=_words(model, tokenizer),
        start=() if start is None else (start,),
        pad=_token(model, "pad_token_id") or 0,
        **more,
    )


# -- token types and groups ----------------------------------------------------------------------------------


def _parameters(model: PreTrainedModel) -> set[str]:
    forwards = (model.forward, base_model(model).forward)
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def _types(model: PreTrainedModel) -> TokenTypes | None:
    """The token types that the model takes, as families that have them agree on."""
    taken = _parameters(model)
    name = next((name for name in _TYPES if name in taken), None)
    if name is None:
        return None
    if family_of(model.config).both_ways:  # they tell the prompt, which sees all of itself, from the answer
        return TokenTypes(name, text=0, image=0, video=0, answer=1, first_turn_only=True)
    video, also = 2 if name == _TYPES[0] else 1, "moe_mm_token_type_ids"
    return TokenTypes(name, text=0, image=1, video=video, answer=0, also=also if also in taken else "")


def _grouped(model: PreTrainedModel, part: Part, prompts: Callable[[list[Row]], dict[str, Any]]) -> Part:
    """The part with its tokens in the groups that compete for a place, which are the library's to say: one for each
    entry of the encoder's output, or each run. Whether all of its tokens are in them is another line's to check."""
    call = read_call(model, encode_pixels(model, on_device(model, prompts([Row([part])]))))
    sizes = () if call is None else call.layout.sizes[0]
    count = sum(part.groups)
    return Part(part.ids, part.kinds, list(sizes) if sum(sizes) == count else [count], part.tensors)


# -- with a processor ----------------------------------------------------------------------------------------


def _by_processor(model: PreTrainedModel, processor: Any) -> tuple[Prompts, str]:
    tokenizer = getattr(processor, "tokenizer", None)
    reader = PromptReader(model, processor)
    types = _types(model)
    rows = _takes_rows(model)
    collated = per_row if rows else flat
    special, ends = _special(model, tokenizer), {_token(model, f"{name}_token_id") for name in ("bos", "eos", "pad")}

    def make(draw: Draw, number: int) -> Part:
        example = Example("check", (_picture(processor, draw, number),), "what")
        prompt = reader.prompts([example])[0]
        ids = prompt.input_ids.tolist()
        seen = vision_token_mask(model, prompt.input_ids[None])[0].tolist()
        first, last = seen.index(True), len(seen) - seen[::-1].index(True)
        while first and ids[first - 1] in special - ends:  # markers around it
            first -= 1
        while last < len(ids) and ids[last] in special - ends:
            last += 1
        tensors = {**prompt.per_image, **reader.pixels([example])[0]}
        if rows:
            tensors = {name: each[0] for name, each in tensors.items()}
        kinds = [IS_IMAGE if each else 0 for each in seen[first:last]]
        part = Part(ids[first:last], kinds, [sum(seen)], tensors)
        return _grouped(model, part, lambda rows: collate(rows, collated, types).inputs)

    return _prompts(model, tokenizer, make, collated, types), f"random pictures through {type(processor).__name__}"


def _picture(processor: Any, draw: Draw, number: int) -> Image.Image:
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    side = min(max((value for value in dict(size).values() if isinstance(value, int)), default=112), 112)
    height, width = (max(int(side * share), 28) for share in _SHAPES[number % len(_SHAPES)])
    pixels = (draw.pixels(height, width, 3).clamp(-2, 2) + 2) * 63
    return Image.fromarray(pixels.to(torch.uint8).numpy())


# -- from the config alone -----------------------------------------------------------------------------------


def _by_config(model: PreTrainedModel, _: Any) -> tuple[Prompts, str]:
    family, types = family_of(model.config), _types(model)
    token = getattr(model.config, family.image_placeholder)
    failures = []
    for how, recipe, collated in _image_recipes(model):
        made = _maker(model, recipe, collated, types, token)
        prompts = _prompts(model, None, made, collated, types)
        problem = _problem(model, prompts, [2, 1, 1, 3])  # of each shape one
        if not problem and len(prompts.rows([[2, 1]])[0].vision) < _FEWEST:
            problem = "too few tokens to choose from"
        if not problem:
            return _with_video(model, family, prompts), how
        failures.append(f"{how}: {problem}")
    raise Unsupported(
        f"no inputs can be made from the config of {type(model).__name__} ({'; '.join(failures)[:500]}): give its "
        "processor"
    )


def _problem(model: PreTrainedModel, prompts: Prompts, spec: list[int | str]) -> str:
    """Why the stock model does not take such a prompt; "" where it does, and gives numbers."""
    try:
        with torch.no_grad():
            logits = model(**on_device(model, prompts.batch(prompts.rows([spec])).inputs)).logits
    except Exception as error:  # a shape that the model does not take; it says so in any way
        return f"{type(error).__name__}: {error}".split("\n")[0][:120]
    return "" if bool(logits.isfinite().all()) else "its logits are not finite"


def _maker(
    model: PreTrainedModel, recipe: Recipe, collated: Collate, types: TokenTypes | None, token: int
) -> Callable[[Draw, int], Part]:
    def make(draw: Draw, number: int) -> Part:
        tensors = recipe(draw, number)
        count = _count(model, collated([Row([Part([], [], [], tensors)])]))
        part = vision([count], [count], tensors, token=token)
        return _grouped(model, part, lambda rows: collate(rows, collated, types).inputs)

    return make


@torch.no_grad()
def _count(model: PreTrainedModel, tensors: dict[str, Any], modality: str = "image") -> int:
    """How many vision tokens the encoder makes of them."""
    if "mm_encoder_outputs" in tensors:
        return sum(map(len, tensors["mm_encoder_outputs"][modality].pooler_output))
    encoder = getattr(base_model(model), f"get_{modality}_features", None) or getattr(model, f"get_{modality}_features")
    names = inspect.signature(encoder).parameters
    given = {name: each for name, each in tensors.items() if name in names}
    if not any(name.startswith("pixel_values") for name in given):  # the whole model calls them otherwise
        given["pixel_values"] = next(each for name, each in tensors.items() if name.startswith("pixel_values"))
    output = encoder(**on_device(model, given), **({"return_dict": True} if "kwargs" in names else {}))
    entries = output if isinstance(output, (Tensor, list, tuple)) else projected(output).pooler_output
    return sum(len(entry) for entry in entries)


def _takes_rows(model: PreTrainedModel) -> bool:
    """Whether the model takes a row's images as one line, as Idefics does."""
    return "pixel_attention_mask" in encoder_inputs(model, "image")


def _side(value: Any) -> int | None:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _image_recipes(model: PreTrainedModel) -> Iterator[tuple[str, Recipe, Collate]]:
    """Ways to make an image's tensors, the smallest first."""
    config: Any = model.config
    tower = field_of(config, "vision_config") or config
    tower = field_of(tower, "sam_config") or tower  # the first of two in a row (DeepSeek-OCR 2)
    names, taken = encoder_inputs(model, "image"), _parameters(model)
    name = next(
        (each for each in ("pixel_values", *sorted(taken)) if each in taken and each.startswith("pixel_values")), ""
    )
    patch, merge = _side(field_of(tower, "patch_size")) or 14, _merge(config, tower)
    channels = _side(field_of(tower, "in_channels") or field_of(tower, "num_channels")) or 3
    timms = field_of(tower, "model_args") or {}
    whole = _side(field_of(tower, "image_size") or timms.get("img_size"))
    towers = {
        each: field_of(config, each.replace(_PIXELS, "vision_config")) for each in names if each.endswith(f"_{_PIXELS}")
    }
    others = {each: side for each, of in towers.items() if (side := _side(field_of(of, "image_size"))) is not None}
    collated = per_row if _takes_rows(model) else flat
    if "image_grid_thw" in names:
        yield "random patches", _patches(_volume(tower, patch, channels), merge, "image"), flat
    pinpoints = sorted(
        (tuple(each) for each in field_of(config, "image_grid_pinpoints") or ()), key=lambda each: each[0] * each[1]
    )

    def plain(sides: list[tuple[int, int]], sized: bool = True) -> Recipe:
        def make(draw: Draw, number: int) -> dict[str, Tensor]:
            height, width = sides[number % len(sides)]
            tensors = {name: draw.pixels(1, channels, height, width)}
            for also, side in others.items():  # the same picture for another tower
                tensors[also] = draw.pixels(1, channels, side, side)
            if sized and "image_sizes" in names:
                tensors["image_sizes"] = torch.tensor([[height, width]])
            if "pixel_attention_mask" in names:
                tensors["pixel_attention_mask"] = torch.ones(1, height, width, dtype=torch.long)
            if "num_local_patches" in names:  # an overview alone
                tensors["num_local_patches"] = torch.tensor([0])
            return tensors

        return make

    def tiles(draw: Draw, number: int) -> dict[str, Tensor]:
        height, width = pinpoints[number % min(2, len(pinpoints))]
        side = whole or height
        count = 1 + (height // side) * (width // side)
        return {name: draw.pixels(1, count, channels, side, side), "image_sizes": torch.tensor([[height, width]])}

    if pinpoints:
        yield "random tiles", tiles, flat
    if name:
        unit = patch * merge
        if whole is None or whole > 4 * unit:
            if collated is flat and "num_local_patches" not in names:  # a row's images, and overviews, have one shape
                shapes = [(4 * unit, 4 * unit), (2 * unit, 6 * unit), (4 * unit, 2 * unit)]
                yield "random pixels", plain(shapes), collated
            yield "random pixels", plain([(4 * unit, 4 * unit)]), collated
        if whole is not None:
            yield "random pixels", plain([(whole, whole)]), collated
            yield "random pixels", plain([(whole, whole)], sized=False), collated
    if name and "pixel_attention_mask" in names and whole is not None:  # a mask of the tiles that a row has

        def masked(draw: Draw, number: int) -> dict[str, Tensor]:
            mask = torch.ones(1, dtype=torch.bool)
            return {name: draw.pixels(1, channels, whole, whole), "pixel_attention_mask": mask}

        yield "random tiles", masked, per_row
    if name and "image_sizes" not in names:  # tiles of which an image has several, all of one size
        side = 4 * patch * merge if whole is None else whole
        yield "random tiles", lambda draw, number: {name: draw.pixels(1, 2, channels, side, side)}, flat
    if "mm_encoder_outputs" in taken:
        yield "random features", _features(model, (16, 12, 9)), lambda rows: _encoded(model, rows)
        yield "random features", _features(model, (16,)), lambda rows: _encoded(model, rows, stacked=True)


def _merge(config: Any, tower: Any) -> int:
    """How many patches a token's side is long."""
    for name in ("spatial_merge_size", "downsample_factor", "scale_factor", "hidden_stride"):
        for owner in (tower, config):
            side = _side(field_of(owner, name))
            if side is not None:
                return side
    ratio = field_of(config, "downsample_ratio")
    return round(1 / ratio) if isinstance(ratio, float) and ratio else 1


def _volume(tower: Any, patch: int, channels: int) -> int:
    return channels * (_side(field_of(tower, "temporal_patch_size")) or 1) * patch * patch


def _patches(size: int, merge: int, modality: str) -> Recipe:
    frames = {"image": (1, 1, 1), "video": (2, 3, 2)}[modality]
    grids = [(frames[0], 4 * merge, 4 * merge), (frames[1], 2 * merge, 5 * merge), (frames[2], 3 * merge, 4 * merge)]
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]

    def make(draw: Draw, number: int) -> dict[str, Tensor]:
        grid = grids[number % len(grids)]
        return {pixels: draw.pixels(grid[0] * grid[1] * grid[2], size), f"{modality}_grid_thw": torch.tensor([grid])}

    return make


def _features(model: PreTrainedModel, counts: tuple[int, ...]) -> Recipe:
    """An image's features as the encoder would give them, as wide and about as long as embeddings of words."""
    weight = model.get_input_embeddings().weight

    def make(draw: Draw, number: int) -> dict[str, Tensor]:
        features = draw.pixels(counts[number % len(counts)], weight.shape[1])
        return {_FEATURES: features * float(weight[: 4 * _WORDS].float().std())}

    return make


def _encoded(model: PreTrainedModel, rows: list[Row], stacked: bool = False) -> dict[str, Any]:
    """What stands in for the encoder's output: a list, or the one tensor that some models take."""
    features = [part.tensors[_FEATURES] for row in rows for part in row.parts if part.tensors]
    there = [each.to(model.get_input_embeddings().weight) for each in features]
    entries: Any = torch.stack(there) if stacked and there else there
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=entries)}} if there else {}


# -- videos, of models that take them as patches with their grid ------------------------------------------------


def _with_video(model: PreTrainedModel, family: Family, prompts: Prompts) -> Prompts:
    """The prompts with videos, where some can be made that the stock model takes."""
    placeholder = family.video_placeholder or family.image_placeholder
    token = getattr(model.config, placeholder, None)
    if "video_grid_thw" not in encoder_inputs(model, "video") or not isinstance(token, int):
        return prompts
    tower: Any = field_of(model.config, "vision_config")
    patch, channels = _side(field_of(tower, "patch_size")) or 14, _side(field_of(tower, "in_channels")) or 3
    merge = _merge(model.config, tower)
    recipe = _patches(_volume(tower, patch, channels), merge, "video")
    for stamped in (True, False):  # each frame behind a text of its own, or all in one run
        made = Prompts(**{**vars(prompts), "video": _video(recipe, merge, token, stamped), "mixes_video": False})
        if not _problem(model, made, [2, "video", 3]):
            return made
    return prompts


def _video(recipe: Recipe, merge: int, token: int, stamped: bool) -> Vision:
    def make(draw: Draw, number: int) -> Part:
        tensors = recipe(draw, number)
        frames, height, width = tensors["video_grid_thw"][0].tolist()
        tokens = height * width // merge**2
        pieces: list[int | list[int]] = [frames * tokens]
        if stamped:
            pieces = [piece for _ in range(frames) for piece in (draw.words(2), tokens)]
        return vision(pieces, [frames * tokens], tensors, token=token, kind=IS_VIDEO)

    return make
