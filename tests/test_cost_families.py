"""FLOPs of every family's decoder and vision encoder: torch's own counter, and sums by hand."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import Family, decoder_of
from conformance.inputs import BOS
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from thinsight import cost
from thinsight.errors import ThinsightError
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import apply, encode_images, vision_token_mask
from thinsight.runtime.cache import fresh_cache
from thinsight.schedule import Schedule

HELD = [family for family in FAMILIES.values() if family.model_type in ROWS]
TEXT = {
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 10,
    "vocab_size": 7,
}
SLIDING = {
    **TEXT,
    "model_type": "gemma3_text",
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
MIXTURE = {
    **TEXT,
    "model_type": "glm4v_moe_text",
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
}


def delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False, **options):
    """Gated DeltaNet as decoding computes it (arXiv 2412.06464, equation 10), one token after the other: stock prefill
    takes 64 at once, filled up, and torch would count that."""
    heads, length = value.shape[2], value.shape[1]
    query, key = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (query, key))
    query, key = (each * (each.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for each in (query, key))
    query = query * query.shape[-1] ** -0.5
    query, key, value = (each.transpose(1, 2).flatten(0, 1)[:, :, None] for each in (query, key, value))
    decay, written = (each.transpose(1, 2).flatten(0, 1)[:, :, None, None] for each in (g.exp(), beta))
    state = value.new_zeros(len(value), key.shape[-1], value.shape[-1])
    out = torch.zeros_like(value)
    for place in range(length):
        state = state * decay[:, place]
        missing = value[:, place] - torch.bmm(key[:, place], state)
        state = state + torch.bmm(key[:, place].transpose(1, 2), written[:, place] * missing)
        out[:, place] = torch.bmm(query[:, place], state)
    whole = out[:, :, 0].unflatten(0, (-1, heads)).transpose(1, 2)
    return whole, state.unflatten(0, (-1, heads)) if output_final_state else None


@pytest.fixture
def one_by_one(monkeypatch):
    """Linear attention runs token by token, and gives what the stock model gives."""
    family = FAMILIES["qwen3.5"]
    inputs = family.inputs([[3, 5]])
    with torch.no_grad():
        stock = family.model()(**inputs).logits
        for module in (modeling_qwen3_5, modeling_qwen3_5_moe):
            monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", delta_rule)
        torch.testing.assert_close(family.model()(**inputs).logits, stock, atol=1e-4, rtol=1e-4)


def behind_the_end(model):
    """What convolutions compute behind the last token, and throw away."""
    found = [each for each in model.get_decoder().modules() if isinstance(each, torch.nn.Conv1d)]
    return sum(2 * each.weight.numel() * (each.kernel_size[0] - 1) for each in found)


def counted(run: object) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


@pytest.mark.usefixtures("one_by_one")
@for_each(HELD)
def test_the_decoder_agrees_with_the_counter_of_torch(family: Family) -> None:
    """Torch counts full squares where a mask hides something, and what a rotary table takes."""
    model = family.build("eager")
    model.set_experts_implementation("eager")  # the fused one is not in torch's list
    length = 9  # no longer than the window of the families that have one
    ids = torch.tensor([[BOS, *range(20, 20 + length - 1)]])
    last = {"logits_to_keep": 1} if family.keys_of else {}  # what `generate` asks of layers that read another's keys
    if family.types is not None and family.types.also:  # vision tokens have experts of their own
        last = {family.types.also: torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]])}
    measured = counted(lambda: decoder_of(model)(input_ids=ids, **last)) - behind_the_end(model)
    rotary = 2 * length * 3 * 64  # frequencies x positions, at most three axes, once
    assert measured == pytest.approx(cost.flops(model.config, n_vision=4, n_text=length - 4), abs=rotary)


@for_each(HELD)
def test_the_cache_takes_what_stock_transformers_caches(family: Family) -> None:
    """Of latent attention too, which caches no heads."""
    model = family.model("eager")
    ids = torch.tensor([[BOS, *range(20, 28)]])
    with torch.no_grad():
        cache = decoder_of(model)(input_ids=ids, use_cache=True, **fresh_cache(model)).past_key_values
    # a state is not counted, and layers that read another's keys have none
    attending = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in attending)
    assert taken == cost.kv_bytes(model.config, 4, 5, None, 4)


WINDOWED = ("sliding_window", "attention_chunk_size")
WINDOWLESS = [family for family in HELD if not any(family.config["text_config"].get(name) for name in WINDOWED)]


@pytest.mark.usefixtures("one_by_one")
@for_each(WINDOWLESS)
def test_a_reduced_prefill_agrees_with_the_counter_of_torch(family: Family) -> None:
    """What a schedule saves is what the model no longer computes; ranking evenly computes nothing."""
    model = family.model("eager")
    model.set_experts_implementation("eager")
    inputs = family.inputs([[3, 5]])
    encoded = encode_images(model, inputs)
    inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    length = inputs["input_ids"].shape[1]
    n_vision = int(vision_token_mask(model, inputs["input_ids"]).sum())
    schedule = Schedule([1, 2 / 3, 1 / 3, 0])  # whole tokens of tiles of 9, where each tile has its own share
    with apply(model, Reduction(schedule, "uniform")):
        measured = counted(lambda: model(**inputs, **encoded.model_inputs(), logits_to_keep=1)) - behind_the_end(model)
    parts = cost.breakdown(model.config, n_vision=n_vision, n_text=length - n_vision, schedule=schedule)
    rotary = 2 * length * 3 * 64
    # VideoLLaMA 3, MiniCPM-V and Qwen-Omni have no such argument, and their heads read every position
    heads = 1 if "logits_to_keep" in inspect.signature(model.forward).parameters else length
    assert measured == pytest.approx(parts.total + heads * parts.lm_head, abs=rotary)
    assert parts.total < cost.flops(model.config, n_vision=n_vision, n_text=length - n_vision) - 2 * rotary


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_costs_the_same_tied_or_not(tied: bool) -> None:
    family = FAMILIES["internvl-qwen2"]
    text = {**family.config["text_config"], "tie_word_embeddings": tied}
    config = {**family.config, "text_config": text, "tie_word_embeddings": tied}
    model = replace(family, config=config).build("eager")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.tensor([[BOS, *range(20, 28)]])
    whole = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    decoder = counted(lambda: decoder_of(model)(input_ids=ids))
    assert whole - decoder == cost.breakdown(model.config, n_vision=4, n_text=5).lm_head


UNTOLD = {
    "llava-next": "cuts padding away",
    "llava-next-video": "cuts padding away",
    "llava-onevision": "cuts padding away",
    "idefics2": "projector of 'idefics2' is not known",
    "aria": "projector of 'aria' is not known",
    "molmo2": "projector of 'molmo2' is not known",
    "granite4-vision": "cuts padding away",
    "perception-lm": "projector of 'perception_lm' is not known",
    "fast-vlm": "projector of 'fast_vlm' is not known",
    "gemma3n": "projector of 'gemma3n' is not known",
    **{family.name: "projector of .* is not known" for family in HELD if family.name.startswith(("lfm", "minicpm"))},
    "step3.7": "has tiles of another size than its overview",
    "hunyuan-vl": "adds tokens at the ends of lines",
    "deepseek-ocr2": "projector of 'deepseek_ocr2' is not known",
}


@for_each(family for family in HELD if family.name not in UNTOLD)
def test_the_vision_encoder_agrees_with_the_counter_of_torch(family: Family) -> None:
    model, row = family.build("eager"), family.rows([[1, 1]])[0]
    inputs = {k: v for k, v in family.batch([row]).inputs.items() if "pixel" in k or "image" in k}

    def encode() -> None:
        features = model.base_model.get_image_features(**inputs, return_dict=True)
        if features.pooler_output is None:  # Llama 4 projects later
            model.multi_modal_projector(features.last_hidden_state)

    measured = counted(encode)
    expected = cost.vision_flops(model.config, n_vision=len(row.vision))
    assert measured == pytest.approx(expected, rel=0.005)


def test_images_of_any_size_see_only_themselves() -> None:
    """Two images of 16 tokens cost less than one of 32, and as much as torch counts."""
    family = FAMILIES["glm4v"]
    model = family.build("eager")
    one = cost.vision_flops(model.config, n_vision=16)
    assert cost.vision_flops(model.config, 2, n_vision=32) == pytest.approx(2 * one)
    assert cost.vision_flops(model.config, n_vision=32) > 2 * one


def test_fixed_images_count_by_images_or_by_tokens() -> None:
    config = FAMILIES["internvl-qwen2"].model().config
    assert cost.vision_flops(config, n_vision=27) == pytest.approx(cost.vision_flops(config, 3))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [("qwen2-vl", {}, "say n_vision"), *((name, {"n_vision": 30}, words) for name, words in UNTOLD.items())],
)
def test_what_cannot_be_told_is_refused(name: str, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ThinsightError, match=words):
        cost.vision_flops(FAMILIES[name].model().config, **arguments)


def test_an_unknown_projector_is_refused() -> None:
    config = {**FAMILIES["llava"].model().config.to_dict(), "model_type": "new_family"}
    with pytest.raises(ThinsightError, match="'new_family' is not known"):
        cost.vision_flops(config)


# --- by hand


def by_hand(tokens: int, seen: int, mlp: float) -> float:
    projections = 2 * tokens * (8 * 12 + 8 * 6 + 8 * 6 + 12 * 8)
    return projections + 2 * 2 * tokens * seen * 4 * 3 + mlp


def test_a_sliding_window_bounds_what_is_seen() -> None:
    mlp = 2 * 15 * 3 * 8 * 10
    expected = 2 * by_hand(15, 6, mlp) + 2 * by_hand(15, 15, mlp)
    assert cost.flops(SLIDING, n_vision=10, n_text=5) == expected
    short = 2 * 4 * 3 * 8 * 10
    assert cost.flops(SLIDING, n_vision=2, n_text=2) == 4 * by_hand(4, 4, short)


def test_a_sliding_window_bounds_what_is_cached() -> None:
    per_token = 2 * 2 * 3 * 4
    assert cost.kv_bytes(SLIDING, 10, 5, None, 4) == (5 + 15 + 5 + 15) * per_token
    fewer = Schedule([1.0, 1.0, 0.0, 0.0])
    assert cost.kv_bytes(SLIDING, 10, 5, fewer, 4) == (5 + 15 + 5 + 5) * per_token


def test_a_window_that_is_switched_off_is_none() -> None:
    full = cost.flops(TEXT, n_vision=10, n_text=5)
    assert cost.flops({**SLIDING, "use_sliding_window": False}, n_vision=10, n_text=5) == full
    assert cost.flops({**SLIDING, "sliding_window": None}, n_vision=10, n_text=5) == full


def test_windows_by_pattern() -> None:
    patterned = {**SLIDING, "layer_types": None, "sliding_window_pattern": 2}
    assert cost.flops(patterned, n_vision=10, n_text=5) == cost.flops(SLIDING, n_vision=10, n_text=5)


def test_experts_count_what_a_token_runs_through() -> None:
    dense = 2 * 15 * 3 * 8 * 10
    mixture = 2 * 15 * 8 * 5 + 3 * (2 * 15 * 3 * 8 * 6)  # the router; two routed and one shared expert
    expected = by_hand(15, 15, dense) + 3 * by_hand(15, 15, mixture)
    assert cost.flops(MIXTURE, n_vision=10, n_text=5) == expected
    parts = cost.breakdown(MIXTURE, n_vision=10, n_text=5)
    assert parts.total == pytest.approx(expected)
    assert parts.mlp == dense + 3 * mixture


def test_latent_attention_counts_its_ranks_and_caches_its_latent() -> None:
    latent = {"kv_lora_rank": 5, "q_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
    keys, rest = 5 * 4 * (3 + 4), 8 * (5 + 2) + 4 * 4 * 8  # made of the latent; the latent, and the output
    square, mlp = 2 * 15 * 15 * 4 * (3 + 2 + 4), 2 * 15 * 3 * 8 * 10
    for asked, rank in ((6 * 8 + 6 * 4 * 5, 6), (8 * 4 * 5, None)):
        config = {**TEXT, **latent, "q_lora_rank": rank}
        expected = 4 * (2 * 15 * (asked + keys + rest) + square + mlp)
        assert cost.flops(config, n_vision=10, n_text=5) == expected
        assert cost.kv_bytes(config, 10, 5, None, 4) == 4 * 15 * (5 + 2) * 4


def test_experts_as_wide_as_the_config_says() -> None:
    """Aria's shared experts are a number of such, MiniMax-M3's have a width of their own, as have its dense layers."""
    routed, router = 2 * (2 * 15 * 3 * 8 * 10), 2 * 15 * 8 * 5
    aria = {"model_type": "aria_text", "moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 3}
    shared = 3 * (2 * 15 * 3 * 8 * 10)
    expected = 4 * by_hand(15, 15, router + routed + shared)
    assert cost.flops({**TEXT, **aria}, n_vision=10, n_text=5) == expected
    minimax = {
        "model_type": "minimax_m3_vl_text",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "dense_intermediate_size": 9,
        "shared_intermediate_size": 7,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }
    dense = by_hand(15, 15, 2 * 15 * 3 * 8 * 9)
    expected = dense + 3 * by_hand(15, 15, router + routed + 2 * 15 * 3 * 8 * 7)
    assert cost.flops({**TEXT, **minimax}, n_vision=10, n_text=5) == expected


def test_vision_tokens_with_experts_of_their_own() -> None:
    """ERNIE 4.5 VL: ten vision tokens through narrower experts, five others, shared experts for all."""
    ernie = {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [6, 4],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }
    routed = 2 * (2 * 5 * 3 * 8 * 6) + 2 * (2 * 10 * 3 * 8 * 4)
    experts = 2 * 15 * 8 * 5 + routed + 2 * 15 * 3 * 8 * 6
    expected = by_hand(15, 15, 2 * 15 * 3 * 8 * 10) + 3 * by_hand(15, 15, experts)
    assert cost.flops({**TEXT, **ernie}, n_vision=10, n_text=5) == expected


def test_a_gate_of_attention_is_one_matrix_more() -> None:
    plain = cost.flops(TEXT, n_vision=10, n_text=5)
    gated = cost.flops({**TEXT, "model_type": "muse_glimmer_text"}, n_vision=10, n_text=5)
    assert gated - plain == 4 * 2 * 15 * 8 * 12


def test_experts_without_sizes_are_refused() -> None:
    with pytest.raises(ThinsightError, match="num_local_experts=8 experts of a kind that is not counted"):
        cost.flops({**TEXT, "num_local_experts": 8}, n_vision=4, n_text=3)
