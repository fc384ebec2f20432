"""Vision features of every family: what is passed in again gives what pixels give, image by image too.

The families are those of the conformance suite's table that the library supports.
"""

from __future__ import annotations

import math

import pytest
import torch
from conformance.families import FAMILIES
from conformance.family import VIDEOS, Family
from torch import Tensor

from thinsight.errors import ThinsightError
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import EncodedImages, apply, encode_images
from thinsight.runtime.anatomy import MODALITIES
from thinsight.runtime.encoding import encoder_inputs, fit_received, on_device
from thinsight.schedule import Schedule

HELD = {name: family for name, family in FAMILIES.items() if family.model_type in ROWS}
WITH_VIDEO = [name for name, family in HELD.items() if family.video is not None]
POOLED = ["internvl-qwen2", "idefics3", "smolvlm", "gemma3", "aya-vision"]


def without_pixels(family: Family, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left for `forward` once the encoder has run; grids stay, they tell positions."""
    model = family.model()
    taken = {name for modality in MODALITIES for name in encoder_inputs(model, modality)}
    return {
        name: tensor
        for name, tensor in inputs.items()
        if name not in taken or name.endswith("_thw") or "target_sizes" in name
    }


@pytest.mark.parametrize("name", HELD)
def test_features_give_what_pixels_give(name: str) -> None:
    family = HELD[name]
    model, inputs = family.model(), family.inputs()
    encoded = encode_images(model, inputs)
    again = EncodedImages.concat([encoded.rows(i) for i in range(len(encoded))]).to("cpu")
    rest = without_pixels(family, inputs)
    with torch.no_grad():
        stock = model(**inputs).logits
        assert torch.equal(model(**rest, **again.model_inputs()).logits, stock)
    for beams in (1, 2) if family.encodes_ahead else (1,):
        options = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**rest, **again.model_inputs(), **options), expected)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_videos_too(name: str) -> None:
    family = HELD[name]
    model, inputs = family.model(), family.inputs(VIDEOS)
    encoded = encode_images(model, inputs)
    assert set(encoded.modalities) == {"video"}
    with torch.no_grad():
        stock = model(**inputs).logits
        given = model(**without_pixels(family, inputs), **encoded.model_inputs()).logits
    assert torch.equal(given, stock)


def test_deepstack_features_come_along() -> None:
    encoded = encode_images(HELD["qwen3-vl"].model(), HELD["qwen3-vl"].inputs())
    assert [len(layers) for layers in encoded.deepstack] == [3] * 7
    assert encoded.num_bytes == sum(len(feature) for feature in encoded.features) * 4 * 32 * 4
    assert len(encoded.rows([2, 0]).deepstack) == 2


@pytest.mark.parametrize(
    "name", ["gemma3", "idefics3", "qwen2-vl", "deepseek-vl-hybrid", "deepseek-ocr2", "video-llava"]
)
def test_floating_inputs_take_the_models_dtype(name: str) -> None:
    family = HELD[name]
    model = family.build().to(torch.bfloat16)
    inputs = family.inputs()
    assert {feature.dtype for feature in encode_images(model, inputs).features} == {torch.bfloat16}
    listed = on_device(model, {"pixel_values": [torch.zeros(2), torch.tensor([1])]})["pixel_values"]
    assert [tensor.dtype for tensor in listed] == [torch.bfloat16, torch.int64]
    named = on_device(model, {"input_features": torch.zeros(2), "second_per_grid_ts": torch.tensor([1.003])})
    assert named["input_features"].dtype == torch.bfloat16
    assert named["second_per_grid_ts"].item() == pytest.approx(1.003, abs=1e-6)  # positions are counted from it


# --- attention inside the tower


@pytest.mark.parametrize("name", POOLED)
def test_a_token_that_stands_for_a_block_gets_the_mean_of_the_block(name: str) -> None:
    """Which rows of the tower a token really reads is found by changing each row in turn."""
    family = HELD[name]
    model = family.model()
    tower = getattr(model.base_model, "vision_tower", None) or model.base_model.vision_model
    inputs = family.inputs([[1, 1]])
    changed: dict[str, int | None] = {"row": None}
    shape: list[tuple[int, ...]] = []

    def change(module: torch.nn.Module, args: object, output: object) -> None:
        states = output.last_hidden_state.clone()  # (images, rows, hidden)
        shape.append(tuple(states.shape))
        if changed["row"] is not None:
            states[0, changed["row"]] += torch.linspace(-1, 1, states.shape[-1])
        output.last_hidden_state = states
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = (*output.hidden_states[:-1], states)

    hook = tower.register_forward_hook(change)
    try:
        plain = torch.cat(encode_images(model, inputs).features)
        images, rows = shape[0][:2]
        first = int(name.startswith("internvl"))  # the class token, which the projector does not see
        found = torch.zeros(rows - first, len(plain))
        for row in range(rows - first):
            changed["row"] = row + first
            found[row] = (torch.cat(encode_images(model, inputs).features) - plain).abs().amax(-1) > 0
    finally:
        hook.remove()
    assert (found.sum(1) == 1).all()
    tokens = len(plain) // images
    values = torch.rand(images, rows - first)
    pooled = torch.cat(fit_received(list(values), [len(plain)]))
    for token in range(tokens):
        assert pooled[token] == pytest.approx(float(values[0][found[:, token] > 0].mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma", *POOLED])
def test_received_attention_fits_the_tokens(name: str) -> None:
    family = HELD[name]
    encoded = encode_images(family.model(), family.inputs(), "vision-attention")
    assert encoded.received is not None
    assert [len(row) for row in encoded.received] == [len(feature) for feature in encoded.features]
    assert torch.cat(encoded.received).std() > 0


@pytest.mark.parametrize(
    ("name", "words"), [("llava-next", "line ends"), ("llava-onevision", "line ends"), ("qwen2-vl", "one sequence")]
)
def test_received_attention_that_cannot_be_told_apart_is_refused(name: str, words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        encode_images(HELD[name].model(), HELD[name].inputs(), "vision-attention")


@pytest.mark.parametrize(
    ("rows", "lengths"), [([36, 36], [9, 12]), ([36], [8]), ([12], [3]), ([36], [4, 5]), ([16], [17])]
)
def test_tokens_that_are_no_blocks_of_rows_are_refused(rows: list[int], lengths: list[int]) -> None:
    with pytest.raises(ThinsightError, match="do not match the projector's"):
        fit_received([torch.ones(count) for count in rows], lengths)


def test_mean_of_blocks_in_reading_order() -> None:
    rows = torch.arange(36.0)
    mean = torch.stack([rows.view(6, 6)[i : i + 2, j : j + 2].mean() for i in (0, 2, 4) for j in (0, 2, 4)])
    (fitted,) = fit_received([rows], [9])
    assert torch.equal(fitted, mean)
    assert math.isclose(float(fitted[0]), (0 + 1 + 6 + 7) / 4)


@pytest.mark.parametrize("name", ["llava", *POOLED])
def test_generate_ranks_by_the_tower_though_it_encodes_images_itself(name: str) -> None:
    """transformers 5.23 and later call the encoder before the model, whose attention is then per row of the tower."""
    family = HELD[name]
    model, inputs = family.model(), family.inputs()
    reduction = Reduction(Schedule([0.5] * 4), "vision-attention")
    options = {"max_new_tokens": 3, "do_sample": False}
    with apply(model, reduction):
        found = model.generate(**inputs, **options)
        encoded = encode_images(model, inputs, reduction)
        rest = without_pixels(family, inputs)
        assert torch.equal(model.generate(**rest, **encoded.model_inputs(), **options), found)
        if name not in ("idefics3", "smolvlm"):  # which list the images of a row as one, and so are refused for beams
            beams = model.generate(**inputs, **options, num_beams=2)
            assert torch.equal(model.generate(**rest, **encoded.model_inputs(), **options, num_beams=2), beams)
