"""Layers that read another layer's keys (Gemma 4): what they see, and what they may be asked for."""

from __future__ import annotations

import pytest
import torch
from conformance.checks import Case, close, generate
from conformance.families import FAMILIES

from thinsight import cost
from thinsight.errors import Unsupported
from thinsight.reduction import Reduction
from thinsight.runtime import apply, layer_scores
from thinsight.schedule import Adaptive, Schedule

FAMILY = FAMILIES["gemma4"]  # layer 3 reads the keys of layer 1
CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))


def test_a_layer_that_reads_others_keys_sees_that_layers_tokens() -> None:
    """Not those of the layer before it, which are fewer; and it drops none itself."""
    model, row = FAMILY.model("eager"), FAMILY.rows([[2, 3, 9]], 5)[0]
    inputs, text = FAMILY.batch([row]).inputs, len(row.ids) - len(row.vision)
    with CASE.apply(model) as handle, torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        kept = [len(handle.kept(layer)[0]) for layer in range(4)]
    assert kept[1] > kept[2] == kept[3]
    assert [weights.shape[-2] - text for weights in attentions] == kept
    assert [weights.shape[-1] - text for weights in attentions] == [*kept[:3], kept[1]]


def test_rates_of_such_layers_change_nothing() -> None:
    model, inputs = FAMILY.model(), FAMILY.inputs([[3, 5], [2, 3, 9]])
    answers = []
    for last in (0.5, 0.0):
        with apply(model, Schedule([1, 0.8, 0.5, last])):
            answers.append(torch.stack(generate(model, inputs, 3).logits))
    assert torch.equal(*answers)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("asked", [1, 4, 24])
def test_the_last_logits_are_those_of_all(asked: int, padding: str) -> None:
    """The model cuts what these layers get to what is asked for: here vision tokens, too, of which some are dropped."""
    model, inputs = FAMILY.model(), FAMILY.inputs([[3, 5], [2, 3, 9]], padding=padding)
    with CASE.apply(model), torch.no_grad():
        everything = model(**inputs).logits
        some = model(**inputs, logits_to_keep=asked).logits
    real = inputs["attention_mask"][:, -asked:].bool()
    assert some.shape[1] == asked
    close(some[real], everything[:, -asked:][real])
    if asked == 24:
        assert (some[real] == 0).all(-1).any()


def test_every_layer_is_scored() -> None:
    found = layer_scores(FAMILY.model(), FAMILY.inputs([[3, 5], [2, 3, 9]]))
    assert found.scores.shape[0] == 4
    assert found.scores.isfinite().all()


def test_a_schedule_for_each_prompt_is_not_chosen_there() -> None:
    many, few = Schedule([1, 0.8, 0.5, 0.5]), Schedule([1, 0.8, 0.5, 0.1])
    adaptive = Adaptive("concentration", 3, (0.5,), (many, few), (0.5, 0.5))
    with pytest.raises(Unsupported, match=r"decoder layer 3, .* reads the keys of layer 1"):
        apply(FAMILY.model(), Reduction(adaptive.mean(), adaptive=adaptive))


def test_they_cost_neither_memory_nor_more_for_more_tokens() -> None:
    config = FAMILY.model().config
    half = Schedule([1, 1, 0.5, 0.5])
    assert cost.kv_bytes(config, 10, 5, half, 4) == cost.kv_bytes(config, 10, 5, Schedule([1, 1, 0.5, 0.0]), 4)
    # sliding layers of 2 heads of 8, the full one of 2 of 16; the last layer caches nothing
    assert cost.kv_bytes(config, 10, 5, half, 4) == 2 * 4 * 2 * (15 * 8 + 15 * 16 + 10 * 8)
    parts = cost.breakdown(config, n_vision=10, n_text=5, schedule=half)
    q_and_o, per_layer, mlp = 2 * 32 * 4 * 16, 2 * 32 * 8, 3 * 32 * 2 * 48
    assert parts.per_layer[3] == 2 * (q_and_o + per_layer + mlp) + 2 * 2 * 15 * 4 * 16
