"""Where a picture lies among vision tokens, for families with merged patches, pixel shuffle and tiles."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import Family
from tiny import tiny_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from family_processor import RowProcessor

from thinsight.errors import ThinsightError
from thinsight.evaluation.example import Example
from thinsight.families import FAMILIES as ROWS
from thinsight.job.findings import Grid, grid_of, picture_of
from thinsight.reduction import Reduction
from thinsight.runtime import vision_token_mask
from thinsight.runtime.anatomy import sliding_layers
from thinsight.schedule import Schedule
from thinsight.timing import ANSWER, PREFILL, measure

ONE_IMAGE = ([3, 5],)
SETTINGS = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
GRIDS = {
    "llava": ((4, 4), 0),
    "paligemma": ((4, 4), 0),
    "gemma3": ((4, 4), 0),  # 8 x 8 patches, averaged
    "qwen2-vl": ((4, 4), 0),  # 8 x 8 patches, merged
    "qwen3-vl": ((4, 4), 0),
    "glm4v": ((4, 4), 0),
    **dict.fromkeys(("mistral3", "mistral3-ministral3", "mistral3-mistral4"), ((4, 4), 0)),
    "llava-pixtral": ((4, 4), 0),
    "internvl-qwen2": ((3, 3), 18),  # 6 x 6 patches, shuffled; the last of three tiles
    "idefics3": ((3, 3), 18),
    "smolvlm": ((3, 3), 18),
    "aya-vision": ((3, 3), 18),
    "llava-next": ((2, 2), 0),  # the overview, before the tiles
    "llava-onevision": ((2, 2), 0),
    "llava-next-video": ((2, 2), 0),
    "llava-mistral": ((4, 4), 0),
    "llava-qwen2": ((4, 4), 0),
    "vipllava": ((4, 4), 0),
    "internvl-qwen3": ((3, 3), 18),
    "internvl-llama": ((3, 3), 18),
    "qwen2.5-vl": ((4, 4), 0),
    "glm4v-moe": ((4, 4), 0),
    "video-llava": ((4, 4), 0),
    "paligemma2": ((4, 4), 0),
    "qwen3-vl-moe": ((4, 4), 0),
    "glm4.6v": ((4, 4), 0),
    "cohere2-vision": ((3, 3), 18),
    "lighton-ocr": ((4, 4), 0),
    "deepseek-vl": ((4, 4), 0),
    "ovis2": ((4, 4), 0),
    **dict.fromkeys(("glmga", "glm-ocr", "shieldgemma2", "paddleocr-vl", "got-ocr2", "pp-chart2table"), ((4, 4), 0)),
    "qianfan-ocr": ((3, 3), 18),
    **dict.fromkeys(("video-llama-3", "deepseek-vl-hybrid", "janus", "exaone4.5", "kimi-k2.5"), ((4, 4), 0)),
    **dict.fromkeys(("hyperclovax-vision-v2", "cosmos3-edge", "muse-glimmer", "minimax-m3-vl"), ((4, 4), 0)),
}
GRIDS |= {
    **dict.fromkeys(("qwen2.5-omni", "qwen3-omni", "gemma4", "gemma4-moe"), ((4, 4), 0)),
    **dict.fromkeys(("qwen3.5", "qwen3.5-moe", "lfm3-vl"), ((4, 4), 0)),
    "gemma4-unified": ((4, 6), 0),
    "ernie4.5-vl": ((4, 4), 0),
    "granite4-vision": ((2, 2), 0),
    "perception-lm": ((3, 3), 0),
    **dict.fromkeys(("fast-vlm", "gemma3n"), ((4, 4), 0)),
    "llama4": ((2, 2), 8),
    "lfm2-vl": ((4, 4), 0),
    "granite-docling": ((3, 3), 18),
}
NO_GRID = {
    **dict.fromkeys(("idefics2", "aria", "deepseek-ocr2"), "resampled from all of an image, form no grid"),
    **dict.fromkeys(
        ("minicpm-v-4.6", "minicpm-v-4.7", "minicpm-ocr"), "form no grid that could be drawn over one picture"
    ),
    "hunyuan-vl": "some of which stand at the ends of lines, form no grid",
    "step3.7": "of an overview and tiles of another size, form no grid",
    "molmo2": "made of patches of crops that overlap, form no grid",
}


def processor_of(name: str, specs: Any = ONE_IMAGE) -> RowProcessor:
    processor = RowProcessor(FAMILIES[name], specs)
    processor.image_processor = SETTINGS
    return processor


def found_in(name: str, specs: Any = ONE_IMAGE) -> Grid:
    model, processor = FAMILIES[name].model(), processor_of(name, specs)
    inputs = FAMILIES[name].batch(processor.rows).inputs
    n_vision = int(vision_token_mask(model, inputs["input_ids"]).sum())
    return grid_of(model, processor, processor.examples[0], inputs, n_vision)


@for_each(family for family in FAMILIES.values() if family.model_type in ROWS)
def test_grid(family: Family) -> None:
    if family.name in NO_GRID:
        with pytest.raises(ThinsightError, match=NO_GRID[family.name]):
            found_in(family.name)
        return
    found = found_in(family.name)
    assert (found.size, found.first) == GRIDS[family.name]


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_pixel_shuffle_keeps_the_reading_order(rows: list[int]) -> None:
    """A change of one tile's lower left corner changes the lower left token of a tower without attention."""
    family = FAMILIES["internvl-qwen2"]
    model = family.build()
    for layer in model.model.vision_tower.encoder.layer:
        torch.nn.init.zeros_(layer.attention.projection_layer.weight)
    pixels = torch.zeros(1, 3, 42, 42)
    changed = pixels.clone()
    top, left = 14 * rows[0], 14 * rows[1]
    changed[:, :, top : top + 14, left : left + 14] = 1
    before, after = (
        model.model.get_image_features(pixel_values=p, return_dict=True).pooler_output[0] for p in (pixels, changed)
    )
    differing = (before - after).abs().amax(-1).nonzero().flatten().tolist()
    assert differing == [3 * rows[0] + rows[1]]


def test_several_untiled_images_show_the_first() -> None:
    found = found_in("gemma3", ([2, 3, 9],))
    assert (found.size, found.first) == ((4, 4), 0)


def test_tiles_of_several_images_form_no_grid() -> None:
    with pytest.raises(ThinsightError, match="2 images are cut into 4 tiles form no grid"):
        found_in("internvl-qwen2", ([2, 3, 9],))


@pytest.mark.parametrize(
    ("whole_view", "images", "n_vision", "found"),
    [
        (True, 1, 38, ((2, 3), 32)),
        (False, 1, 38, "1 images are cut into 3 tiles form no grid"),
        (True, 2, 38, "2 images are cut into 3 tiles form no grid"),
        (True, 3, 38, ((4, 4), 0)),
        (True, 1, 40, "40 vision tokens of images or tiles that make 38 form no grid"),
    ],
)
def test_tiles_of_patches_are_drawn_on_the_view_behind_them(
    whole_view: bool, images: int, n_vision: int, found: Any
) -> None:
    model, processor = FAMILIES["lfm2-vl"].model(), processor_of("lfm2-vl")
    processor.image_processor = SimpleNamespace(use_thumbnail=whole_view)
    example = Example("a", tuple(tiny_images(images)), "what")
    inputs = {"spatial_shapes": torch.tensor([[8, 8], [8, 8], [4, 6]])}
    if isinstance(found, str):
        with pytest.raises(ThinsightError, match=found):
            grid_of(model, processor, example, inputs, n_vision)
        return
    grid = grid_of(model, processor, example, inputs, n_vision)
    assert (grid.size, grid.first) == found


def test_lfm2s_tokens_are_in_reading_order() -> None:
    """Changing a block of patches before the projector changes the token at its place."""
    model = FAMILIES["lfm2-vl"].build()
    patches = torch.zeros(1, 4, 6, 32)
    changed = patches.clone()
    changed[:, 2:4, 4:6] = torch.linspace(-1, 1, 32)  # the third block of the second row
    before, after = (model.model.multi_modal_projector(each).flatten(0, 2) for each in (patches, changed))
    assert (before - after).abs().amax(-1).nonzero().flatten().tolist() == [5]


def test_tokens_that_are_no_blocks_of_patches_form_no_grid() -> None:
    model, processor = FAMILIES["llava"].model(), processor_of("llava")
    inputs = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(ThinsightError, match="15 vision tokens of 1 images or tiles of 4 x 4 patches"):
        grid_of(model, processor, processor.examples[0], inputs, 15)


def test_numbers_within_the_grid() -> None:
    grid = Grid(processor_of("llava").examples[0].images[0], 2, 3, first=4)
    assert grid.inside([0, 3, 4, 7, 9, 10]) == (0, 3, 5)


@for_each(family for family in FAMILIES.values() if family.model_type in ROWS)
def test_show_and_bench(family: Family) -> None:
    model, processor = family.model(), processor_of(family.name)
    reduction = Reduction(Schedule([1, 0.5, 0.5, 0.25]), "uniform")
    if family.name not in NO_GRID:
        picture = picture_of(model, processor, processor.examples[0], reduction, max_new_tokens=2)
        assert picture.layers == (1, 3)
        shown = set(range(picture.grid[0] * picture.grid[1]))
        assert set(picture.kept[1]) <= set(picture.kept[0]) < shown
    inputs = family.batch(processor.rows).inputs
    measured = measure(model, inputs, reduction, runs=1, warmup=0, new_tokens=2)
    assert [timing.what for timing in measured.timings][::2] == [PREFILL, ANSWER]
    if not sliding_layers(model):  # there, what no window reaches is removed with the next token only
        assert measured.kv_ratio > 1
