"""VisionZip against its rule written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain import cosine, plain_images, ranking

from thinsight.ranking import choose, get_ranker
from thinsight.testing import ranking_context as context


def published(image, keep: float) -> dict[int, np.ndarray]:
    """What each token that is kept holds."""
    wanted = min(math.ceil(keep * image.size - 1e-9), len(image.places))
    contextual = int(wanted * 10 / 64 + 0.5)
    by_attention = sorted(range(len(image.places)), key=lambda i: -image.received[i])
    dominant = by_attention[: wanted - contextual]
    rest = [i for i in range(len(image.places)) if i not in dominant]
    step = max(1, len(rest) // max(1, contextual))
    targets = rest[::step][:contextual]
    groups = {target: [image.tokens[target]] for target in targets}
    for i in rest:
        if targets and i not in targets:
            nearest = max(targets, key=lambda t: cosine(image.tokens[i], image.tokens[t]))
            groups[nearest].append(image.tokens[i])
    held = {i: image.tokens[i] for i in dominant}
    return {**held, **{target: np.mean(members, axis=0) for target, members in groups.items()}}


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_published_tokens_hold_the_published_means(seed: int, keep: float) -> None:
    given = context([[64], [49, 16], [1]], seed)
    ranker = get_ranker({"name": "visionzip", "keep": keep})
    scores = ranker.score(given)
    count = torch.tensor([[math.ceil(keep * n - 1e-9) for n in row] for row in given.size.tolist()])
    kept = choose(scores, given.valid, given.image, count)
    merged = ranker.merge(given, kept)
    merged = given.states if merged is None else merged
    for image in plain_images(given):
        wanted = published(image, keep)
        assert set(ranking(scores, image)[: len(wanted)]) == set(wanted)
        for token, held in wanted.items():
            assert kept[image.row, image.places[token]]
            found = merged[image.row, image.places[token]].numpy()
            np.testing.assert_allclose(found, held, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_the_papers_shares(tokens: int, contextual: int) -> None:
    """54 + 10, 108 + 20 and 162 + 30 tokens."""
    given = context([[576]])
    ranker = get_ranker({"name": "visionzip", "keep": tokens / 576})
    (image,) = plain_images(given)
    kept = ranking(ranker.score(given), image)[:tokens]
    by_attention = sorted(range(576), key=lambda i: -image.received[i])
    assert kept[: tokens - contextual] == by_attention[: tokens - contextual]
    mask = torch.zeros(1, 576, dtype=torch.bool)
    mask[0, kept] = True
    changed = (ranker.merge(given, mask) != given.states).any(dim=2)[0] & mask[0]
    assert int(changed.sum()) <= contextual
    assert not changed[kept[: tokens - contextual]].any()
