"""Starts a model from the embedded LLaVA demo model: its vision tower, and its decoder.

A Qwen2 with zero biases computes what a Llama does; layers that the new decoder has more are put in between
with zero output, so at first they change nothing. An InternViT with `quick_gelu` computes what a CLIP tower
does but for the norm before its first layer, which is replaced by the closest linear map. The projector is
turned so that the decoder is given what it knows. Knows nothing about training; a recipe says whether this is
done (`start_from`), and the card repeats it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from training.assets import Assets
from training.make_data import DEMO
from training.model import ARCHITECTURES, Architecture
from training.packed import normalise
from training.scenes import draw_scene

ALIGNING_SCENES, ALIGNING_SEED = 64, 11


def load_donor() -> PreTrainedModel:
    """The embedded LLaVA demo model in float32."""
    return LlavaForConditionalGeneration.from_pretrained(DEMO / "model", dtype=torch.float32)


def source_layers(layers: int, donors: int) -> list[int | None]:
    """Which of the donor's layers each new one copies; None: one that is put in between, evenly spread."""
    extra = layers - donors
    if extra < 0:
        raise ValueError(f"layers is {layers}, fewer than the donor's {donors}")
    between = {round((i + 1) * layers / (extra + 1)) for i in range(extra)}
    copied = iter(range(donors))
    return [None if i in between else next(copied) for i in range(layers)]


@torch.no_grad()
def transplant(model: PreTrainedModel, architecture: Architecture, donor: PreTrainedModel) -> None:
    """Copy the donor's decoder, word embeddings and output head into ``model``, in place.

    Special tokens that the donor does not have keep their random embeddings.
    """
    text, other = model.model.language_model, donor.model.language_model
    for layer, source in zip(text.layers, source_layers(len(text.layers), len(other.layers)), strict=True):
        if source is not None:
            missing, unexpected = layer.load_state_dict(other.layers[source].state_dict(), strict=False)
            assert not unexpected, unexpected
            assert all(name.endswith("proj.bias") for name in missing), missing
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            if projection.bias is not None:
                projection.bias.zero_()
    text.norm.load_state_dict(other.norm.state_dict())
    theirs = ARCHITECTURES["llava"].vocabulary
    shared = [(i, theirs[word]) for word, i in architecture.vocabulary.items() if word in theirs]
    ours, of_donor = (list(ids) for ids in zip(*shared, strict=True))
    text.embed_tokens.weight[ours] = other.embed_tokens.weight[of_donor]
    model.lm_head.weight[ours] = donor.lm_head.weight[of_donor]


@torch.no_grad()
def transplant_tower(
    model: PreTrainedModel, architecture: Architecture, donor: PreTrainedModel, assets: Assets
) -> float:
    """Copy the donor's CLIP tower into an InternViT of its size, in place; returns the share of variance of
    the donor's normed embeddings that the linear map put in their norm's place explains.
    """
    ours, theirs = model.model.vision_tower, donor.model.vision_tower
    for layer, source in zip(ours.encoder.layer, theirs.encoder.layers, strict=True):
        layer.attention.load_state_dict(
            {
                f"{new}.{part}": getattr(getattr(source.self_attn, old), part)
                for new, old in _PROJECTIONS.items()
                for part in ("weight", "bias")
            }
        )
        layer.layernorm_before.load_state_dict(source.layer_norm1.state_dict())
        layer.layernorm_after.load_state_dict(source.layer_norm2.state_dict())
        layer.mlp.load_state_dict(source.mlp.state_dict())
        layer.lambda_1.fill_(1.0)
        layer.lambda_2.fill_(1.0)
    return _copy_embeddings(ours.embeddings, theirs, _scenes(assets), architecture)


_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "projection_layer": "out_proj"}


def _copy_embeddings(ours: nn.Module, theirs: nn.Module, pixels: np.ndarray, into: Architecture) -> float:
    """Patch and position embeddings that come closest (least squares) to the donor's after its first norm."""
    donor = ARCHITECTURES["llava"]
    convolution, places = theirs.embeddings.patch_embedding, theirs.embeddings.position_embedding.weight
    patches = convolution(normalise(pixels, donor)).flatten(2).transpose(1, 2)  # (B, P, width)
    normed = theirs.pre_layrnorm(patches + places[1:])
    means = patches.mean(0), normed.mean(0)  # (P, width)
    solution = torch.linalg.lstsq(
        (patches - means[0]).flatten(0, 1), (normed - means[1]).flatten(0, 1)
    ).solution  # (width, width)
    # the towers are given one image normalised in two ways
    mean, std = (torch.tensor(values) for values in (donor.mean, donor.std))
    our_mean, our_std = (torch.tensor(values) for values in (into.mean, into.std))
    kernel = torch.einsum("oi,ichw->ochw", solution.T, convolution.weight)
    shift = (kernel * ((our_mean - mean) / std).view(1, 3, 1, 1)).sum((1, 2, 3))
    ours.patch_embeddings.projection.weight.copy_(kernel * (our_std / std).view(1, 3, 1, 1))
    ours.patch_embeddings.projection.bias.copy_(shift)
    ours.position_embeddings[0, 1:] = means[1] - means[0] @ solution
    ours.position_embeddings[0, 0] = 0
    ours.cls_token.copy_(theirs.pre_layrnorm(theirs.embeddings.class_embedding + places[0]).view_as(ours.cls_token))
    left = normed - means[1] - (patches - means[0]) @ solution
    return 1 - float(left.var((0, 1)).sum() / (normed - means[1]).var((0, 1)).sum())


def _scenes(assets: Assets) -> np.ndarray:
    """(B, 224, 224, 3) uint8: what linear maps are fitted on."""
    rng = np.random.default_rng(ALIGNING_SEED)
    return np.stack([draw_scene(rng, assets).pixels for _ in range(ALIGNING_SCENES)])


@torch.no_grad()
def align(model: PreTrainedModel, architecture: Architecture, donor: PreTrainedModel, assets: Assets) -> float:
    """Turn the projector's last layer, in place, by the linear map that brings its features closest (least
    squares) to the donor's, averaged over the patches of a token; returns the share of variance explained.
    """
    pixels = _scenes(assets)
    ours = _features(model, normalise(pixels, architecture)).flatten(0, 1)
    patches = _features(donor, normalise(pixels, ARCHITECTURES["llava"])).transpose(1, 2)
    theirs = torch.from_numpy(architecture.per_token(patches.numpy())).mean(-1).transpose(1, 2).flatten(0, 1)
    ones = torch.ones(len(ours), 1)
    solution = torch.linalg.lstsq(torch.cat((ours, ones), 1), theirs).solution  # (width + 1, width)
    turn, shift = solution[:-1].T, solution[-1]
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ last.bias + shift)
    left = theirs - ours @ turn.T - shift
    return 1 - float(left.var(0).sum() / theirs.var(0).sum())


def _features(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """(B, N, width): what the projector makes of the images."""
    return torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
