"""A decoder started from another computes what that one computed, whatever layers were put in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.assets import load_assets
from training.model import ARCHITECTURES
from training.packed import normalise
from training.transplant import source_layers, transplant, transplant_tower


def test_layers_between_are_spread() -> None:
    assert source_layers(14, 12) == [0, 1, 2, 3, 4, None, 5, 6, 7, None, 8, 9, 10, 11]
    assert source_layers(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="fewer than the donor's 3"):
        source_layers(2, 3)


@torch.no_grad()
def test_the_decoder_is_the_donors() -> None:
    llava, internvl = ARCHITECTURES["llava"], ARCHITECTURES["internvl"]
    donor, model = llava.build_model(1, layers=3).eval(), internvl.build_model(2, layers=5).eval()
    for parameter in donor.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    for parameter in model.parameters():
        parameter.add_(0.1)  # stale biases must go
    transplant(model, internvl, donor)
    text = ["user", ":", "how", "many", "red", "shapes", "are", "there", "?", "assistant", ":"]
    ours, theirs = (torch.tensor([[a.vocabulary[word] for word in text]]) for a in (internvl, llava))
    logits, expected = model(input_ids=ours).logits, donor(input_ids=theirs).logits
    red, its_red = internvl.vocabulary["red"], llava.vocabulary["red"]
    torch.testing.assert_close(logits[..., red:], expected[..., its_red:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_tower_is_the_donors_but_for_its_first_norm() -> None:
    """With a donor whose first norm divides by nearly the same everywhere, features are the donor's too."""
    llava, internvl = ARCHITECTURES["llava"], ARCHITECTURES["internvl"]
    donor, model = llava.build_model(1, layers=1).eval(), internvl.build_model(2, layers=1).eval()
    draw = torch.Generator().manual_seed(3)
    for parameter in donor.model.vision_tower.encoder.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    places = donor.model.vision_tower.embeddings.position_embedding.weight
    places.copy_(8 * torch.randn(places.shape, generator=draw))  # they decide what the norm divides by
    assert transplant_tower(model, internvl, donor, load_assets("calibration")) > 0.95
    picture = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    ours = model.model.vision_tower(normalise(picture, internvl)).last_hidden_state
    theirs = donor.model.vision_tower(normalise(picture, llava)).last_hidden_state
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
