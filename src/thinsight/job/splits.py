"""Keeps calibration and test apart: splits a set of examples by image, and finds images that two sets share.

Knows examples and their images. Knows nothing about models, scores or searches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput, StorageError
from ..evaluation.examples import Example

__all__ = ["check_disjoint", "content_hash", "split_by_image"]


def split_by_image(examples: Sequence[Example], share: float = 0.5) -> tuple[list[Example], list[Example]]:
    """(calibration, test), in file order; examples that share an image, directly or through others, stay
    together.

    Deterministic: which side a group goes to depends on the contents of its images alone, not on the order of
    the file or on a seed. About ``share`` of the examples become calibration.

    Raises:
        ThinsightError: all examples hang together by their images, so that nothing is left for the test.
    """
    members = _connected(examples)
    if len(members) < 2:
        raise BadInput(
            "all examples share one image, so they cannot be split in calibration and test: give --test-data"
        )
    order = sorted(members.values(), key=lambda group: _group_hash(examples, group))
    calibration: set[int] = set(order[0])
    for group in order[1:-1]:  # the last group is always test
        if len(calibration) + len(group) / 2 <= share * len(examples):
            calibration.update(group)
    first = [example for i, example in enumerate(examples) if i in calibration]
    return first, [example for i, example in enumerate(examples) if i not in calibration]


def check_disjoint(calibration: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse a test set that shows an image of the calibration set, also as a copy under another name.

    Raises:
        ThinsightError: naming the first such test example and how many there are.
    """
    seen = {key for example in calibration for key in _image_hashes(example)}
    shared = [example.id for example in test if seen & set(_image_hashes(example))]
    if shared:
        raise BadInput(
            f"{len(shared)} test examples show an image of the calibration set, the first is {shared[0]!r}: "
            "a score on them would flatter the search; take them out of one of the sets"
        )


def content_hash(examples: Sequence[Example]) -> str:
    """Hash of a set: its questions, answers and metrics and the contents of its images, in order; 16 hex
    digits."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (example.id, example.question, example.answers, example.metric, _image_hashes(example))
        digest.update(repr(fields).encode())
    return digest.hexdigest()[:16]


def _connected(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Indices of the examples by connected component, two being connected when they share an image."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, example in enumerate(examples):
        for key in _image_hashes(example):
            parent[root(i)] = root(first_with.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(examples)):
        members.setdefault(root(i), []).append(i)
    return members


def _group_hash(examples: Sequence[Example], group: Sequence[int]) -> str:
    keys = sorted({key for i in group for key in _image_hashes(examples[i])})
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _image_hashes(example: Example) -> tuple[str, ...]:
    """One hash per image, of the file's bytes (or the pixels of an image in memory)."""
    return tuple(
        _file_hash(image) if isinstance(image, Path) else key
        for image, key in zip(example.images, example.image_keys, strict=True)
    )


_known: dict[tuple[str, int, int], str] = {}


def _file_hash(path: Path) -> str:
    """Hash of a file's bytes; each file is read once per process as long as it does not change."""
    try:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in _known:
            _known[key] = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise StorageError(f"cannot read image {path}: {error.strerror or error}; check the file") from None
    return _known[key]
