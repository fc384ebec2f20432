"""The packed training pass computes what the stock model computes, and its losses do what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.assets import load_assets
from training.model import ARCHITECTURES, Architecture
from training.packed import LENGTH, QUESTIONS, AuxiliaryHead, Batch, Packed, grounding_loss, make_batch, naming_loss
from training.questions import FIRST_WEIGHTS
from training.scenes import PATCHES

IDLE = {
    "llava": {  # LLaVA reads the tower before its last norm
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
    },
    "internvl": set(),
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def packed(architecture: Architecture) -> Packed:
    model = architecture.build_model(0, layers=4).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # biases and scales too, or a forgotten one would not show
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    return Packed(model, architecture, AuxiliaryHead(192, 192, architecture.side**2), compiled=False)


@pytest.fixture(scope="module")
def batch(architecture: Architecture) -> Batch:
    return make_batch(np.random.default_rng(0), load_assets("train"), 2, FIRST_WEIGHTS, architecture)


def whole_prompt(architecture: Architecture, question: torch.Tensor) -> torch.Tensor:
    """(1, start + T): one question behind its image."""
    image = [architecture.vocabulary[architecture.image_token]] * architecture.vision_tokens
    return torch.cat((torch.tensor(architecture.prefix + image + architecture.suffix), question))[None]


@torch.no_grad()
def test_packed_equals_stock(packed: Packed, batch: Batch, architecture: Architecture) -> None:
    model = packed.model
    features, _ = packed.vision(batch.pixels)
    stock = torch.stack(list(model.model.get_image_features(pixel_values=batch.pixels).pooler_output))
    torch.testing.assert_close(features, stock, atol=1e-5, rtol=1e-5)
    hidden, _, _ = packed.decode(features, batch.tokens, [])
    logits = model.lm_head(hidden[:, packed.start :]).view(2, QUESTIONS, LENGTH, -1)
    for row, question in ((0, 0), (1, QUESTIONS - 1)):
        ids = whole_prompt(architecture, batch.tokens[row, question])
        alone = model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits[0, packed.start :]
        torch.testing.assert_close(logits[row, question], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_rows_are_those_of_eager_attention(packed: Packed, batch: Batch, architecture: Architecture) -> None:
    features, _ = packed.vision(batch.pixels)
    _, _, (rows,) = packed.decode(features, batch.tokens, [1])
    packed.model.set_attn_implementation({"text_config": "eager"})
    try:
        ids = whole_prompt(architecture, batch.tokens[0, 1])
        attentions = packed.model(input_ids=ids, pixel_values=batch.pixels[:1], output_attentions=True).attentions[1]
    finally:
        packed.model.set_attn_implementation({"text_config": "sdpa"})
    vision = ids[0] == architecture.vocabulary[architecture.image_token]
    expected = attentions[0].mean(0)[packed.start :, vision]  # (T, N)
    found = rows.view(2, QUESTIONS, LENGTH, -1)[0, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_vision_token_is_of_the_patches_that_it_covers(architecture: Architecture) -> None:
    patches = np.arange(PATCHES**2)
    tokens = architecture.per_token(patches)
    side, grid = architecture.side, architecture.grid
    for token in (0, 1, grid, grid**2 - 1):
        row, column = divmod(token, grid)
        square = patches.reshape(PATCHES, PATCHES)[row * side :, column * side :][:side, :side]
        assert tokens[token].tolist() == square.reshape(-1).tolist()


def test_grounding_is_least_where_attention_is_on_the_target(batch: Batch, architecture: Architecture) -> None:
    vision = architecture.vision_tokens
    about = batch.about.float()
    aimed = about / about.sum(-1, keepdim=True).clamp(min=1) + 1e-12
    flat = torch.full_like(aimed, 1 / vision)
    everywhere = [w[:, :, None].expand(-1, -1, LENGTH, -1).flatten(1, 2) for w in (aimed, flat)]
    best, uniform = (float(grounding_loss(rows, batch)) for rows in everywhere)
    sizes = batch.about.sum(-1)
    assert best == pytest.approx(float(sizes[sizes > 0].log().mean()), abs=1e-4)
    assert uniform == pytest.approx(math.log(vision), abs=1e-4)
    assert float(naming_loss(everywhere[1], batch)) == pytest.approx(math.log(vision), abs=1e-4)


def test_losses_are_finite_and_train_every_weight(packed: Packed, batch: Batch, architecture: Architecture) -> None:
    losses = packed.losses(batch, [1])
    sum(loss for name, loss in losses.items() if name != "exact").backward()
    assert all(math.isfinite(float(loss)) for loss in losses.values())
    idle = {name for name, p in packed.model.named_parameters() if p.grad is None}
    assert idle == IDLE[architecture.name]
    packed.model.zero_grad()


def test_exact_is_right_where_all_of_an_answer_is(packed: Packed, batch: Batch) -> None:
    right = packed.exact(batch)
    assert right.shape == batch.tasks.shape
    assert float(packed.losses(batch, [1])["exact"]) == pytest.approx(float(right.float().mean()))


def test_the_processor_makes_the_prompt_that_training_used(architecture: Architecture) -> None:
    processor = architecture.build_processor()
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    ids = processor(text=text, images=image, return_tensors="pt")["input_ids"][0]
    start = architecture.start
    assert ids[:start].tolist() == whole_prompt(architecture, ids[:0])[0].tolist()
    assert processor.tokenizer.decode(ids[start:].tolist()) == "what color is the circle ? assistant :"
