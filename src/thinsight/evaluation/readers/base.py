"""What a reader is, what it is given, and the registry that knows all of them by name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...errors import BadInput
from ...registry import Registry
from .rows import Row

FIELDS = ("id", "image", "question", "answers", "options", "hint", "metric", "task")
"""What `--columns` may say where to find."""

_ALSO = {"images": "image", "answer": "answers"}


def home(path: str | os.PathLike[str]) -> Path:
    """A path with its ``~`` replaced, where there is such a user."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True)
class Source:
    """Where data is, and what a user says about it.

    Attributes:
        told: as the user wrote it, which messages repeat.
        rest: the same without the reader's name in front.
        columns: the user's own names for fields of `FIELDS`.
        image_folder: what image paths are relative to; None: the file's own folder.
        annotations: the file of the answers, where it is another one.
        plain: whether a question is to stay without its hint and options, which are then fields of their own.
        prefers: names of columns that are taken before the usual ones, by field.
    """

    told: str
    rest: str
    columns: Mapping[str, str] = field(default_factory=dict)
    image_folder: Path | None = None
    annotations: Path | None = None
    plain: bool = False
    prefers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """What was written, as a path."""
        return home(self.rest)

    @property
    def folder(self) -> Path:
        """What image paths are relative to."""
        return self.path.parent if self.image_folder is None else home(self.image_folder)

    def head(self, size: int = 65536) -> str:
        """The beginning of the file, what is no UTF-8 in it replaced; "" where there is no file."""
        if not self.path.is_file():
            return ""
        with self.path.open("rb") as file:
            return file.read(size).decode("utf-8-sig", "replace")

    def check_file(self) -> Path:
        """The file's path; a folder, or what is not there, is refused."""
        if self.path.is_dir():
            raise BadInput(f"data {self.told!r} is a folder: give the file in it")
        if not self.path.is_file():
            raise BadInput(f"data {self.told!r} does not exist: give a file that is there")
        return self.path


class Reader(ABC):
    """One kind of data. `thinsight.testing.ReaderContract` holds a reader to what is said here.

    Attributes:
        name: by which it is asked for: ``name:path``.
        form: what its data looks like, in one line.
    """

    name: ClassVar[str]
    form: ClassVar[str]

    @abstractmethod
    def reads(self, source: Source) -> bool:
        """Whether the data is of this kind, by its name and how it begins; asked where no reader is named."""

    @abstractmethod
    def rows(self, source: Source) -> Iterator[Row]:
        """The questions in their order, one at a time: no more of the data is read than is asked for, and as much of
        it again when it is asked for again.

        Raises:
            ThinsightError: data that cannot be read, or a row that is none, with its place.
        """


DEFAULT = "jsonl"
READERS: Registry[Any] = Registry(
    "reader",
    "thinsight.readers",
    builtin=tuple(
        f"thinsight.evaluation.readers.{each}" for each in ("jsonl", "tsv", "llava", "vqa", "hf", "lmms", "benchmark")
    ),
    code=type,
)


def columns_of(told: Mapping[str, str]) -> dict[str, str]:
    """The user's names for fields, checked; "images" and "answer" are the fields "image" and "answers" too."""
    found: dict[str, str] = {}
    for name, column in told.items():
        ours = _ALSO.get(name, name)
        if ours not in FIELDS:
            raise BadInput(f"columns names the field {name!r}: choose among {', '.join(FIELDS)}")
        if ours in found or not isinstance(column, str) or not column:
            raise BadInput(f"columns has {name!r} as {column!r}: name one column for each field")
        found[ours] = column
    return found
