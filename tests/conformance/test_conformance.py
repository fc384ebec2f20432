"""THE conformance suite: every family of models crossed with every behaviour.

A cell passes, or is refused with the message that its family's entry states. A new family needs an entry in
families.py and nothing here.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from thinsight.errors import ThinsightError
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Adaptive, Schedule

from .behaviours import behaviour
from .checks import FULL, NEARLY_FULL, Case, check_steps, close, generate
from .families import FAMILIES
from .family import IMAGES, MIXED, PADDED, VIDEOS, Family
from .flex import uncompiled_flex
from .inputs import Row, Spec
from .refused import REFUSED

SINGLE: tuple[Spec, ...] = ([2, 3, 9],)
TEXT_ONLY: tuple[Spec, ...] = ([7], [3])

SCHEDULES = {
    "staircase": Schedule([1, 0.7, 0.7, 0.2]),
    "every layer": Schedule([1, 0.8, 0.5, 0.1]),
    "to nothing": Schedule([1, 0.5, 0, 0]),
}

with_video = [family for family in FAMILIES.values() if family.video is not None]
encoding_ahead = [family for family in FAMILIES.values() if family.encodes_ahead]
ending_in_images = [family for family in FAMILIES.values() if family.ends_in_images]
with_mixed_video = [family for family in with_video if family.mixes_video]
with_eager = [family for family in FAMILIES.values() if family.attn != ("eager",)]
with_flex = [family for family in FAMILIES.values() if "flex_attention" in family.attn]


# --- nothing dropped: the stock model's numbers, bit for bit


def everything(model: PreTrainedModel, inputs: dict[str, Tensor], beams: int = 2) -> list[Tensor]:
    """Logits of a forward pass and of a greedy decoding, the tokens of both that and of a beam search."""
    with torch.no_grad():
        logits = model(**inputs).logits
    out = generate(model, inputs, 3)
    searched = generate(model, inputs, 3, num_beams=beams, output_logits=False)
    return [logits, torch.stack(out.logits), out.sequences, searched.sequences]


@pytest.mark.parametrize("specs", [PADDED, SINGLE], ids=["padded", "single"])
@behaviour("keep-all")
def test_keep_all_is_bit_identical(family: Family, specs: tuple[Spec, ...]) -> None:
    inputs = family.inputs(specs)
    for attn in sorted({"sdpa", "eager"} & set(family.attn)):
        model = family.model(attn)
        stock = everything(model, inputs, 2 if family.encodes_ahead else 1)
        for schedule in (FULL, NEARLY_FULL):
            with apply(model, schedule):
                reduced = everything(model, inputs, 2 if family.encodes_ahead else 1)
            for ours, theirs in zip(reduced, stock, strict=True):
                assert torch.equal(ours, theirs)


@behaviour("keep-all", with_flex)
def test_keep_all_is_bit_identical_with_flex_attention(family: Family) -> None:
    model, inputs = family.model("flex_attention"), family.inputs(PADDED)
    with uncompiled_flex():
        stock = generate(model, inputs, 2)
        with apply(model, NEARLY_FULL):
            reduced = generate(model, inputs, 2)
    assert torch.equal(torch.stack(reduced.logits), torch.stack(stock.logits))


@behaviour("keep-all", with_video)
def test_keep_all_is_bit_identical_with_video(family: Family) -> None:
    model = family.model()
    for specs in (VIDEOS, MIXED) if family.mixes_video else (VIDEOS,):
        inputs = family.inputs(specs)
        stock = generate(model, inputs, 2)
        with apply(model, Schedule([1, 0.995, 0.99, 0.99])):
            reduced = generate(model, inputs, 2)
        assert torch.equal(torch.stack(reduced.logits), torch.stack(stock.logits))


@behaviour("text-only")
def test_prompts_without_an_image_are_untouched(family: Family) -> None:
    model, inputs = family.model(), family.inputs(TEXT_ONLY)
    stock = everything(model, inputs)
    with apply(model, Schedule([1, 0.5, 0.1, 0])):
        reduced = everything(model, inputs)
    for ours, theirs in zip(reduced, stock, strict=True):
        assert torch.equal(ours, theirs)


# --- reduced: the reference's kept tokens and the logits of every generated step


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@behaviour("reduced")
def test_a_reduced_batch_equals_the_reference(family: Family, schedule: Schedule) -> None:
    check_steps(family, Case(schedule), family.batch(family.rows(IMAGES)))


@behaviour("reduced", with_eager)
def test_a_reduced_batch_equals_the_reference_with_eager_attention(family: Family) -> None:
    check_steps(family, Case(SCHEDULES["every layer"]), family.batch(family.rows(IMAGES, 1)), "eager")


@behaviour("reduced", with_flex)
def test_a_reduced_batch_equals_the_reference_with_flex_attention(family: Family) -> None:
    batch = family.batch(family.rows(PADDED, 1))
    with uncompiled_flex():
        check_steps(family, Case(SCHEDULES["staircase"]), batch, "flex_attention", steps=3)


@behaviour("reduced")
def test_a_reduced_row_alone_equals_the_reference(family: Family) -> None:
    """No padding and no ragged rows: the paths without a mask."""
    for row in family.rows(([3, 5], [2, 3, 9]), 2):
        check_steps(family, Case(SCHEDULES["every layer"]), family.batch([row]))


@behaviour("reduced")
def test_ragged_rows_without_padding_equal_the_reference(family: Family) -> None:
    """Rows of one length, of which one has more to drop: a stock mask may be missing, a reduced one not."""
    one, two = family.rows(([4, 3], [1, 1, 1]), 3)
    short, long = sorted((one, two), key=lambda row: len(row.ids))
    missing = len(long.ids) - len(short.ids)
    filled = short + family.later_turn([missing]) if missing else short
    batch = family.batch([filled, long])
    assert batch.inputs["attention_mask"].all()
    check_steps(family, Case(SCHEDULES["every layer"]), batch, steps=3)


@behaviour("video", with_video)
def test_reduced_videos_equal_the_reference(family: Family) -> None:
    check_steps(family, Case(SCHEDULES["every layer"]), family.batch(family.rows(VIDEOS)), steps=3)


@behaviour("video", with_mixed_video)
def test_reduced_images_and_videos_equal_the_reference(family: Family) -> None:
    check_steps(family, Case(SCHEDULES["every layer"]), family.batch(family.rows(MIXED)), steps=3)


@pytest.mark.parametrize("layer", [1, 2, 3])
@behaviour("any layer")
def test_a_first_drop_at_any_layer_equals_the_reference(family: Family, layer: int) -> None:
    """Among them a hybrid's first full-attention layer, layers that deepstack writes to, the last one."""
    schedule = Schedule([1.0] * layer + [0.4] * (4 - layer))
    check_steps(family, Case(schedule), family.batch(family.rows(PADDED, 4)), steps=3)


@pytest.mark.parametrize("rates", [[0.4, 0.4, 0.4, 0.2], [0, 0, 0, 0]], ids=["to 0.4", "to nothing"])
@behaviour("any layer")
def test_a_drop_at_layer_0_equals_the_reference(family: Family, rates: list[float]) -> None:
    case = Case(Schedule(rates), fixed=True)
    check_steps(family, case, family.batch(family.rows(IMAGES, 5)), steps=3)


@behaviour("any layer")
def test_a_drop_to_nothing_at_the_last_layer_equals_the_reference(family: Family) -> None:
    check_steps(family, Case(Schedule([1, 1, 1, 0])), family.batch(family.rows(PADDED, 6)), steps=3)


@behaviour("any layer", ending_in_images)
def test_prompts_that_end_in_an_image_equal_the_reference(family: Family) -> None:
    """The last token stays, whatever its rank: the answer is read from it."""
    rows = [Row(row.parts[:-1]) for row in family.rows(([3, 5], [2, 3, 4]), 11)]
    check_steps(family, Case(SCHEDULES["every layer"]), family.batch(rows), steps=3)


@behaviour("any layer", ending_in_images)
def test_nothing_to_answer_from_is_refused(family: Family) -> None:
    row = Row(family.rows([[3, 5]], 11)[0].parts[:-1])
    if len(row.ids) - 1 not in row.vision:  # a marker ends the image
        check_steps(family, Case(SCHEDULES["to nothing"]), family.batch([row]), steps=2)
        return
    with Case(SCHEDULES["to nothing"]).apply(family.model()), pytest.raises(ThinsightError, match="ends in"):
        generate(family.model(), family.batch([row]).inputs, 1)


@behaviour("quota")
def test_a_quota_per_prompt_equals_the_reference(family: Family) -> None:
    case = Case(SCHEDULES["every layer"], per="prompt")
    check_steps(family, case, family.batch(family.rows(IMAGES, 7)), steps=3)


@behaviour("quota")
def test_ranking_by_the_last_token_equals_the_reference(family: Family) -> None:
    case = Case(SCHEDULES["every layer"], queries="last")
    check_steps(family, case, family.batch(family.rows(IMAGES, 8)), steps=3)


# --- what comes out


@pytest.mark.parametrize("padding", ["left", "right"])
@behaviour("forward")
def test_forward_logits_line_up_with_the_input(family: Family, padding: str) -> None:
    """Logits of tokens that went through every layer are the reference's, those of dropped ones are zeros."""
    case = Case(SCHEDULES["staircase"])
    batch = family.batch(family.rows(IMAGES, 9), padding)
    with case.apply(family.model()) as handle, torch.no_grad():
        logits = family.model()(**family.placed(batch.inputs)).logits
        last = handle.kept(3)
    assert logits.shape[:2] == batch.inputs["input_ids"].shape
    for number, row in enumerate(batch.rows):
        got = logits[number][batch.inputs["attention_mask"][number].bool()]
        dropped = torch.zeros(len(row.ids), dtype=torch.bool)
        vision = torch.tensor(row.vision, dtype=torch.long)
        dropped[vision] = True
        dropped[vision[last[number]]] = False
        close(got[~dropped], case.reference(family, row).read(row)[~dropped])
        assert (got[dropped] == 0).all()


@behaviour("beams", encoding_ahead)
def test_reduced_beams_have_the_scores_of_the_reference(family: Family) -> None:
    """Each returned sequence's score is the mean log-probability that the reference gives its tokens."""
    case, steps = Case(SCHEDULES["every layer"]), 3
    batch = family.batch(family.rows(family.beams, 10))
    with case.apply(family.model()):
        options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
        out = generate(family.model(), batch.inputs, steps, **options)
    for number, sequence in enumerate(out.sequences[:, -steps:].tolist()):
        reference = case.reference(family, batch.rows[number // 2])
        logits, total = reference.read(batch.rows[number // 2])[-1], 0.0
        for token in sequence:
            total += float(logits.log_softmax(-1)[token])
            logits = reference.answer(token)
        assert float(out.sequences_scores[number]) == pytest.approx(total / steps, abs=2e-4)
    best = out.sequences[::2, -steps:]
    for number, row in enumerate(batch.rows):
        with case.apply(family.model()):
            alone = generate(family.model(), family.batch([row]).inputs, steps, num_beams=3)
        assert torch.equal(alone.sequences[0, -steps:], best[number])


# --- which models


def test_every_supported_model_type_has_a_family_and_every_family_is_supported() -> None:
    installed = {row.model_type for row in ROWS.values() if hasattr(transformers, row.model_class)}
    assert {family.model_type for family in FAMILIES.values()} == installed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ThinsightError, match=message):
        apply(model, Schedule([1, 0.5, 0.5, 0.2]))
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


# --- a schedule for each prompt


@behaviour("adaptive")
def test_each_prompt_runs_as_under_its_own_schedule(family: Family) -> None:
    model, inputs = family.model(), family.inputs(IMAGES, seed=8)
    many, few = Schedule([1, 0.8, 0.7, 0.6]), Schedule([1, 0.8, 0.4, 0.1])
    one = Adaptive("concentration", 2, (), (many,), (1.0,))
    with apply(model, Reduction(many, adaptive=one)) as handle, torch.no_grad():
        model(**family.placed(inputs))
        values = handle.statistic()
    low, high = sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]
    edge = (low + high) / 2
    both = Adaptive("concentration", 2, (edge,), (many, few), (0.5, 0.5))
    with apply(model, Reduction(both.mean(), adaptive=both)) as handle:
        out = generate(model, inputs, 3)
        kept = handle.kept(3)
        assert handle.statistic() == pytest.approx(values, abs=1e-5)
    plain, counts = [], []
    for schedule in (many, few):
        with apply(model, schedule) as handle:
            plain.append(torch.stack(generate(model, inputs, 3).logits))
            counts.append([len(row) for row in handle.kept(3)])
    levels = [both.level(value) for value in values]
    assert set(levels) == {0, 1}
    for row, level in enumerate(levels):
        assert len(kept[row]) == counts[level][row]
        for step, logits in enumerate(out.logits):
            close(logits[row], plain[level][step][row])
            if logits[row].argmax() != plain[level][step][row].argmax():
                break  # a tie of random weights; what follows may differ
