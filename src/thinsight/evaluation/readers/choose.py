"""Who reads what: the reader that is named, else the one that knows the data."""

from __future__ import annotations

from dataclasses import replace

from .base import DEFAULT, READERS, Reader, Source


def reader_of_source(source: Source, named: bool = True) -> tuple[Reader, Source]:
    """The reader, and the source without its name in front, where one may be ``named`` there."""
    name, colon, rest = source.rest.partition(":")
    if named and colon and name in READERS:
        return READERS[name], replace(source, rest=rest)
    readers: list[Reader] = [reader for reader in READERS.values() if reader.name != DEFAULT]
    known = source.path.exists()
    return next((reader for reader in readers if known and reader.reads(source)), READERS[DEFAULT]), source
