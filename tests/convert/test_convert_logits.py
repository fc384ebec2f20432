"""Logits of converted checkpoints equal those of the original computation, for every released size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from original_checkpoints import CHECKPOINTS, IMAGE_SIZE, VISION_TOKENS, write_checkpoint
from original_internvl import original_logits
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from thinsight.convert import convert

TILES = 2


def converted(tmp_path: Path) -> InternVLForConditionalGeneration:
    out = convert(tmp_path / "original", tmp_path / "converted")
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(model) is InternVLForConditionalGeneration
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def prompt(model: Any, n_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text, two tiles, text: (seq,) int64 and (2, 3, size, size) float32."""
    generator = torch.Generator().manual_seed(1)
    image_id = model.config.image_token_id
    text = torch.randint(3, image_id - 3, (n_text,), generator=generator)
    vision = torch.full((TILES * VISION_TOKENS,), image_id)
    pixels = torch.randn((TILES, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    return torch.cat([text[:3], vision, text[3:]]), pixels


@torch.no_grad()
def assert_same_logits(model: Any, config: dict[str, Any], weights: dict[str, torch.Tensor], n_text: int = 30) -> None:
    """With and without images; the shorter prompt first, since dynamic rope remembers the longest one."""
    ids, pixels = prompt(model, n_text)
    image_id = model.config.image_token_id
    text = ids[ids != image_id]
    made = [model(input_ids=text[None]), model(input_ids=ids[None], pixel_values=pixels)]
    expected = [
        original_logits(weights, config, text, None, image_id),
        original_logits(weights, config, ids, pixels, image_id),
    ]
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one.logits[0], other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", CHECKPOINTS)
def test_every_size(size: str, tmp_path: Path) -> None:
    config, weights = write_checkpoint(tmp_path / "original", size)
    assert_same_logits(converted(tmp_path), config, weights)


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention with biases": ("InternVL2-2B", {"bias": True}, {}),
    "no grouping of heads": ("InternVL2-2B", {"num_key_value_heads": 4}, {}),
    "linear rope": ("InternVL2-2B", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
    "dynamic rope, beyond the trained length": ("InternVL2-8B", {"max_position_embeddings": 20}, {}),
    "longrope, short factors": ("InternVL2-4B", {"original_max_position_embeddings": 64}, {}),
    "plain rope": ("InternVL2-4B", {"rope_scaling": None}, {}),
    "sliding window": ("InternVL2-4B", {"sliding_window": 7, "num_key_value_heads": 2}, {}),
    "tied embeddings": ("InternVL2-1B", {"tie_word_embeddings": True}, {}),
    "vision layer before the last": ("InternVL2-40B", {}, {"select_layer": -2}),
    "vision layer by its number": ("InternVL2-1B", {}, {"select_layer": 1}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_variants(name: str, tmp_path: Path) -> None:
    size, text, top = CHANGES[name]
    config, weights = write_checkpoint(tmp_path / "original", size, text=text, top=top)
    assert_same_logits(converted(tmp_path), config, weights)


def test_judge_sees_a_wrong_grouping(tmp_path: Path) -> None:
    """Queries, keys and values swapped within wqkv must not pass."""
    config, weights = write_checkpoint(tmp_path / "original", "InternVL2-8B")
    model = converted(tmp_path)
    name = "language_model.model.layers.0.attention.wqkv.weight"
    wrong = {**weights, name: weights[name].roll(4, dims=0)}  # by one head's rows
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same_logits(model, config, wrong)


@pytest.mark.parametrize("size", ["InternVL2-2B", "InternVL2-40B"])
def test_greedy_decoding(size: str, tmp_path: Path) -> None:
    config, weights = write_checkpoint(tmp_path / "original", size)
    model = converted(tmp_path)
    ids, pixels = prompt(model, 12)
    made = model.generate(
        input_ids=ids[None], pixel_values=pixels, max_new_tokens=5, do_sample=False, eos_token_id=None
    )[0]
    for _ in range(5):
        logits = original_logits(weights, config, ids, pixels, model.config.image_token_id)
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    assert made.tolist() == ids.tolist()
