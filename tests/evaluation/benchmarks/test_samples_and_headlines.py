"""What ``--limit`` takes of a benchmark, and the one figure that a comparison shows of it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thinsight.evaluation.benchmarks import headlines, taken
from thinsight.evaluation.example import Example
from thinsight.records import decode, encode
from thinsight.report.comparison import Comparison, Run, markdown, to_csv

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


def test_where_the_first_ones_have_all_categories_they_are_taken() -> None:
    mixed = [example(number, task=f"category {number % 4}") for number in range(100)]
    assert taken(iter(mixed), 10) == mixed[:10]
    assert taken([example(number) for number in range(9)], 2) == [example(0), example(1)]


def test_a_larger_sample_holds_a_smaller_one() -> None:
    asked = [example(number, task=str(number // 100)) for number in range(300)]
    few, many = ({each.id for each in taken(asked, limit)} for limit in (20, 90))
    assert few < many


def test_what_belongs_together_is_taken_whole() -> None:
    """MMBench's rotations lie far apart in the file, MME's pairs beside each other."""
    rotated = [
        example(number + 100 * turn, "mmbench", unit=str(number), task=f"{turn} {number // 10}")
        for turn in range(4)
        for number in range(50)
    ]
    units = Counter(each.extra["unit"] for each in taken(rotated, 42))
    assert set(units.values()) == {4}
    assert len(units) == 10
    pairs = [example(number, "mme", group=f"image {number // 2}", task=str(number // 10)) for number in range(100)]
    assert set(Counter(each.group for each in taken(pairs, 31)).values()) == {2}
    assert len(taken(pairs, 31)) == 30
    assert len(taken(pairs, 1)) == 1


def test_units_that_are_left_out_stay_out_though_they_come_again() -> None:
    """A stream is sampled in one pass; the same as with all of it at hand."""
    rng = np.random.default_rng(0)
    units = enumerate(rng.integers(0, 60, 400).tolist())
    asked = [example(n, "mmbench", unit=str(unit), task=str(n // 20)) for n, unit in units]
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


def test_a_comparison_shows_the_benchmarks_own_figure_beside_the_score() -> None:
    rates, scores = (1.0, 0.5), (1.0, 0.0)
    runs = [
        Run(0.5, "fastv", "FastV", seed, rates, {"name": "uniform"}, 0.5, 2.0, 0.5, scores, figures={"POPE F1": figure})
        for seed, figure in ((0, 0.25), (1, 0.75))
    ]
    runs.append(Run(0.5, "vtw", "VTW", None, (), {}, 0, 0, 0, (), refused="too deep"))
    full = {"POPE F1": 0.875}
    found = Comparison(
        "m", "t", "h", "keep", 8, (0, 1), 1.0, 4.0, (1.0, 1.0), ("a", "b"), tuple(runs), {}, "", (), full
    )
    (table,) = found._tables()
    assert table.title.endswith("full model 100.0 %; POPE F1 87.5")
    names = [column.header for column in table.columns]
    assert [str(row[names.index("POPE F1")]) for row in table.rows] == ["50.0"]
    assert "| POPE F1 |" in markdown(found)
    head, *rows = csv.DictReader(to_csv(found).splitlines()).fieldnames, *csv.DictReader(to_csv(found).splitlines())
    assert "POPE F1" in head
    assert [row["POPE F1"] for row in rows] == ["0.25", "0.75", ""]
    assert decode(Comparison, json.loads(json.dumps(encode(found))), "here", "again") == found
