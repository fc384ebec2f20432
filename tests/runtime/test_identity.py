"""Where nothing is dropped, the model's numbers are the stock model's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_inputs, tiny_llava

from thinsight.runtime import apply
from thinsight.schedule import Schedule

PADDED = [[3, 5], [2, 3, 9], [7]]
SINGLE = [[3, 5]]
# all of these keep 16 of 16 tokens; the second has every hook installed and every count computed
FULL = Schedule.full(4)
NEARLY = Schedule([1, 0.99, 0.97, 0.95])


def run(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        logits = model(**batch).logits
    out = model.generate(**batch, **options)
    beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)
    return logits, torch.stack(out.logits), beams


@pytest.mark.parametrize("schedule", [FULL, NEARLY], ids=["full", "nearly"])
@pytest.mark.parametrize("rows", [PADDED, SINGLE], ids=["padded", "single"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_keep_all_is_bit_identical(attn: str, rows: list[list[int]], schedule: Schedule) -> None:
    model = tiny_llava(attn)
    batch = tiny_inputs(rows)
    stock = run(model, batch)
    with apply(model, schedule):
        reduced = run(model, batch)
    for ours, theirs in zip(reduced, stock, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_prompts_without_an_image_are_untouched(attn: str) -> None:
    model = tiny_llava(attn)
    batch = tiny_inputs([[7], [3]])
    stock = run(model, batch)
    with apply(model, Schedule([1, 0.5, 0.1, 0])):
        reduced = run(model, batch)
    for ours, theirs in zip(reduced, stock, strict=True):
        assert torch.equal(ours, theirs)


def test_full_schedule_installs_nothing() -> None:
    model = tiny_llava()
    with apply(model, FULL):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_above_the_first_reduction_are_untouched() -> None:
    model = tiny_llava()
    batch = tiny_inputs(PADDED)
    states: list[torch.Tensor] = []
    watch = model.model.language_model.layers[1].register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        model(**batch)
        with apply(model, Schedule([1, 1, 0.5, 0.2])):
            model(**batch)
    watch.remove()
    assert torch.equal(states[0], states[1])
