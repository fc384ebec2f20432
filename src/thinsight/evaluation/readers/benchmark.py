"""Benchmarks as data: ``benchmark:textvqa,pope*2=pope.parquet``, each with its weight and where its questions are.

Their questions come in turn, so many of each as its weight says, until one has no more: the mean over them is the
weighted mean of the benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...errors import BadInput
from ..benchmarks.base import BENCHMARKS, Benchmark
from .base import READERS, Reader, Source
from .choose import reader_of_source
from .rows import Row

_FORM = "NAME, NAME=DATA or NAME*WEIGHT=DATA, several with commas"
_PART = re.compile(r"\s*([\w-]+)\s*(?:\*\s*([\d.]+)\s*)?(?:=(.*))?", re.DOTALL)
_NEXT = re.compile(r",(?=\s*[\w-]+\s*(?:\*\s*[\d.]+\s*)?(?:=|,|$))")  # a path may hold commas


@dataclass(frozen=True)
class Part:
    """A benchmark, how much of it there is to be, and where its questions are."""

    benchmark: Benchmark
    weight: float
    data: str


def parts_of(told: str) -> list[Part]:
    """What was asked for, checked: known names, each once, good weights, and data where none has a place of its own."""
    found: dict[str, Part] = {}
    for text in _NEXT.split(told):
        match = _PART.fullmatch(text)
        if match is None:
            raise BadInput(f"benchmark is {told!r}: write {_FORM}")
        benchmark = BENCHMARKS[match[1]]
        try:
            weight = 1.0 if match[2] is None else float(match[2])
        except ValueError:
            weight = 0.0
        if not 0 < weight <= 1000 or benchmark.name in found:
            raise BadInput(f"benchmark is {told!r}: name each once, with a weight above 0 and up to 1000")
        data = benchmark.hub if match[3] is None else match[3].strip()
        if not data:
            raise BadInput(f"benchmark {benchmark.name!r} has no place of its own: name its data, {match[1]}=FILE")
        found[benchmark.name] = Part(benchmark, weight, data)
    return list(found.values())


class Benchmarks(Reader):
    """Questions of one benchmark, or of several in turn."""

    name = "benchmark"
    form = _FORM

    def reads(self, source: Source) -> bool:
        """Never: a benchmark is named."""
        return False

    def rows(self, source: Source) -> Iterator[Row]:
        """The rows as they are asked."""
        parts = parts_of(source.rest)
        several = len(parts) > 1
        if several and (source.columns or source.annotations):
            raise BadInput("columns and annotations are of one benchmark's data: name one benchmark, or leave them out")
        streams = [_asked(part, source, several) for part in parts]
        given = [0.0] * len(parts)
        while True:
            # the one that lags behind its weight most
            turn = min(range(len(parts)), key=lambda i: (given[i] / parts[i].weight, i))
            row = next(streams[turn], None)
            if row is None:
                return
            given[turn] += 1
            yield row


def _asked(part: Part, source: Source, several: bool) -> Iterator[Row]:
    """A benchmark's rows as they are asked, each under an id of its own."""
    benchmark = part.benchmark
    place = replace(source, told=part.data, rest=part.data, plain=True, prefers=benchmark.prefers)
    reader, inner = reader_of_source(place)
    expand = benchmark.expand
    if expand is not None and any(_is_expanded(row) for row in reader.rows(inner)):
        expand = None  # the data has all of them
    seen: dict[str, int] = {}
    for row in reader.rows(inner):
        for each in [row] if expand is None else expand(row):
            asked = benchmark.asked(each, several)
            told = str(asked.fields.get("id"))
            seen[told] = seen.get(told, 0) + 1
            known_as = told if seen[told] == 1 else f"{told}#{seen[told]}"
            identity = f"{benchmark.name}/{known_as}" if several else known_as
            yield replace(asked, fields={**asked.fields, "id": identity})


def _is_expanded(row: Row) -> bool:
    return str(row.fields.get("id", "")).isdigit() and int(row.fields["id"]) >= 10**6


READERS.register(Benchmarks())
