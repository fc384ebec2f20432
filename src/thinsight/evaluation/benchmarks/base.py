"""What a benchmark is, the registry that knows all of them by name, and what is measured of a set that holds some."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

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


def longest_answer(examples: Sequence[Example]) -> int | None:
    """The longest answer that their benchmarks allow; None where one belongs to none."""
    found = [benchmark_of(example) for example in examples]
    known = [each.max_new_tokens for each in found if each is not None]
    return max(known) if known and len(known) == len(found) else None


def measured(examples: Sequence[Example], full: Vector, reduced: Vector) -> tuple[Measured, ...]:
    """Every measure of every benchmark in a set, from full and reduced scores, (examples,) each."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if (benchmark := benchmark_of(example)) is not None:
            places.setdefault(benchmark.name, []).append(place)
    found = []
    for name, at in places.items():
        own = [examples[place] for place in at]
        for measure in BENCHMARKS[name].measures:
            before, after = (measure.of(own, scores[at]) for scores in (full, reduced))
            if math.isnan(before) or math.isnan(after):
                continue  # the set has none of what it is about
            units = len(measure.count(own, full[at]).parts)
            title = BENCHMARKS[name].title
            found.append(Measured(title, measure.name, units, before, after, measure.drop(own, full[at], reduced[at])))
    return tuple(found)
