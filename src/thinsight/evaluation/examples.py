"""Sets of examples: read from whatever a user has, and checked as a whole before anything runs."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import notebook
from ..errors import BadInput, whole
from .benchmarks import taken
from .example import Example as Example
from .images import READING as READING
from .images import ImageSource as ImageSource
from .images import OpenedImages as OpenedImages
from .images import check_exists as check_exists
from .images import check_size as check_size
from .images import image_key as image_key
from .images import open_image as open_image
from .metrics import metric_for
from .readers import READERS, Reader, Source, columns_of
from .readers.base import DEFAULT, home
from .readers.choose import reader_of_source

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_DEMO_SETS = ("calibration", "test", "certification")

_HALF = re.compile(r"[\ud800-\udfff]")  # such a text breaks the report that shows it, after all the work

Progress = Callable[[str, int, int], None]


def load_examples(
    source: str | Path,
    limit: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
) -> list[Example]:
    """Read and check a set of examples; of the images, those that are taken are decoded.

    Args:
        source: "demo:calibration", "demo:test", "demo:certification", or data of a kind that one of
            `thinsight.evaluation.readers.READERS` reads: JSON lines, one object per line, ``{"id", "image" |
            "images", "question", "answer" | "answers", "metric"?}``, image paths relative to the file; VLMEvalKit's
            tables; LLaVA's conversations; VQA's questions; data of `datasets`, "hf:ID:CONFIG:SPLIT"; benchmarks, as
            "benchmark:pope" or "benchmark:pope=FILE". A reader is named as "name:path" where the file does not tell it.
            Further fields are kept in ``extra``.
        limit: use only so many: the first ones, or a random draw when ``seed`` is given (file order is kept). What
            comes behind the first ones is not read. Of benchmarks whose files are sorted by category, a fixed draw, in
            which what belongs together is there whole.
        seed: see ``limit``.
        progress: called as ``progress("images", done, total)`` while images are decoded. None: a notebook draws it.
        columns: the names that the data has for fields: ``{"image": "img", "question": "q", "answers": "a"}``.
        image_folder: what image paths are relative to; None: the file's own folder.
        annotations: the file of the answers, of data that has them in another one.

    Raises:
        ThinsightError: no such file, a bad row (with its number and column), a missing field, a duplicate id, an
            unknown metric, an image that is missing, too large or cannot be decoded, or no examples at all; or a
            package that such data needs is not installed.
    """
    if limit is not None:
        whole(limit, "limit")
    given = {"columns": columns, "image_folder": image_folder, "annotations": annotations}
    examples = read_examples(source, limit if seed is None else None, **given)
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    validate_examples(examples, str(source), progress or notebook.progress())
    return examples


def validate_examples(
    examples: Sequence[Example], source: str = "the examples", progress: Progress | None = None
) -> None:
    """Check a whole set, its images included, before long work starts."""
    check_examples(examples, source)
    check_images(examples, source, progress)


def check_examples(examples: Sequence[Example], source: str = "the examples") -> None:
    """Check all of a set that takes no decoding of images.

    Raises:
        ThinsightError: no examples, a duplicate id, an empty question or answer, no image, an image file that
            is missing, an unknown metric, or a metric that needs answers without any.
    """
    if isinstance(examples, str) or not isinstance(examples, Sequence):
        raise BadInput(f"examples is {examples!r}; pass a list of Example, such as load_examples(...) returns")
    if len(examples) == 0:
        raise BadInput(f"{source} has no examples: give at least one")
    seen: set[str] = set()
    found: set[Path] = set()
    for example in examples:
        if not isinstance(example, Example):
            raise BadInput(f"{source}: one is a {type(example).__name__}; pass thinsight.Example objects")
        if example.id in seen:
            raise BadInput(f"{source}: id {example.id!r} occurs twice: ids must be unique")
        seen.add(example.id)
        where = f"{source}: example {example.id!r}"
        if not example.question.strip():
            raise BadInput(f"{where} has an empty question: give it a text")
        if not all(answer.strip() for answer in example.answers):
            raise BadInput(f"{where} has an empty answer: leave it out where there is no label")
        task = example.extra.get("task")  # scores are listed by it
        if isinstance(task, (list, dict)) or (isinstance(task, float) and not math.isfinite(task)):
            what = task if isinstance(task, float) else f"a {type(task).__name__}"
            raise BadInput(f"{where}: task is {what}: write a text, or null")
        shown = [example.id, example.question, *example.answers, example.metric, example.group, example.task]
        for text in (*shown, *example.extra, *example.extra.values()):
            if isinstance(text, str) and _HALF.search(text):
                raise BadInput(f"{where}: {text!r} holds half of a surrogate pair: write the character itself")
        if not example.images:
            raise BadInput(f"{where} has no image: vision tokens cannot be reduced without one; give it an image")
        metric_for(example.answers, example.metric, where)
        for image in example.images:
            if isinstance(image, Path) and image not in found:
                check_exists(image, where)
                found.add(image)


def check_images(examples: Sequence[Example], source: str = "the examples", progress: Progress | None = None) -> None:
    """Decode every image file of a set that `check_examples` let pass once; what has room in memory waits there for
    its processor. ``progress("images", done, total)`` is told, in examples. Refused: an image that is truncated, no
    image, or too large; ``source`` begins the message."""
    opened = OpenedImages()
    for done, example in enumerate(examples, start=1):
        if example.opened is None:
            object.__setattr__(example, "opened", opened)
        assert example.opened is not None
        for key, image in zip(example.image_keys, example.images, strict=True):
            if isinstance(image, Path):
                example.opened.check(key, image, f"{source}: example {example.id!r}")
        if progress is not None:
            progress("images", done, len(examples))


# -- reading -------------------------------------------------------------------------------------------------


def read_examples(source: str | Path, limit: int | None = None, **reading: Any) -> list[Example]:
    """The examples of a source, at most ``limit`` of them (see `benchmarks.taken`), each row checked alone, no image
    file looked at; ``reading`` as of `load_examples`."""
    return taken(stream_examples(source, **reading), limit)


def stream_examples(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
) -> Iterator[Example]:
    """The same one by one: no more is read than is asked for."""
    reader, place = reader_of(source, columns, image_folder, annotations)
    return (row.example() for row in reader.rows(place))


def reader_of(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
) -> tuple[Reader, Source]:
    """Who reads a source, and what it is told: the reader that is named, else the one that knows the data."""
    told = os.fspath(source)
    folder, labels = (None if each is None else Path(each) for each in (image_folder, annotations))
    for name, path, there in (("image_folder", folder, Path.is_dir), ("annotations", labels, Path.is_file)):
        if path is not None and not there(home(path)):
            raise BadInput(f"{name} {str(path)!r} does not exist: give one that is there")
    place = Source(told, told, columns_of(columns or {}), folder, labels and home(labels))
    if isinstance(source, str) and told.startswith(DEMO_PREFIX):
        name = told.removeprefix(DEMO_PREFIX)
        if name not in _DEMO_SETS:
            choices = ", ".join(DEMO_PREFIX + known for known in _DEMO_SETS)
            raise BadInput(f"unknown demo data {source!r}: use {choices}")
        return READERS[DEFAULT], Source(told, str(_DEMO_FOLDER / f"{name}.jsonl"))
    return reader_of_source(place, named=isinstance(source, str))
