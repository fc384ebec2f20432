"""A reduced model against a masked, cache-free, eager reference: every step's logits."""

from __future__ import annotations

import pytest
import torch
from reference import Reference, unpadded
from tiny import IMAGE, VISION_TOKENS, tiny_inputs, tiny_llava

from thinsight.ranking import get_ranker
from thinsight.runtime import apply
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

ROWS = [[3, 5], [2, 3, 9], [7], [1, 2], [2, 0, 4]]  # one image, two, none, one and short, two side by side
SCHEDULES = {
    "staircase": [1, 0.7, 0.7, 0.2],
    "every layer": [1, 0.8, 0.5, 0.1],
    "one step": [1, 1, 0.5, 0.5],
    "last layer": [1, 1, 1, 0.3],
    "to nothing": [1, 0.5, 0, 0],
}


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", ["instruction", "last"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_generate_equals_reference_at_every_step(attn: str, queries: str, name: str) -> None:
    schedule = Schedule(SCHEDULES[name])
    batch = tiny_inputs(ROWS, seed=1)
    ranker = {"name": "text-attention", "queries": queries}
    model = tiny_llava(attn)
    with apply(model, schedule, ranker=ranker) as handle:
        out = model.generate(
            **batch,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        kept = [handle.kept(layer) for layer in range(4)]
    slow = tiny_llava("eager")
    for row in range(len(ROWS)):
        reference = Reference(slow, schedule, queries=queries)
        logits = reference.read(*unpadded(batch, row))[-1]
        assert [kept[layer][row].tolist() for layer in range(4)] == reference.kept
        for step, token in enumerate(out.sequences[row, -5:].tolist()):
            close(out.logits[step][row], logits)
            logits = reference.answer(token)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_forward_logits_line_up_with_the_input(attn: str, padding: str) -> None:
    schedule = Schedule([1, 0.7, 0.4, 0.1])
    batch = tiny_inputs(ROWS, seed=2, padding=padding)
    model = tiny_llava(attn)
    with apply(model, schedule) as handle, torch.no_grad():
        logits = model(**batch).logits
        last = handle.kept(3)
    assert logits.shape[:2] == batch["input_ids"].shape
    slow = tiny_llava("eager")
    for row in range(len(ROWS)):
        ids, pixels = unpadded(batch, row)
        wanted = Reference(slow, schedule).read(ids, pixels)
        got = logits[row][batch["attention_mask"][row].bool()]
        dropped = torch.zeros(len(ids), dtype=torch.bool)
        vision = (ids == IMAGE).nonzero().flatten()
        dropped[vision] = True
        dropped[vision[last[row]]] = False
        close(got[~dropped], wanted[~dropped])
        assert (got[dropped] == 0).all()


@pytest.mark.parametrize("ranker", ["uniform", {"name": "random", "seed": 3}, "vision-attention"])
@pytest.mark.parametrize("rates", [[0.5, 0.5, 0.5, 0.2], [0, 0, 0, 0], [0.3, 0.3, 0, 0]], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_reduction_at_layer_0(attn: str, rates: list[float], ranker) -> None:
    schedule = Schedule(rates)
    batch = tiny_inputs(ROWS, seed=3)
    model = tiny_llava(attn)
    seen = []
    chosen = get_ranker(ranker)
    score = chosen.score
    chosen.score = lambda context: seen.append((score(context), context.valid)) or seen[-1][0]  # type: ignore[method-assign]
    with apply(model, schedule, ranker=chosen):
        out = model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    slow = tiny_llava("eager")
    for row in range(len(ROWS)):
        count = int((batch["input_ids"][row] == IMAGE).sum())
        scores = seen[0][0][row, :count].tolist()
        reference = Reference(slow, schedule, scores=scores)
        logits = reference.read(*unpadded(batch, row))[-1]
        for step, token in enumerate(out.sequences[row, -4:].tolist()):
            close(out.logits[step][row], logits)
            logits = reference.answer(token)


def test_ragged_rows_without_any_padding() -> None:
    """Equal lengths, different numbers of images: stock sdpa gets no mask, a reduced layer needs one."""
    schedule = Schedule([1, 0.5, 0.3, 0.3])
    batch = tiny_inputs([[3, 21], [2, 3, 3]], seed=4)
    assert batch["attention_mask"].all()
    model, slow = tiny_llava(), tiny_llava("eager")
    with apply(model, schedule):
        out = model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row in range(2):
        reference = Reference(slow, schedule)
        logits = reference.read(*unpadded(batch, row))[-1]
        for step, token in enumerate(out.sequences[row, -4:].tolist()):
            close(out.logits[step][row], logits)
            logits = reference.answer(token)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("second", [[6], [2, 5]], ids=["text", "new image"])
def test_second_turn_on_the_same_cache(attn: str, second: list[int]) -> None:
    schedule = Schedule([1, 0.6, 0.6, 0.2])
    first = tiny_inputs([[3, 5], [2, 8]], seed=5)
    later = tiny_inputs([second, second], seed=6)
    model, slow = tiny_llava(attn), tiny_llava("eager")
    with apply(model, schedule):
        one = model.generate(**first, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, later["input_ids"]], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, 3 + later["input_ids"].shape[1]).long()], dim=1)
        pixels = {"pixel_values": later["pixel_values"]} if "pixel_values" in later else {}
        two = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **pixels,
            **{CACHE: one[CACHE]},
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row in range(2):
        reference = Reference(slow, schedule)
        reference.read(*unpadded(first, row))
        for token in one.sequences[row, -3:-1].tolist():
            reference.answer(token)
        # the last generated token is read with the second turn
        new = torch.cat([one.sequences[row, -1:], later["input_ids"][row]])
        logits = reference.read(new, later["pixel_values"][row : row + 1] if pixels else None)[-1]
        for step, token in enumerate(two.sequences[row, -3:].tolist()):
            close(two.logits[step][row], logits)
            logits = reference.answer(token)


def test_rate_for_the_prompt_as_a_whole() -> None:
    schedule = Schedule([1, 0.5, 0.5, 0.2])
    batch = tiny_inputs([[2, 3, 9]], seed=7)
    model, slow = tiny_llava(), tiny_llava("eager")
    with apply(model, schedule, per="prompt") as handle, torch.no_grad():
        logits = model(**batch).logits[0, -1]
        kept = handle.kept(3)[0].tolist()
    reference = Reference(slow, schedule)
    wanted = reference.read(*unpadded(batch, 0), images=[2 * VISION_TOKENS])[-1]
    assert kept == reference.kept[3]
    close(logits, wanted)
