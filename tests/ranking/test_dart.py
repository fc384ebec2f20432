"""DART against its rule written out."""

from __future__ import annotations

import numpy as np
import pytest
from plain import cosine, plain_images, ranking

from thinsight.ranking import get_ranker
from thinsight.testing import ranking_context as context


def published(tokens, text, vision_pivots: int, text_pivots: int) -> list[int]:
    """Pivots of the largest L1 norm; each in turn takes the remaining token that is least like it."""
    by_norm = sorted(range(len(tokens)), key=lambda i: -np.abs(tokens[i]).sum())
    order = by_norm[:vision_pivots]
    words = sorted(text, key=lambda word: -np.abs(word).sum())[:text_pivots]
    pivots = [*tokens[order], *words]
    while len(order) < len(tokens):
        for pivot in pivots:
            rest = [i for i in range(len(tokens)) if i not in order]
            if rest:
                order.append(min(rest, key=lambda i: cosine(tokens[i], pivot)))
    return order


@pytest.mark.parametrize(("vision", "text"), [(4, 4), (1, 0), (0, 2), (30, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_published_order(seed: int, vision: int, text: int) -> None:
    given = context([[16], [16, 9], [1]], seed)
    scores = get_ranker({"name": "dart", "vision_pivots": vision, "text_pivots": text}).score(given)
    for image in plain_images(given):
        assert ranking(scores, image) == published(image.tokens, image.text, vision, text)


def test_the_papers_pivots_are_the_default() -> None:
    assert get_ranker("dart").to_dict() == {"name": "dart", "vision_pivots": 4, "text_pivots": 4}


def test_equal_shares_are_the_public_codes_set_where_pivots_do_not_compete() -> None:
    """One pivot: taking turns and taking all at once is the same."""
    given = context([[16]])
    scores = get_ranker({"name": "dart", "vision_pivots": 1, "text_pivots": 0}).score(given)
    (image,) = plain_images(given)
    pivot = max(range(16), key=lambda i: np.abs(image.tokens[i]).sum())
    rest = sorted(set(range(16)) - {pivot}, key=lambda i: cosine(image.tokens[i], image.tokens[pivot]))
    assert set(ranking(scores, image)[:6]) == {pivot, *rest[:5]}
