"""What a ranker merges is what the layer reads: under left padding, with several images, at any layer."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE, VISION_TOKENS, tiny_inputs, tiny_llava

from thinsight.ranking import Context, choose, get_ranker
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Schedule

ROWS = [[3, 2, 4], [2, 5], [4]]  # two images, one, none
RATE = 0.4  # 7 of 16 tokens: 6 dominant, 1 contextual
LAYERS = 4


def layer_input(model, inputs, layer: int) -> torch.Tensor:
    """(batch, columns, hidden) that a decoder layer reads in a prefill."""
    seen = []

    def look(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    hook = model.model.language_model.layers[layer].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def received(model, inputs) -> torch.Tensor:
    """(images, N) attention from the CLS token at the layer that the projector reads."""
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    return tower.attentions[-2][:, :, 0, 1:].mean(dim=1)


def merged_image(ranker, states: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """What one image (N, hidden) is reduced to, in the order of the prompt: (kept, hidden)."""
    n = len(states)
    given = Context(
        layer=0,
        valid=torch.ones(1, n, dtype=torch.bool),
        image=torch.zeros(1, n, dtype=torch.long),
        index=torch.arange(n)[None],
        size=torch.full((1, n), n),
        vision_attention=attention[None],
        states=states[None],
    )
    count = torch.full((1, n), Schedule.step(1, 0, RATE).counts(n)[0])
    kept = choose(ranker.score(given), given.valid, given.image, count)
    merged = ranker.merge(given, kept)
    assert not torch.equal(merged[kept], given.states[kept])
    return merged[kept]


def in_this_order(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether rows of `found` are those wanted, filling (where a row is shorter than the batch) left out."""
    rest = iter(found)
    return all(any(torch.allclose(one, row, rtol=1e-5, atol=1e-5) for row in rest) for one in wanted)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("spec", [{"name": "visionzip", "keep": RATE}, {"name": "downsample"}])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_layer_reads_the_merged_states(spec, layer: int, padding: str) -> None:
    model = tiny_llava("eager")
    inputs = tiny_inputs(ROWS, padding=padding)
    whole, attention = layer_input(model, inputs, layer), received(model, inputs)
    reduction = Reduction(Schedule.step(LAYERS, layer, RATE), spec)
    with apply(model, reduction):
        reduced = layer_input(model, inputs, layer)
    first = 0
    for row, pieces in enumerate(ROWS):
        real = inputs["attention_mask"][row].bool()
        states, vision = whole[row, real], inputs["input_ids"][row, real] == IMAGE
        parts, place = [], 0
        for number, length in enumerate(pieces):
            text = length + (number == 0)  # the first piece begins with BOS
            parts.append(states[place : place + text])
            place += text
            if number < len(pieces) - 1:
                image = slice(place, place + VISION_TOKENS)
                assert vision[image].all()
                parts.append(merged_image(get_ranker(spec), states[image], attention[first]))
                place, first = image.stop, first + 1
        wanted = torch.cat(parts)
        assert in_this_order(wanted, reduced[row])


def test_merging_changes_the_answer_and_leaves_no_trace() -> None:
    model, inputs = tiny_llava(), tiny_inputs([[3, 5]])
    schedule = Schedule.step(LAYERS, 0, 0.25)
    before = model(**inputs).logits
    logits = []
    for ranker in ("downsample", "uniform"):  # the same tokens, merged and not
        with apply(model, Reduction(schedule, ranker)) as handle:
            logits.append(model(**inputs).logits[:, -1])
            kept = handle.kept(0)[0]
        assert len(kept) == 4
    assert not torch.allclose(*logits, atol=1e-3)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["visionzip", "downsample", "cdpruner", "dart", "divprune", "vispruner"])
def test_generation_in_a_batch_is_generation_alone(name: str) -> None:
    model = tiny_llava()
    inputs = tiny_inputs([[3, 2, 4], [2, 5]])
    with apply(model, Reduction(Schedule.step(LAYERS, 0, 0.25), name)):
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        width = inputs["input_ids"].shape[1]
        for row, images in enumerate((slice(0, 2), slice(2, 3))):
            real = inputs["attention_mask"][row].bool()
            alone = model.generate(
                input_ids=inputs["input_ids"][row, real][None],
                attention_mask=inputs["attention_mask"][row, real][None],
                pixel_values=inputs["pixel_values"][images],
                max_new_tokens=4,
                do_sample=False,
            )
            assert together[row, width:].tolist() == alone[0, int(real.sum()) :].tolist()
