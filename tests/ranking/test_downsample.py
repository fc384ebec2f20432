"""Downsampling: each kept token is the mean of the cell of the grid around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain import plain_images

from thinsight.ranking import choose, get_ranker
from thinsight.testing import ranking_context as context


def cells(side: int, kept: list[int]) -> dict[int, list[int]]:
    """The tokens of a side x side grid that are nearest to each kept one."""
    found: dict[int, list[int]] = {token: [] for token in kept}
    for token in range(side * side):
        far = {k: (token // side - k // side) ** 2 + (token % side - k % side) ** 2 for k in sorted(kept)}
        found[min(far, key=far.__getitem__)].append(token)
    return found


@pytest.mark.parametrize("rate", [0.0, 0.0625, 0.25, 0.5, 1.0])
def test_each_token_is_the_mean_of_its_cell(rate: float) -> None:
    given = context([[64], [49, 16]])
    ranker = get_ranker("downsample")
    scores = ranker.score(given)
    assert torch.equal(scores, get_ranker("uniform").score(given))
    kept = choose(scores, given.valid, given.image, (given.size * rate).ceil().long())
    merged = ranker.merge(given, kept)
    for image in plain_images(given):
        chosen = [token for token, place in enumerate(image.places) if kept[image.row, place]]
        for token, cell in cells(int(image.size**0.5), chosen).items() if chosen else ():
            found = merged[image.row, image.places[token]].numpy()
            np.testing.assert_allclose(found, image.tokens[cell].mean(axis=0), rtol=1e-5, atol=1e-5)


def test_a_constant_image_stays_constant_and_a_ramp_keeps_its_slope() -> None:
    given = context([[64]])
    states = torch.ones_like(given.states)
    states[0, :, 1] = torch.arange(64) % 8  # the column
    given = type(given)(**{**vars(given), "states": states})
    ranker = get_ranker("downsample")
    kept = choose(ranker.score(given), given.valid, given.image, given.size // 4)
    merged = ranker.merge(given, kept)[kept]  # (16, hidden)
    assert torch.equal(merged[:, 0], torch.ones(16))
    column = torch.arange(64)[kept[0]] % 8
    assert float((merged[:, 1] - column).abs().max()) <= 1.5


def test_tokens_that_were_dropped_before_are_not_averaged() -> None:
    whole = context([[64]])
    left = torch.arange(64)[None] % 2 == 0
    states = whole.states.masked_fill(~left[..., None], 1e6)
    given = type(whole)(**{**vars(whole), "valid": left, "states": states})
    ranker = get_ranker("downsample")
    kept = choose(ranker.score(given), left, given.image, given.size // 8)
    assert float(ranker.merge(given, kept)[kept].abs().max()) < 10
