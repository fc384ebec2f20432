"""A context's images as plain numpy, for slow transcriptions of published rules.

Knows nothing about rankers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from thinsight.ranking import Context

__all__ = ["PlainImage", "cosine", "plain_images", "ranking"]


class PlainImage(NamedTuple):
    row: int
    places: list[int]  # columns of the context
    size: int  # N
    tokens: np.ndarray  # (n, hidden)
    text: np.ndarray  # (queries, hidden), real ones
    received: np.ndarray  # (n,)


def plain_images(given: Context) -> Iterator[PlainImage]:
    for row in range(given.valid.shape[0]):
        text = given.text_states[row][given.queries[row]].double().numpy()
        for image in sorted({int(i) for i, v in zip(given.image[row], given.valid[row], strict=True) if v}):
            places = [
                place
                for place in range(given.valid.shape[1])
                if given.valid[row, place] and given.image[row, place] == image
            ]
            yield PlainImage(
                row,
                places,
                int(given.size[row, places[0]]),
                given.states[row, places].double().numpy(),
                text,
                given.vision_attention[row, places].double().numpy(),
            )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def ranking(scores, image: PlainImage) -> list[int]:
    """An image's tokens, best first, by their numbers 0..n-1."""
    values = scores[image.row, image.places].tolist()
    return sorted(range(len(values)), key=lambda token: -values[token])
