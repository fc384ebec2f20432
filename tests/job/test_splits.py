"""Calibration never touches test: splits go by image content, and shared images are found under any name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny import tiny_images

from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example
from thinsight.job.opening import check_disjoint, content_hash, split_by_image


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    result = []
    for i, image in enumerate(tiny_images(20)):
        result.append(tmp_path / f"{i}.png")
        image.save(result[-1])
    return result


def examples_of(paths: list[Path], questions: int = 3) -> list[Example]:
    return [Example(f"{p.stem}-{q}", (p,), f"question {q}") for p in paths for q in range(questions)]


def images_of(examples: list[Example]) -> set[object]:
    return {image for example in examples for image in example.images}


def test_halves_share_no_image_and_lose_nothing(paths: list[Path]) -> None:
    examples = examples_of(paths)
    calibration, test = split_by_image(examples)
    assert not images_of(calibration) & images_of(test)
    assert sorted(e.id for e in calibration + test) == sorted(e.id for e in examples)
    assert abs(len(calibration) - len(test)) <= 3


def test_the_order_of_the_file_does_not_matter(paths: list[Path]) -> None:
    examples = examples_of(paths)
    shuffled = random.Random(1).sample(examples, len(examples))
    assert {e.id for e in split_by_image(examples)[0]} == {e.id for e in split_by_image(shuffled)[0]}


def test_a_copy_under_another_name_is_the_same_image(paths: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / f"copy-{path.name}" for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    calibration, test = split_by_image(examples_of(paths, 1) + examples_of(copies, 1))
    of = {example.id for example in calibration}
    assert all((path.stem in {i[:-2] for i in of}) == (f"copy-{path.stem}" in {i[:-2] for i in of}) for path in paths)
    check_disjoint(calibration, test)
    with pytest.raises(ThinsightError, match="1 test examples show an image of the calibration set"):
        check_disjoint(examples_of(paths[:1], 1), examples_of([copies[0], paths[5]], 1))


def test_chains_of_shared_images_stay_together(paths: list[Path]) -> None:
    chain = [Example(f"pair{i}", (paths[i], paths[i + 1]), "compare") for i in range(5)]
    examples = chain + examples_of(paths[6:], 1)
    sides = split_by_image(examples)
    assert sum(any(e.id.startswith("pair") for e in side) for side in sides) == 1


def test_two_images_make_one_each(paths: list[Path]) -> None:
    calibration, test = split_by_image(examples_of(paths[:2]))
    assert (len(calibration), len(test)) == (3, 3)


def test_one_image_cannot_be_split(paths: list[Path]) -> None:
    with pytest.raises(ThinsightError, match="--test-data"):
        split_by_image(examples_of(paths[:1]))


def test_content_hash_sees_pixels_questions_and_answers(paths: list[Path]) -> None:
    base = [Example("a", (paths[0],), "what ?", ("red",))]
    assert content_hash(base) == content_hash([Example("a", (paths[0],), "what ?", ("red",))])
    for other in (
        Example("a", (paths[1],), "what ?", ("red",)),
        Example("a", (paths[0],), "where ?", ("red",)),
        Example("a", (paths[0],), "what ?", ("blue",)),
    ):
        assert content_hash([other]) != content_hash(base)
