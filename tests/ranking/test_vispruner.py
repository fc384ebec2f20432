"""VisPruner against its rule written out."""

from __future__ import annotations

import math

import pytest
from plain import cosine, plain_images, ranking

from thinsight.ranking import get_ranker
from thinsight.testing import ranking_context as context


def published(image, keep: float, important: float) -> set[int]:
    """The tokens that are kept, T = keep * N of them."""
    wanted = min(math.ceil(keep * image.size - 1e-9), len(image.places))
    by_attention = sorted(range(len(image.places)), key=lambda i: -image.received[i])
    first = by_attention[: int(wanted * important + 1e-9)]
    rest = by_attention[len(first) :]
    diverse = wanted - len(first)
    while len(rest) > max(1, diverse):
        even, odd = rest[::2], rest[1::2]
        duplicate = {i: max(cosine(image.tokens[i], image.tokens[j]) for j in odd) for i in even}
        even.sort(key=lambda i: -duplicate[i])
        rest = [*even[min(8, len(rest) - diverse) :], *odd]
    return {*first, *(rest if diverse else [])}


@pytest.mark.parametrize(("keep", "important"), [(0.25, 0.5), (0.1, 0.5), (0.9, 0.5), (0.3, 0.0), (0.3, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_published_set_is_kept(seed: int, keep: float, important: float) -> None:
    given = context([[64], [49, 16], [1]], seed)
    scores = get_ranker({"name": "vispruner", "keep": keep, "important": important}).score(given)
    for image in plain_images(given):
        kept = published(image, keep, important)
        assert set(ranking(scores, image)[: len(kept)]) == kept
        assert len(kept) == min(math.ceil(keep * image.size - 1e-9), len(image.places))


def test_important_tokens_come_first() -> None:
    given = context([[64]])
    scores = get_ranker({"name": "vispruner", "keep": 0.5}).score(given)
    (image,) = plain_images(given)
    assert ranking(scores, image)[:16] == sorted(range(64), key=lambda i: -image.received[i])[:16]


def test_half_is_important_by_default() -> None:
    assert get_ranker("vispruner").to_dict()["important"] == 0.5
