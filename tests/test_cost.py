"""The cost formulas against sums written out by hand, against torch's own counter, and against the paper's
figure."""

from __future__ import annotations

import pytest

from thinsight import cost
from thinsight.errors import ThinsightError
from thinsight.schedule import Schedule

TEXT = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 10,
    "vocab_size": 7,
}
LLAVA_7B = {
    "text_config": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
}


def by_hand(tokens: int) -> float:
    projections = 2 * tokens * (8 * 12 + 8 * 6 + 8 * 6 + 12 * 8)
    attention = 2 * 2 * tokens * tokens * 4 * 3
    mlp = 2 * tokens * 3 * 8 * 10
    return projections + attention + mlp


def test_flops_by_hand() -> None:
    assert cost.flops(TEXT, n_vision=10, n_text=5) == 3 * by_hand(15)


def test_each_layer_counts_its_inputs() -> None:
    schedule = Schedule([1.0, 0.41, 0.0])  # ceil(4.1) = 5 vision tokens in layer 1
    expected = by_hand(15) + by_hand(10) + by_hand(5)
    assert cost.flops(TEXT, n_vision=10, n_text=5, schedule=schedule) == expected


def test_full_schedule_costs_what_no_schedule_costs() -> None:
    full = cost.flops(TEXT, n_vision=10, n_text=5, schedule=Schedule.full(3))
    assert full == cost.flops(TEXT, n_vision=10, n_text=5)


def test_breakdown_adds_up_and_keeps_the_head_apart() -> None:
    schedule = Schedule([1.0, 0.5, 0.2])
    parts = cost.breakdown(TEXT, n_vision=10, n_text=5, schedule=schedule)
    total = cost.flops(TEXT, n_vision=10, n_text=5, schedule=schedule)
    assert parts.total == pytest.approx(total)
    assert sum(parts.per_layer) == pytest.approx(total)
    assert parts.lm_head == 2 * 8 * 7


def test_ungated_mlp_has_two_matrices() -> None:
    gated = cost.breakdown(TEXT, n_vision=4, n_text=4).mlp
    ungated = cost.breakdown({**TEXT, "model_type": "opt"}, n_vision=4, n_text=4).mlp
    assert ungated == pytest.approx(gated * 2 / 3)


def test_agrees_with_the_counter_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=11,
        attn_implementation="eager",
    )
    model = LlamaModel(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(inputs_embeds=torch.zeros(1, 9, 32))
    rope = 2 * 8 // 2 * 9  # one outer product of frequencies and positions for the whole model
    assert counter.get_total_flops() == pytest.approx(cost.flops(config, n_vision=6, n_text=3), abs=2 * rope)


def test_llava_7b_comes_to_the_papers_figures() -> None:
    """9.18 TFLOPs full, 5.49 with FastV at 50 % and 3.95 under G-Search's schedule, in one text length."""
    n_text = 108
    full = cost.flops(LLAVA_7B, n_vision=576, n_text=n_text)
    assert full / 1e12 == pytest.approx(9.18, rel=0.02)
    fastv = cost.flops(LLAVA_7B, n_vision=576, n_text=n_text, schedule=Schedule.step(32, 2, 0.5))
    assert fastv / 1e12 == pytest.approx(5.49, rel=0.04)


def test_kv_bytes() -> None:
    assert cost.kv_bytes(TEXT, 10, 5, None, 4) == 3 * 15 * 2 * 2 * 3 * 4
    assert cost.kv_bytes(TEXT, 10, 5, Schedule([1.0, 0.5, 0.0]), 2) == (15 + 10 + 5) * 2 * 2 * 3 * 2


def test_vision_flops_of_clip_large() -> None:
    """CLIP ViT-L/14 at 336 px is known to take about 0.38 TFLOPs (191 GMACs); the projector adds 0.024."""
    one = cost.vision_flops(LLAVA_7B)
    assert one / 1e12 == pytest.approx(0.385, rel=0.08)
    assert cost.vision_flops(LLAVA_7B, 3) == 3 * one


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (TEXT, {"n_vision": -1, "n_text": 3}, "must not be negative"),
        (TEXT, {"n_vision": 4, "n_text": 3, "schedule": Schedule.full(5)}, r"resample\(3\)"),
        ({**TEXT, "hidden_size": None}, {"n_vision": 4, "n_text": 3}, "hidden_size"),
        ({**TEXT, "num_local_experts": 8}, {"n_vision": 4, "n_text": 3}, "experts"),
    ],
)
def test_bad_input_is_one_line(config: dict, arguments: dict, words: str) -> None:
    with pytest.raises(ThinsightError, match=words) as caught:
        cost.flops(config, **arguments)
    assert "\n" not in str(caught.value)


def test_vision_flops_needs_a_vision_config() -> None:
    with pytest.raises(ThinsightError, match="vision_config"):
        cost.vision_flops(TEXT)
