"""Layers that carry a state along the tokens in place of attending: Gated DeltaNet, short convolutions.

What each family's behaviours are is in tests/conformance; here is what only such layers have.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from conformance.checks import Case, check_steps, generate
from conformance.families import FAMILIES
from conformance.family import IMAGES, PADDED, Family
from conformance.inputs import Row, answer
from conformance.inputs import text as words
from transformers import DynamicCache

from thinsight import cost
from thinsight.errors import BadInput, Unsupported
from thinsight.ranking import get_ranker
from thinsight.reduction import Reduction
from thinsight.runtime import apply, can_share, first_attending, layer_scores
from thinsight.runtime.cache import CACHE
from thinsight.runtime.scoring import TextRows
from thinsight.schedule import Adaptive, Schedule

QWEN, LFM = FAMILIES["qwen3.5"], FAMILIES["lfm2-vl"]
CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))


def of_layers(family: Family, *kinds: str) -> Family:
    """The family with other layers."""
    text = {**family.config["text_config"], "layer_types": list(kinds)}
    return replace(family, name=f"{family.name}-{'-'.join(kinds)}", config={**family.config, "text_config": text})


LATE = of_layers(QWEN, "linear_attention", "linear_attention", "full_attention", "linear_attention")
"""As published models begin: two layers that carry a state, then one that attends."""


# --- what enters such a layer


@pytest.mark.parametrize("rates", [[1, 0.8, 0.5, 0.1], [0.6, 0.6, 0.3, 0.3], [0, 0, 0, 0]])
def test_drops_before_layers_that_carry_a_state_equal_the_reference(rates: list[float]) -> None:
    """By scores that need no attention: also where no layer before attends, and behind the last that does."""
    check_steps(LATE, Case(Schedule(rates), fixed=True), LATE.batch(LATE.rows(IMAGES)), steps=3)


def test_a_drop_behind_the_first_layer_that_attends_equals_the_reference() -> None:
    check_steps(LATE, Case(Schedule([1, 1, 1, 0.3])), LATE.batch(LATE.rows(IMAGES, 1)), steps=3)


def mixer_of(layer: Any) -> tuple[Any, Any]:
    """A layer's way to mix tokens, and the norm in front of it."""
    if hasattr(layer, "linear_attn"):
        return layer.linear_attn, layer.input_layernorm
    return layer.conv, layer.operator_norm


@pytest.mark.parametrize("family", [QWEN, LFM], ids=lambda family: family.name)
def test_a_prompts_state_is_that_of_its_kept_tokens_alone(family: Family) -> None:
    """As the stock layer makes it of their rows, one after the other: convolutions close over gaps."""
    model, row = family.model(), family.rows([[2, 3, 9]])[0]
    layer, entered = model.get_decoder().layers[1], []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append((args[0] if args else kwargs["hidden_states"]).clone())

    with torch.no_grad(), CASE.apply(model) as handle:
        hook = layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        found: Any = model(**family.batch([row]).inputs, use_cache=True)[CACHE].layers[1]
        hook.remove()
        kept = handle.kept(1)[0].tolist()
    vision = row.vision
    there = sorted(set(range(len(row.ids))) - set(vision) | {vision[number] for number in kept})
    assert len(there) < len(row.ids)
    alone: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    mixer, norm = mixer_of(layer)
    name = next(each for each in inspect.signature(mixer.forward).parameters if each in (CACHE, "cache_params"))
    with torch.no_grad():
        mixer(hidden_states=norm(entered[0][:, there]), **{name: alone})
    states = [(found.conv_states[0], alone.layers[1].conv_states[0])]
    if family is QWEN:
        states.append((found.recurrent_states[0], alone.layers[1].recurrent_states[0]))
    for one, two in states:
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", [QWEN, LFM], ids=lambda family: family.name)
def test_what_fills_shorter_rows_leaves_the_state_alone(family: Family, padding: str) -> None:
    """Rows that keep different numbers of tokens have the states that they have alone."""
    model, rows = family.model(), family.rows(PADDED)
    case = Case(Schedule([0.5, 0.5, 0.3, 0.3]), fixed=True)  # from the first layer on, before padding has an effect

    def states(some: list[Row]) -> Any:
        with torch.no_grad(), case.apply(model):
            layers = model(**family.batch(some, padding).inputs, use_cache=True)[CACHE].layers[1:3]
        return [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]

    together = states(rows)
    for number, row in enumerate(rows):
        for batched, alone in zip(together, states([row]), strict=True):
            assert (batched is None) == (alone is None)
            if alone is not None:
                torch.testing.assert_close(batched[number], alone[0], atol=1e-5, rtol=1e-5)


# --- what ranks there


def test_attention_is_read_once_where_no_layer_attends_between_two_reductions() -> None:
    """Layers 1 and 2 carry a state: before 1, 2 and 3 the attention of layer 0 ranks."""
    model, batch, seen = QWEN.model(), QWEN.batch(QWEN.rows(PADDED)), []
    original = TextRows.read

    def read(self: TextRows, *args: Any) -> None:
        seen.append(len(seen))
        original(self, *args)

    with mock.patch.object(TextRows, "read", read), torch.no_grad(), CASE.apply(model) as handle:
        model(**batch.inputs)
        counts = [[len(row) for row in handle.kept(layer)] for layer in range(4)]
    assert seen == [0]
    assert all(max(before) > max(after) for before, after in itertools.pairwise(counts))


@pytest.mark.parametrize("rates", [[1, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.2]])
def test_attention_that_no_layer_has_paid_is_refused(rates: list[float]) -> None:
    with pytest.raises(BadInput, match=r"fall at layer [12], .* layers 0 to 1 of this model .*; begin at layer 3, or"):
        apply(LATE.model(), Schedule(rates))


def test_an_adaptive_reduction_that_reads_no_attention_is_refused() -> None:
    schedules = (Schedule([1, 1, 1, 0.5]), Schedule([1, 1, 1, 0.2]))
    adaptive = Adaptive("concentration", 1, (0.5,), schedules, (0.5, 0.5))
    with pytest.raises(BadInput, match=r"adaptive.layer is 1, .* layers 0 to 1 of this model .*; begin at layer 3"):
        apply(LATE.model(), Reduction(adaptive.mean(), adaptive=adaptive))


def test_a_staged_ranker_goes_on_by_its_first_until_a_layer_has_attended() -> None:
    model, inputs = LATE.model(), LATE.inputs(PADDED)
    staged = {"name": "staged", "first": "uniform", "then": "text-attention"}
    schedule, kept = Schedule([1, 0.6, 0.6, 0.2]), {}
    for name, ranker in (("staged", staged), ("uniform", "uniform")):
        with torch.no_grad(), apply(model, schedule, ranker=ranker) as handle:
            model(**inputs)
            kept[name] = [[row.tolist() for row in handle.kept(layer)] for layer in (1, 3)]
    assert kept["staged"][0] == kept["uniform"][0]
    assert kept["staged"][1] != kept["uniform"][1]


def test_scores_of_a_layer_that_carries_a_state_are_those_of_the_last_that_attends() -> None:
    found = layer_scores(QWEN.model(), QWEN.inputs(PADDED)).scores
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_scores_before_any_layer_attends_are_refused() -> None:
    with pytest.raises(Unsupported, match="layers 0 to 1 of this model carry a state"):
        layer_scores(LATE.model(), LATE.inputs(PADDED))


def test_the_first_layer_that_attends() -> None:
    assert [first_attending(family.model()) for family in (QWEN, LATE)] == [0, 2]
    assert get_ranker("text-attention").ranks_at_layer_0 is False


# --- caches


@pytest.mark.parametrize("family", [QWEN, LFM], ids=lambda family: family.name)
def test_a_later_turn_whose_rows_keep_different_numbers_of_tokens_is_refused(family: Family) -> None:
    """Filling behind a cached state would change it."""
    model, row = family.model(), family.rows([[3, 5]])[0]
    image = family.later_turn([1, 2])
    said = Row([words(range(20, 20 + len(image.ids)))])
    with CASE.apply(model):
        one = generate(model, family.batch([row, row]).inputs, 2)
        answers = [Row([answer(tokens)]) for tokens in one.sequences[:, -2:].tolist()]
        wholes = [row + each + turn for each, turn in zip(answers, (image, said), strict=True)]
        inputs = family.later_inputs(model, wholes, [image, said])
        with pytest.raises(Unsupported, match="rows of this later turn keep different numbers of tokens"):
            generate(model, inputs, 2, **{CACHE: one[CACHE]})


def test_a_recurrent_state_is_not_cropped() -> None:
    model, row = QWEN.model(), QWEN.rows([[3, 5]])[0]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    with CASE.apply(model):
        generate(model, QWEN.batch([row]).inputs, 1, **{CACHE: cache})
        with pytest.raises(Unsupported, match="cannot crop the cache by 2 tokens: the state of its linear attention"):
            cache.crop(-2)


def test_a_cache_of_another_schedule_is_refused_where_only_states_are_reduced() -> None:
    family = of_layers(QWEN, "full_attention", "full_attention", "full_attention", "linear_attention")
    model, row = family.model(), family.rows([[3, 5]])[0]
    inputs = family.batch([row]).inputs
    with apply(model, Schedule([1, 1, 1, 0.5])), torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    token = {"input_ids": inputs["input_ids"][:, -1:], CACHE: cache}
    with apply(model, Schedule([1, 1, 1, 0.2])), pytest.raises(BadInput, match="filled under another schedule"):
        model(**token)


def test_passes_are_not_cut_in_two() -> None:
    assert not can_share(QWEN.model())
    assert not can_share(LFM.model())


# --- what it costs, by hand

TEXT = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 10,
    "vocab_size": 7,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}


def test_linear_attention_costs_in_proportion_to_tokens() -> None:
    keys, values = 2 * 5, 4 * 6
    projections = 8 * (2 * keys + values) + 8 * values + 8 * 4 + 8 * 4 + values * 8
    state = 4 * (2 * keys + values) + 4 * 3 * 5 * 6
    parts = cost.breakdown(TEXT, n_vision=10, n_text=5)
    mlp = 2 * 15 * 3 * 8 * 10
    assert parts.per_layer[0] == 2 * 15 * (projections + state) + mlp
    assert parts.per_layer[1] == 2 * 15 * 8 * (3 * 12 + 2 * 6) + 2 * 2 * 15 * 15 * 12 + mlp  # q, its gate, o, k, v
    half = cost.breakdown(TEXT, n_vision=10, n_text=5, schedule=Schedule([0.5, 0.5]))
    assert half.per_layer[0] == parts.per_layer[0] * 10 / 15


def test_a_state_is_not_among_the_bytes_of_keys_and_values() -> None:
    assert cost.kv_bytes(TEXT, 10, 5) == 15 * 2 * 2 * 3 * 2


def test_short_convolutions_and_adjusted_mlps_by_hand() -> None:
    text = {
        **TEXT,
        "model_type": "lfm2",
        "layer_types": ["conv", "conv"],
        "conv_L_cache": 3,
        "intermediate_size": 48,
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 5,
    }
    per_token = 8 * 24 + 8 * 8 + 3 * 8 + 3 * 8 * 35  # two thirds of 48, rounded up to a multiple of 5
    assert cost.flops(text, n_vision=3, n_text=1) == 2 * 2 * 4 * per_token


def test_an_output_gate_by_hand() -> None:
    text = {**TEXT, "model_type": "lfm3", "layer_types": ["full_attention"] * 2}
    gated = {**text, "use_attention_gate": True}
    assert cost.flops(gated, n_vision=3, n_text=1) - cost.flops(text, n_vision=3, n_text=1) == 2 * 2 * 4 * 8 * 4


def test_linear_attention_of_another_kind_is_not_counted() -> None:
    text = {name: value for name, value in TEXT.items() if not name.startswith("linear_")}
    with pytest.raises(Unsupported, match="linear attention of the kind that 'other' has is not counted"):
        cost.flops({**text, "model_type": "other"}, n_vision=3, n_text=1)
