"""What ``--limit`` takes of a benchmark, and the one figure that a comparison shows of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thinsight.evaluation.benchmarks import headlines, taken
from thinsight.evaluation.example import Example

IMAGE = Image.new("RGB", (4, 4))


def example(number: int, benchmark: str | None = "pope", group: str = "", **extra: Any) -> Example:
    named = {} if benchmark is None else {"benchmark": benchmark}
    return Example(str(number), (IMAGE,), "?", ("yes",), group=group or str(number), extra={**named, **extra})


def test_of_other_data_the_first_are_taken_and_no_more_is_read() -> None:
    read = []

    def stream() -> Iterator[Example]:
        for number in range(10):
            read.append(number)
            yield example(number, None)

    assert [each.id for each in taken(stream(), 3)] == ["0", "1", "2"]
    assert read == [0, 1, 2]
    assert len(taken(stream(), None)) == 10
    assert taken([], 3) == []


def test_of_a_benchmark_every_category_is_there_in_the_order_of_the_file() -> None:
    sorted_ = [example(number, task=f"category {number // 100}") for number in range(1000)]
    found = taken(iter(sorted_), 200)
    numbers = [int(each.id) for each in found]
    assert len(numbers) == 200
    assert numbers == sorted(numbers)
    by_category = Counter(each.task for each in found)
    assert len(by_category) == 10
    assert min(by_category.values()) >= 8
    assert [each.id for each in taken(iter(sorted_), 200)] == [each.id for each in found]
    assert taken(sorted_, 5000) == sorted_


def test_a_larger_sample_holds_a_smaller_one() -> None:
    asked = [example(number) for number in range(300)]
    few, many = ({each.id for each in taken(asked, limit)} for limit in (20, 90))
    assert few < many


def test_what_belongs_together_is_taken_whole() -> None:
    """MMBench's rotations lie far apart in the file, MME's pairs beside each other."""
    rotated = [example(number + 100 * turn, "mmbench", unit=str(number)) for turn in range(4) for number in range(50)]
    units = Counter(each.extra["unit"] for each in taken(rotated, 42))
    assert set(units.values()) == {4}
    assert len(units) == 10
    pairs = [example(number, "mme", group=f"image {number // 2}", task="color") for number in range(100)]
    assert set(Counter(each.group for each in taken(pairs, 31)).values()) == {2}
    assert len(taken(pairs, 31)) == 30
    assert len(taken(pairs, 1)) == 1


def test_units_that_are_left_out_stay_out_though_they_come_again() -> None:
    """A stream is sampled in one pass; the same as with all of it at hand."""
    rng = np.random.default_rng(0)
    asked = [example(n, "mmbench", unit=str(unit)) for n, unit in enumerate(rng.integers(0, 60, 400).tolist())]
    sizes = Counter(each.extra["unit"] for each in asked)
    for limit in (10, 50, 133):
        found = Counter(each.extra["unit"] for each in taken(asked, limit))
        assert sum(found.values()) <= limit
        assert all(sizes[unit] == number for unit, number in found.items())


def test_the_headline_is_the_benchmarks_own_measure() -> None:
    asked = [
        Example(str(n), (IMAGE,), "?", (label,), extra={"benchmark": "pope"}) for n, label in enumerate(("yes", "no"))
    ]
    assert headlines(asked, np.array([1.0, 0.0])) == {"POPE F1": pytest.approx(2 / 3)}


def test_a_plain_mean_is_not_said_twice() -> None:
    asked = [example(number, "gqa") for number in range(4)]
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    assert headlines(asked, scores) == {}
    assert headlines([*asked, example(9, None)], np.array([*scores, 0.0])) == {"GQA accuracy": 0.75}
    assert headlines([example(1, None)], np.ones(1)) == {}
