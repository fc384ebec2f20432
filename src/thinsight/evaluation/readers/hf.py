"""Data sets of the Hugging Face ecosystem, by the package `datasets`: a Hub id, a folder or file of parquet or arrow,
what ``save_to_disk`` wrote, a folder of images with their metadata. No code of a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import BadInput, MissingPackage, StorageError
from .base import READERS, Reader, Source, home
from .rows import Row
from .tables import Ask, Columns, row_of

_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_FOLDER = ("dataset_dict.json", "dataset_info.json", "state.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")
_AT_ONCE = 16  # rows, whose images are in memory together
_FORM = "a Hub id, a folder or a file, and then a configuration and a split: hf:ID, hf:ID:SPLIT, hf:ID:CONFIG:SPLIT"


class HuggingFace(Reader):
    """Rows of a data set; images stay as they are stored."""

    name = "hf"
    form = _FORM

    def reads(self, source: Source) -> bool:
        """A file or folder that holds such data."""
        path = source.path
        if not path.is_dir():
            return path.suffix.lower() in _FILES
        inside = [path, *sorted(each for each in path.iterdir() if each.is_dir())]
        return any(_holds_data(each) for each in inside)

    def rows(self, source: Source) -> Iterator[Row]:
        """A row for each one of the split; what is local, and no table of `datasets` yet, is read as a stream."""
        dataset = _opened(source)
        columns: Columns | None = None
        labels = _labels(dataset)
        number = 0
        for table in dataset.with_format("arrow").iter(batch_size=_AT_ONCE):
            columns = columns or Columns.among(list(table.column_names), source)
            for record in table.to_pylist():
                where = f"{source.told}, row {number}"
                for column, names in labels.items():
                    record[column] = _named(record.get(column), names)
                yield row_of(record, number, where, columns, source, Ask())
                number += 1


def _holds_data(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FOLDER) or any(
        each.suffix.lower() in _FILES for each in folder.iterdir()
    )


def _datasets(source: Source) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(
            f"data {source.told!r} needs the package datasets ({error}): pip install 'thinsight[datasets]'"
        ) from None
    return datasets


def _opened(source: Source) -> Any:
    """The split that is asked for, or the only one."""
    name, config, split = _parts(source)
    package = _datasets(source)
    path = home(name)
    try:
        found = _loaded(package, path if path.exists() else name, config, split)
    except (OSError, ConnectionError) as error:
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"data {source.told!r} cannot be found ({_first_line(error)}): {_FORM}") from None
        raise StorageError(
            f"data {source.told!r} cannot be read ({_first_line(error)}): check network and disk"
        ) from None
    except Exception as error:  # each builder of that package raises its own
        raise BadInput(f"data {source.told!r} cannot be read ({_first_line(error)}): {_FORM}") from None
    if not isinstance(found, Mapping):
        return found
    splits = list(found)
    if split is None and len(splits) > 1:
        raise BadInput(
            f"data {source.told!r} has the splits {', '.join(splits)}: name one, hf:{source.rest}:{splits[-1]}"
        )
    if split is not None and split not in found:
        raise BadInput(f"data {source.told!r} has no split {split!r}, but {', '.join(splits)}: name one of them")
    return found[split or splits[0]]


def _loaded(package: Any, place: Path | str, config: str | None, split: str | None) -> Any:
    if isinstance(place, str):  # of the Hub, whose files are kept for later runs
        return package.load_dataset(place, config, split=split)
    if place.is_file():
        return package.load_dataset(_FILES[place.suffix.lower()], data_files=[str(place)], streaming=True)
    if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return package.load_from_disk(str(place))
    return package.load_dataset(str(place), config, streaming=True)


def _parts(source: Source) -> tuple[str, str | None, str | None]:
    """Name, configuration and split; a path may hold colons."""
    if source.rest and source.path.exists():
        return source.rest, None, None
    name, *more = source.rest.split(":")
    if not name or len(more) > 2 or not all(more):
        raise BadInput(f"data is {source.told!r}: write {_FORM}")
    config, split = (None, None, *more)[-2:] if len(more) < 2 else more
    local = home(name)
    if not local.exists() and not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name):
        raise BadInput(f"data {source.told!r} does not exist: write {_FORM}")
    if local.is_file() and local.suffix.lower() not in _FILES:
        raise BadInput(f"data {source.told!r} is no file of parquet or arrow: {_FORM}")
    return name, config, split


def _labels(dataset: Any) -> dict[str, list[str]]:
    """The columns that hold numbers of names, with the names."""
    features = getattr(dataset, "features", None) or {}
    return {column: list(feature.names) for column, feature in features.items() if hasattr(feature, "int2str")}


def _named(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


READERS.register(HuggingFace())
