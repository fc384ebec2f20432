"""CDPruner against the determinants that it maximises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from plain import cosine, plain_images, ranking

from thinsight.ranking import get_ranker
from thinsight.testing import ranking_context as context


def published(tokens, text, sign: float = 1.0) -> list[int]:
    """Greedy maximisation of the kernel's log-determinant, each determinant computed anew."""
    n = len(tokens)
    relevance = np.array([sign * np.mean([cosine(token, word) for word in text]) for token in tokens])
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min()) if n > 1 else [1]
    kernel = np.array(
        [[relevance[i] * cosine(tokens[i], tokens[j]) * relevance[j] for j in range(n)] for i in range(n)]
    )
    order: list[int] = []
    while len(order) < n:
        rest = [i for i in range(n) if i not in order]
        order.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*order, i], [*order, i])])))
    return order


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_greedy_order(seed: int, invert: bool) -> None:
    given = context([[9], [10, 8], [1]], seed)  # fewer tokens than hidden dimensions: all add volume
    scores = get_ranker({"name": "cdpruner", "invert": invert}).score(given)
    for image in plain_images(given):
        assert ranking(scores, image) == published(image.tokens, image.text, -1.0 if invert else 1.0)


def test_more_tokens_than_dimensions_go_on_by_relevance() -> None:
    given = context([[16]])
    flat = given.states.clone()
    flat[..., 3:] = 0  # three dimensions: three tokens fill the volume
    given = dataclasses.replace(given, states=flat)
    scores = get_ranker("cdpruner").score(given)
    (image,) = plain_images(given)
    order = ranking(scores, image)
    assert order[:3] == published(image.tokens, image.text)[:3]
    relevance = [np.mean([cosine(token, word) for word in image.text]) for token in image.tokens]
    assert order[3:] == sorted(order[3:], key=lambda token: -relevance[token])


def test_equal_tokens_are_ranked_without_nan() -> None:
    given = context([[16]])
    same = dataclasses.replace(given, states=torch.ones_like(given.states))
    scores = get_ranker("cdpruner").score(same)
    assert sorted(scores[0].tolist()) == [-float(turn) for turn in range(15, -1, -1)]
