"""DivPrune against its rule written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plain import cosine, plain_images, ranking

from thinsight.ranking import get_ranker
from thinsight.testing import ranking_context as context


def published(tokens) -> list[int]:
    """Greedy max-min over cosine distances."""
    distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
    everyone = range(len(tokens))
    order: list[int] = []
    while len(order) < len(tokens):
        rest = [i for i in everyone if i not in order]
        others = order or everyone
        if len(tokens) == 1:
            return [0]
        order.append(max(rest, key=lambda i: min(distance[i][j] for j in others if j != i)))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_greedy_order(seed: int) -> None:
    given = context([[16], [16, 9], [1]], seed)
    scores = get_ranker("divprune").score(given)
    for image in plain_images(given):
        assert ranking(scores, image) == published(image.tokens)


def test_equal_tokens_are_taken_last() -> None:
    given = context([[16]])
    states = given.states.clone()
    states[0, 8:] = states[0, 3] * torch.arange(1, 9)[:, None]  # the same direction
    scores = get_ranker("divprune").score(dataclasses.replace(given, states=states))[0]
    best = scores.topk(8).indices.tolist()
    assert len({3 if token > 7 else token for token in best}) == 8
