"""The reference is sound: if nothing is dropped it is the stock model, and what is dropped has no effect."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from thinsight.checking import prompts, reference
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

from .behaviours import for_each
from .checks import close, generate, scores_of
from .families import FAMILIES
from .family import IMAGES, MIXED, VIDEOS, Family, draw_weights
from .inputs import Batch, Row, Spec, answer
from .reference import Reference, hide
from .refused import lfm2
from .test_generate import positions

STEPS = 3
HALF = Schedule([1, 1, 0.5, 0.5])
with_video = [family for family in FAMILIES.values() if family.video is not None]


def batches(family: Family) -> list[Batch]:
    """All kinds of prompts that the family has."""
    specs: list[tuple[Spec, ...]] = [IMAGES]
    if family.video is not None:
        specs += [VIDEOS, MIXED] if family.mixes_video else [VIDEOS]
    return [family.batch(family.rows(spec)) for spec in specs]


@for_each()
def test_a_full_schedule_is_the_stock_model_at_every_step(family: Family) -> None:
    """Padded batches with a cache on the stock model's side, single rows without one on the reference's."""
    for batch in batches(family):
        out = generate(family.model(), batch.inputs, STEPS)
        for number, row in enumerate(batch.rows):
            reference = Reference(family, Schedule.full(4))
            logits = reference.read(row)[-1]
            for step, token in enumerate(out.sequences[number, -STEPS:].tolist()):
                close(out.logits[step][number], logits)
                logits = reference.answer(token)


@pytest.mark.parametrize("spec", [[6], [2, 5]], ids=["text", "image"])
@for_each()
def test_a_full_schedule_is_the_stock_model_in_a_later_turn(family: Family, spec: Spec) -> None:
    if len(spec) > 1 and not family.images_later:
        spec = [5]
    model, rows = family.model(), family.rows(([3, 5], [2, 1, 4]))
    turn = family.later_turn(spec)
    first = generate(model, family.batch(rows).inputs, STEPS)
    answers = [Row([answer(tokens)]) for tokens in first.sequences[:, -STEPS:].tolist()]
    wholes = [row + said + turn for row, said in zip(rows, answers, strict=True)]
    inputs = family.later_inputs(model, wholes, [turn, turn])
    if not family.places_later_images:
        inputs |= positions(model, family.batch(wholes).inputs)
    second = generate(model, inputs, STEPS, **{CACHE: first[CACHE]})
    for number, row in enumerate(rows):
        reference = Reference(family, Schedule.full(4))
        reference.read(row)
        for token in answers[number].ids:
            reference.answer(token)
        logits = reference.read(turn)[-1]
        for step, token in enumerate(second.sequences[number, -STEPS:].tolist()):
            close(second.logits[step][number], logits)
            logits = reference.answer(token)


@for_each()
def test_hidden_tokens_have_no_effect(family: Family) -> None:
    """With no vision token in any layer, other pixels give the same logits; with all of them, they do not."""
    row = family.rows([[3, 5]])[0]
    other = family.rows([[3, 5]], seed=7)[0]
    seen = [part if part.groups else mine for part, mine in zip(other.parts, row.parts, strict=True)]
    changed = type(row)(seen)
    for rate, alike in ((0.0, True), (1.0, False)):
        logits = []
        for prompt in (row, changed):
            reference = Reference(family, Schedule([rate] * 4), scores=scores_of(row))
            logits.append(torch.stack([reference.read(prompt)[-1], reference.answer(50)]))
        assert torch.allclose(*logits, atol=1e-4) == alike


@for_each()
def test_removing_rows_is_hiding_them_where_attention_allows_both(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = family.rows([[2, 3, 9]])[0]
    logits = []
    for _ in range(2):
        both = Reference(family, Schedule([1, 0.7, 0.4, 0.1]), scores=scores_of(row))
        logits.append(torch.stack([both.read(row)[-1], both.answer(50)]))
        monkeypatch.setattr(reference, "attention_of", lambda layer: None)
    close(*logits)


def test_what_is_dropped_leaves_nothing_in_a_state_that_is_carried_along() -> None:
    """Convolution layers: tokens that are removed have no effect, those that a mask would hide do."""
    model = lfm2().eval()
    draw_weights(model, 0)
    words = [prompts.text([20, 21]), prompts.Part([4] * 4, [prompts.IS_IMAGE] * 4, [4]), prompts.text([22, 23])]
    logits = []
    for token in (30, 31):
        row = Row([words[0], prompts.Part([token] * 4, words[1].kinds, [4]), words[2]])
        removing = reference.Reference(model, prompts.collate, Schedule([0.0] * 4), scores=scores_of(row))
        logits.append(torch.stack([removing.read(row)[-1], removing.answer(50)]))
    assert torch.equal(*logits)
    full = reference.Reference(model, prompts.collate, Schedule.full(4))
    assert not torch.allclose(full.read(row)[-1], logits[1][0], atol=1e-2)


@for_each()
def test_reduced_logits_differ_from_full_ones(family: Family) -> None:
    """Weights are wide enough that every reduction can be seen in the logits."""
    for batch in batches(family):
        for row in batch.rows:
            full = Reference(family, Schedule.full(4)).read(row)[-1]
            reference = Reference(family, HALF)
            reduced = reference.read(row)[-1]
            counts = [HALF.counts(len(group))[3] for group in row.groups]
            assert len(reference.kept[3]) == sum(counts)
            assert torch.allclose(full, reduced, atol=1e-2) == (not row.vision)


def lengths(family: Family, modality: str, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of each entry of the stock encoder's output."""
    encoder = getattr(family.model().base_model, f"get_{modality}_features", None)
    encoder = encoder or family.model().base_model.get_image_features
    wanted = {name: inputs[name] for name in inspect.signature(encoder).parameters if name in inputs}
    with torch.no_grad():  # PerceptionLM has videos read as images
        output = encoder(**(wanted or {"pixel_values": inputs["pixel_values_videos"]}), return_dict=True)
    if family.model_type == "granite4_vision":  # has them by decoder layer, and nowhere else
        return [len(entry) for entry in output.deepstack_features[0][1]]
    entries = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    return [len(entry) for entry in entries]


@for_each()
def test_images_end_where_the_stock_encoder_says(family: Family) -> None:
    """An entry of the encoder's output is an image, a tile of one, or (Idefics) all images of a row."""
    batch = batches(family)[0]
    inputs = dict(batch.inputs)
    if "pixel_values_images" in inputs:
        inputs["pixel_values"] = inputs.pop("pixel_values_images")
    entries = set(itertools.accumulate(lengths(family, "image", inputs)))
    groups = set(itertools.accumulate(len(group) for row in batch.rows for group in row.groups))
    assert max(entries) == max(groups)
    assert entries <= groups | {0} or groups <= entries


@for_each(with_video)
def test_videos_end_where_the_stock_encoder_says(family: Family) -> None:
    batch = batches(family)[1]
    entries = list(itertools.accumulate(lengths(family, "video", batch.inputs)))
    assert entries == list(itertools.accumulate(len(group) for row in batch.rows for group in row.groups))


def test_an_assistant_fails_in_the_stock_ernie() -> None:
    """Its second token types are not lengthened by what is proposed."""
    family = FAMILIES["ernie4.5-vl"]
    inputs = family.batch([family.rows([[2, 3, 9]])[0]]).inputs
    assert set(family.types.names if family.types else ()) <= inputs.keys()
    with pytest.raises((IndexError, RuntimeError), match=r"shape|size"):
        generate(family.model(), inputs, 3, assistant_model=family.build(seed=3))


def test_videos_of_several_frames_fail_in_the_stock_kimi() -> None:
    """Its tower gives a video the tokens of one frame, and its model splits them as those of all."""
    model, pixels = FAMILIES["kimi-k2.5"].model(), torch.zeros(2 * 16, 3, 4, 4)
    base, grid = model.base_model, torch.tensor([[2, 4, 4]])
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        base.get_video_features(pixels, grid)


def test_hiding_keeps_every_softmax_defined() -> None:
    mask = hide(None, {0, 2}, torch.zeros(1, 4, 8))
    seen = mask[0, 0] == 0
    assert seen.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, False, True],
    ]
