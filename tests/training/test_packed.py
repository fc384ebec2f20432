"""The packed training pass computes what the stock model computes, and its losses do what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.assets import load_assets
from training.model import IMAGE, build_model, build_processor
from training.packed import (
    LENGTH,
    PREFIX,
    QUESTIONS,
    START,
    VISION,
    AuxiliaryHead,
    Batch,
    Packed,
    grounding_loss,
    make_batch,
    naming_loss,
)
from training.questions import FIRST_WEIGHTS


@pytest.fixture(scope="module")
def packed() -> Packed:
    return Packed(build_model(0, layers=4).eval(), AuxiliaryHead(192, 192), compiled=False)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(np.random.default_rng(0), load_assets("train"), 2, FIRST_WEIGHTS)


@torch.no_grad()
def test_packed_equals_stock(packed: Packed, batch: Batch) -> None:
    model = packed.model
    features, _ = packed.vision(batch.pixels)
    stock = torch.stack(list(model.model.get_image_features(pixel_values=batch.pixels).pooler_output))
    torch.testing.assert_close(features, stock, atol=1e-5, rtol=1e-5)
    hidden, _, _ = packed.decode(features, batch.tokens, [])
    logits = model.lm_head(hidden[:, START:]).view(2, QUESTIONS, LENGTH, -1)
    for row, question in ((0, 0), (1, QUESTIONS - 1)):
        ids = torch.cat((torch.tensor(PREFIX + [IMAGE] * VISION), batch.tokens[row, question]))[None]
        alone = model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits[0, START:]
        torch.testing.assert_close(logits[row, question], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_rows_are_those_of_eager_attention(packed: Packed, batch: Batch) -> None:
    features, _ = packed.vision(batch.pixels)
    _, _, (rows,) = packed.decode(features, batch.tokens, [1])
    packed.model.set_attn_implementation({"text_config": "eager"})
    try:
        ids = torch.cat((torch.tensor(PREFIX + [IMAGE] * VISION), batch.tokens[0, 1]))[None]
        attentions = packed.model(
            input_ids=ids, pixel_values=batch.pixels[:1], output_attentions=True
        ).attentions[1]
    finally:
        packed.model.set_attn_implementation({"text_config": "sdpa"})
    expected = attentions[0].mean(0)[START:, len(PREFIX) : START]  # (T, 256)
    torch.testing.assert_close(rows.view(2, QUESTIONS, LENGTH, VISION)[0, 1], expected, atol=1e-5, rtol=1e-4)


def test_grounding_is_least_where_attention_is_on_the_target(batch: Batch) -> None:
    about = batch.about.float()
    aimed = about / about.sum(-1, keepdim=True).clamp(min=1) + 1e-12
    flat = torch.full_like(aimed, 1 / VISION)
    everywhere = [w[:, :, None].expand(-1, -1, LENGTH, -1).flatten(1, 2) for w in (aimed, flat)]
    best, uniform = (float(grounding_loss(rows, batch)) for rows in everywhere)
    sizes = batch.about.sum(-1)
    assert best == pytest.approx(float(sizes[sizes > 0].log().mean()), abs=1e-4)
    assert uniform == pytest.approx(math.log(VISION), abs=1e-4)
    assert float(naming_loss(everywhere[1], batch)) == pytest.approx(math.log(VISION), abs=1e-4)


def test_losses_are_finite_and_train_every_weight(packed: Packed, batch: Batch) -> None:
    losses = packed.losses(batch, [1])
    sum(loss for name, loss in losses.items() if name != "exact").backward()
    assert all(math.isfinite(float(loss)) for loss in losses.values())
    idle = {name for name, p in packed.model.named_parameters() if p.grad is None}
    assert idle == {
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
    }, "LLaVA reads the tower before its last norm"
    packed.model.zero_grad()


def test_the_processor_makes_the_prompt_that_training_used() -> None:
    processor = build_processor()
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    ids = processor(text=text, images=image, return_tensors="pt")["input_ids"][0].tolist()
    assert ids[:START] == PREFIX + [IMAGE] * VISION
    assert processor.tokenizer.decode(ids[START:]) == "what color is the circle ? assistant :"
