"""What a benchmark is, the registry that knows all of them by name, and what is measured of a set that holds some."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np

from ...registry import Registry
from ..example import Example
from ..readers.rows import Row
from .measures import Measure, Measured, Vector

Fields = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A set of questions as the literature asks and scores it.

    Attributes:
        name: by which it is asked for.
        title: as it is written.
        paper: its source.
        hub: where its questions are on the Hub, as data is named; "" where a file has to be named.
        metric: how one answer is scored; the mean of it is what a search sees.
        fields: ``fields(row)`` turns a row's fields into those of the question as it is asked. Beside our names they
            hold "options", "hint", "task" and whatever columns the data has.
        measures: what is reported; the first one is the headline.
        max_new_tokens: longest answer.
        prefers: names of columns that are taken before the usual ones, by field.
        together: what is never split between two sets, beside an image; its text names a unit.
        sampled: what is in a sample whole or not at all; None: what is ``together``, else single questions.
        expand: ``expand(row)`` makes more questions of one, where the data has not got them all.
    """

    name: str
    title: str
    paper: str
    hub: str
    metric: str
    fields: Callable[[Fields], Fields]
    measures: tuple[Measure, ...]
    max_new_tokens: int = 16
    prefers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    together: Callable[[Example], Hashable] | None = None
    expand: Callable[[Row], list[Row]] | None = None
    sampled: Callable[[Example], Hashable] | None = None

    def asked(self, row: Row, several: bool) -> Row:
        """A row of its data as it is asked; among ``several`` benchmarks their names are the tasks."""
        given = _plural(row.fields)
        found = {**given, "metric": self.metric, **self.fields(given), "benchmark": self.name}
        if several:
            found["category"], found["task"] = found.get("task"), self.name
        for spent in ("options", "hint"):
            found.pop(spent, None)
        return replace(row, fields=found)


def _plural(fields: Mapping[str, Any]) -> Fields:
    """Fields with images and answers as lists, however the data has them."""
    given = dict(fields)
    for one, many in (("image", "images"), ("answer", "answers")):
        single = given.pop(one, None)
        if given.get(many) is None:
            given[many] = None if single is None else [single]
    return given


BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark", "thinsight.benchmarks", builtin=("thinsight.evaluation.benchmarks.twelve",), code=attrgetter("title")
)


def benchmark_of(example: Example) -> Benchmark | None:
    """The benchmark that an example belongs to."""
    name = example.extra.get("benchmark")
    return BENCHMARKS[name] if isinstance(name, str) and name in BENCHMARKS else None


def taken(examples: Iterable[Example], limit: int | None) -> list[Example]:
    """At most ``limit`` of them in their order: the first ones, and no more is read. Of benchmarks whose first ones
    lack categories that come later in the file, as many as fit of whole units (`Benchmark.sampled`) that a hash of
    their names picks, the same ones in every run; for that all of the file is read."""
    stream = iter(examples)
    if limit is None:
        return list(stream)
    first = list(islice(stream, limit))
    if not first or benchmark_of(first[0]) is None:
        return first
    there = {_category(example) for example in first}
    later: set[Hashable] = set()

    def noted() -> Iterator[Example]:
        for example in stream:
            later.add(_category(example))
            yield example

    sample = _sample(chain(first, noted()), limit)
    return first if later <= there else sample


def _category(example: Example) -> Hashable:
    return example.extra.get("benchmark"), str(example.extra.get("category", example.task))


def _sample(examples: Iterable[Example], limit: int) -> list[Example]:
    """Units by their hash, the least ones first, held while they can be among those taken."""
    units: dict[bytes, list[tuple[int, Example]]] = {}
    greatest: list[tuple[int, bytes]] = []  # a heap of the units held, by falling hash
    number, bound = 0, b"\xff" * 9
    for place, example in enumerate(examples):
        key = _unit_key(example)
        if key >= bound:
            continue
        if key not in units:
            heapq.heappush(greatest, (-int.from_bytes(key, "big"), key))
        units.setdefault(key, []).append((place, example))
        number += 1
        while number - len(units[greatest[0][1]]) >= limit:  # without the last one there are enough
            bound = heapq.heappop(greatest)[1]
            number -= len(units.pop(bound))
    found: list[tuple[int, Example]] = []
    for key in sorted(units):
        if len(found) + len(units[key]) <= limit:
            found += units[key]
    found = found or units[min(units)][:limit]  # a unit is more than the limit
    return [example for _, example in sorted(found, key=itemgetter(0))]


def _unit_key(example: Example) -> bytes:
    benchmark = benchmark_of(example)
    unit = None if benchmark is None else benchmark.sampled or benchmark.together
    named = example.id if unit is None else unit(example)
    told = f"thinsight sample {benchmark and benchmark.name} {named}"
    return hashlib.sha256(told.encode(errors="surrogatepass")).digest()[:8]


def longest_answer(examples: Sequence[Example]) -> int | None:
    """The longest answer that their benchmarks allow; None where one belongs to none."""
    found = [benchmark_of(example) for example in examples]
    known = [each.max_new_tokens for each in found if each is not None]
    return max(known) if known and len(known) == len(found) else None


def headlines(examples: Sequence[Example], scores: Vector) -> dict[str, float]:
    """The first measure of every benchmark in a set, from scores (examples,), by name, such as "POPE F1"; nothing where
    it is the plain mean of all scores."""
    found = {}
    for name, at in _places(examples).items():
        own, measure = [examples[place] for place in at], BENCHMARKS[name].measures[0]
        parts = measure.count(own, scores[at]).parts
        plain = measure.mean and len(parts) == len(examples) and np.array_equal(parts[:, 0], scores)
        if len(parts) and not plain:
            found[f"{BENCHMARKS[name].title} {measure.name}"] = measure.of(own, scores[at])
    return found


def _places(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Where each benchmark's questions are in a set."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if (benchmark := benchmark_of(example)) is not None:
            places.setdefault(benchmark.name, []).append(place)
    return places


def measured(examples: Sequence[Example], full: Vector, reduced: Vector) -> tuple[Measured, ...]:
    """Every measure of every benchmark in a set, from full and reduced scores, (examples,) each."""
    found = []
    for name, at in _places(examples).items():
        own = [examples[place] for place in at]
        for measure in BENCHMARKS[name].measures:
            before, after = (measure.of(own, scores[at]) for scores in (full, reduced))
            if math.isnan(before) or math.isnan(after):
                continue  # the set has none of what it is about
            units = len(measure.count(own, full[at]).parts)
            title = BENCHMARKS[name].title
            found.append(Measured(title, measure.name, units, before, after, measure.drop(own, full[at], reduced[at])))
    return tuple(found)
