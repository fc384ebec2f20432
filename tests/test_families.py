"""The rows of `thinsight.families`: complete, in step with the conformance suite, and open to a family from outside."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conformance.checks import Case, check_steps
from conformance.families import FAMILIES, masked_tiles
from tiny import tiny_images
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

import thinsight as ts
from thinsight import cost
from thinsight.errors import Unsupported
from thinsight.evaluation.prompts import prompt_text
from thinsight.families import FAMILIES as ROWS
from thinsight.families import NOT_KNOWN, TOWERS, Family, Tower, family_of, has_roles, tower_of
from thinsight.job.findings import grid_of
from thinsight.runtime import apply, encode_images
from thinsight.runtime.anatomy import refusal, vision_placeholders

MAY_BE_NONE = {"tower", "video_placeholder"}  # for each of them the row's comment says what None means
KNOWN = {"fixed", "any"}
UNSAID = {"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}  # of their configs only checkpoints say the placeholders


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.model_type)
def test_a_row_has_every_fact_or_says_that_it_is_not_known(row: Family) -> None:
    config = transformers.CONFIG_MAPPING[row.model_type]()
    assert [each.name for each in fields(row) if getattr(row, each.name) is None and each.name not in MAY_BE_NONE] == []
    assert row.model_type
    assert row.model_class
    assert row.name
    assert {"image"} <= {*row.modalities} <= {"image", "video"}
    assert callable(row.projector) or row.projector == NOT_KNOWN
    assert tower_of(config).images in KNOWN or row.projector == NOT_KNOWN
    kind = type(None) if row.model_type in UNSAID else int
    assert isinstance(getattr(config, row.image_placeholder), kind)
    if "video" in row.modalities and row.video_placeholder is not None:
        assert isinstance(getattr(config, row.video_placeholder), kind)
    assert row.bare_processor in ("", PROCESSOR_MAPPING_NAMES.get(row.model_type))


def test_the_rows_are_the_families_of_the_conformance_suite() -> None:
    rows = {(row.model_type, row.model_class) for row in ROWS.values()}
    assert {(family.model_type, family.model_class) for family in FAMILIES.values()} == rows


def test_towers_are_fixed_or_of_any_size() -> None:
    assert {tower.images for tower in TOWERS.values()} == KNOWN
    assert Tower().images == NOT_KNOWN


def test_a_config_is_read_without_torch() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(ts.__file__).parent.parent)!r}); import thinsight\n"
        "thinsight.models(), thinsight.cost.flops\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_class_that_the_installed_transformers_lacks_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS._items, "later", Family("later", "LaterForConditionalGeneration", "Later", since=(99, 0)))
    listed = {row.model_type: row.model_class for row in ts.models()}
    assert listed["later"] == ""
    assert listed["llava"] == "LlavaForConditionalGeneration"


def test_one_token_for_images_and_videos_is_counted_once() -> None:
    """As a row says, and without one, where the config has both names for it (Molmo2)."""
    model = FAMILIES["molmo2"].build()
    ids = FAMILIES["molmo2"].inputs([[3, 5]])["input_ids"]
    wanted = int((ids == model.config.image_patch_id).sum())
    for kind in ("molmo2", "outside"):
        model.config.model_type = kind
        if kind == "outside":
            model.config.image_token_id = model.config.video_token_id = model.config.image_patch_id
        found = vision_placeholders(model, ids)
        assert sum(int(mask.sum()) for mask in found.values()) == wanted


def test_a_prompt_that_would_be_scaled_by_wrong_places_is_refused() -> None:
    """Llama 4's layers without rotary positions count places in tokens that are there."""
    family = FAMILIES["llama4"]
    settings = {**family.config["text_config"], "floor_scale": 20}
    short = replace(family, config={**family.config, "text_config": settings})
    model = short.build()
    with apply(model, ts.Schedule([1, 0.5, 0.5, 0.25])), torch.no_grad():
        model(**short.inputs([[3]]))
        with pytest.raises(Unsupported, match="from 20 on this model's layers scale attention by a token's place"):
            model(**short.inputs([[3, 5, 4]]))


def test_granite_doclings_fine_path_makes_four_times_as_many_tokens() -> None:
    """Encoded ahead or in the pass, under a reduction; its density router's logits come out of the latter."""
    family = FAMILIES["granite-docling"]
    fine = replace(family, image=masked_tiles(42, 36))
    model, inputs = family.model(), fine.inputs([[3, 5], [2, 3, 9], [7]])
    inputs["tile_fine_mask"] = torch.ones(3, dtype=torch.bool)
    with apply(model, ts.Schedule([1, 0.5, 0.5, 0.25])) as handle, torch.no_grad():
        whole = model(**inputs)
        kept = handle.kept(3)
        encoded = encode_images(model, inputs)
        rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        again = model(**rest, **encoded.model_inputs())
    assert [len(row) for row in kept] == [27, 36, 0]  # a quarter of three tiles, of one and of three
    assert torch.equal(again.logits, whole.logits)
    assert whole.router_logits.shape == (3,)
    assert again.router_logits is None


@pytest.mark.parametrize("spec", [[3, 5], [2, 3, 9]])
def test_hunyuan_turns_its_tokens_by_their_images_number_too(spec: list[int]) -> None:
    family = FAMILIES["hunyuan-vl"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    config = {**family.config, "text_config": {**family.config["text_config"], "rope_parameters": rope}}
    numbered = replace(family, config=config)
    check_steps(numbered, Case(ts.Schedule([1, 0.7, 0.4, 0.2])), numbered.batch(numbered.rows([spec])))


def test_flash_attention_is_refused_where_positions_scale_it() -> None:
    """It would take the gaps that dropped tokens leave for the ends of packed sequences (Ministral 3, Mistral 4)."""
    for name in ("mistral3-ministral3", "mistral3-mistral4"):
        model = FAMILIES[name].build()
        model.get_decoder().config._attn_implementation = "flash_attention_2"
        with pytest.raises(Unsupported, match="positions with gaps for packed sequences"):
            apply(model, ts.Schedule([1, 0.5, 0.5, 0.25]))


def test_a_ratio_of_windows_that_is_not_whole_is_refused() -> None:
    family = FAMILIES["granite4-vision"]
    assert family_of(family.model().config).merge(family.model().config, None) == 4
    with pytest.raises(Unsupported, match="downsample_rate 3/8 makes no whole number of patches a token"):
        family_of(family.model().config).merge({"downsample_rate": "3/8"}, None)


def test_a_tower_of_timm_is_refused_for_what_reads_its_attention() -> None:
    for name in ("fast-vlm", "perception-lm", "gemma3n"):
        with pytest.raises(Unsupported, match="package timm, whose attention cannot be read here"):
            apply(FAMILIES[name].build(), ts.Reduction(ts.Schedule([1, 0.5, 0.5, 0.25]), "vision-attention"))


def test_a_tower_that_is_not_known_is_not_guessed() -> None:
    config = FAMILIES["llava"].model().config.to_dict()
    config["vision_config"]["model_type"] = "new_tower"
    with pytest.raises(Unsupported, match="the vision tower 'new_tower' of 'llava' is not known"):
        cost.vision_flops(config, n_vision=16)


# -- a family from outside -----------------------------------------------------------------------------------

OUTSIDE = Family(
    "outside",
    "OutsideForConditionalGeneration",
    "Outside",
    tiles="overview last",
    tower=Tower("fixed", gated=True),
    merge=lambda config, vision: 1,
    projector=lambda config, vision, merged: 1000,
    bare_processor="OutsideProcessor",
)


class OutsideProcessor:
    image_token = "<image>"
    image_processor = None


@pytest.fixture
def outside() -> Any:
    """A model of a type that thinsight does not have: LLaVA under another name."""
    model = FAMILIES["llava"].build()
    model.config.model_type = "outside"
    return model


def test_without_a_row_a_family_is_refused_and_its_facts_are_not_known(outside: Any) -> None:
    assert "model_type is 'outside'" in str(refusal(outside.config))
    assert family_of(outside.config).projector == NOT_KNOWN
    assert "image" in vision_placeholders(outside, torch.tensor([[1, 2]]))  # where its attributes say so
    with pytest.raises(Unsupported, match="the projector of 'outside' is not known"):
        cost.vision_flops(outside.config)


def test_a_row_makes_costs_pictures_prompts_and_passes_work(outside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS._items, "outside", OUTSIDE)
    assert refusal(outside.config) is None
    assert ("outside", "Outside") in [(model.model_type, model.name) for model in ts.models()]

    like = FAMILIES["llava"].model().config.vision_config
    layer = cost.DecoderShape(like.num_hidden_layers, 32, 2, 2, 16, like.intermediate_size, 0, gated=True)
    tower = 16 * 2 * 3 * 7 * 7 * 32 + like.num_hidden_layers * sum(layer.layer_flops(16))
    assert cost.vision_flops(outside.config, 3) == 3 * (tower + 16 * 2 * 1000)
    assert cost.vision_flops(outside.config, n_vision=32) == 2 * (tower + 16 * 2 * 1000)

    example = ts.Example("1", tuple(tiny_images(1)), "what ?")
    inputs = {"pixel_values": torch.zeros(3, 3, 28, 28)}  # three tiles
    grid = grid_of(outside, OutsideProcessor(), example, inputs, 48)
    assert (grid.size, grid.first) == ((4, 4), 32)

    assert not has_roles(OutsideProcessor())
    assert prompt_text(OutsideProcessor(), example) == "<image>what ?"

    inputs = FAMILIES["llava"].inputs([[3, 5]])
    with apply(outside, ts.Reduction(ts.Schedule([1, 0.5, 0.5, 0.25]), "uniform")) as handle, torch.no_grad():
        outside(**inputs)
        assert handle.kept(3)[0].tolist() == handle.kept(3)[0].unique().tolist()
        assert len(handle.kept(3)[0]) == 4


def test_a_row_enters_by_an_entry_point(tmp_path: Path) -> None:
    """From another distribution, and without torch."""
    (tmp_path / "garden.py").write_text(
        "from thinsight.families import Family, square, two_matrices\n"
        "ROW = Family('garden', 'GardenModel', 'Garden', merge=square('side'), projector=two_matrices)\n"
    )
    info = tmp_path / "garden-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garden\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[thinsight.families]\ngarden = garden:ROW\n")
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = {
        "model_type": "garden",
        "side": 2,
        "text_config": {"hidden_size": 4},
        "vision_config": {**vision, "image_size": 4, "patch_size": 1, "model_type": "siglip_vision_model"},
    }
    program = (
        f"import sys; sys.path[:0] = [{str(Path(ts.__file__).parent.parent)!r}, {str(tmp_path)!r}]; import thinsight\n"
        f"print([model.name for model in thinsight.models() if model.model_type == 'garden'])\n"
        f"print(thinsight.cost.vision_flops({config!r}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    layer = sum(cost.DecoderShape(1, 8, 1, 1, 8, 8, 0, gated=False).layer_flops(16))
    assert done.stdout.split("\n")[:2] == ["['Garden']", f"{16 * 2.0 * 3 * 8 + layer + 4 * 2.0 * (8 + 4) * 4} False"]
