"""Examples: an image (or several), a question and the answers that count as right; and the JSON-lines files
they come in.

A file is checked as a whole before anything runs. Knows nothing about models, prompts or scores.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadInput
from ..texts import brief
from .images import ImageSource, OpenedImages, check_exists, image_key
from .metrics import get_metric

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_DEMO_SETS = ("calibration", "test", "certification")
_FIELDS = ("id", "image", "images", "question", "answer", "answers", "metric")
_FORMAT = '{"id", "image" or "images", "question", "answer" or "answers", "metric" (optional)}'

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Example:
    """One question about one or more images.

    Attributes:
        id: unique in its set.
        images: paths or PIL images, in the order in which the prompt shows them.
        question: the text. ``<image>``, or ``<image 1>``, ``<image 2>`` ..., or the model's own image token
            stand where an image belongs, one for each; without any, images come first.
        answers: the texts that count as right; empty where there are no labels (metric "agreement").
        metric: name of this example's own metric, or None.
        group: what examples about the same image share; a confidence interval resamples groups. Made from the
            images when left empty.
        extra: any further fields of the line, such as "task".
        opened: image files that were decoded when the set was checked, for whoever processes them.
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    metric: str | None = None
    group: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    opened: OpenedImages | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, (tuple, list)):
            raise BadInput(f"example {self.id!r}: images must be a tuple of paths or PIL images")
        object.__setattr__(
            self, "images", tuple(Path(image) if isinstance(image, str) else image for image in self.images)
        )
        if isinstance(self.answers, str):
            raise BadInput(f"example {self.id!r}: answers is a text; pass a tuple of texts, ({self.answers!r},)")
        object.__setattr__(self, "answers", tuple(self.answers or ()))
        for name, texts in (("question", (self.question,)), ("answers", self.answers)):
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise BadInput(f"example {self.id!r}: {name} holds {wrong[0]!r}; it must be a text")
        if not self.group:
            names = (
                image.as_posix() if isinstance(image, Path) else image_key(image, self._where) for image in self.images
            )
            object.__setattr__(self, "group", "+".join(names))

    def __repr__(self) -> str:
        images = "1 image" if len(self.images) == 1 else f"{len(self.images)} images"
        question, answers = (brief(repr(each), 100) for each in (self.question, self.answers))
        return f"Example({brief(repr(self.id), 60)}, {images}, {question}, answers={answers})"

    @property
    def task(self) -> str | None:
        """The line's "task" field, if it has one."""
        task = self.extra.get("task")
        return None if task is None else str(task)

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """One key per image; two images with one key are the same image."""
        return tuple(image_key(image, self._where) for image in self.images)

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, in their order; see `images.open_image`.

        Raises:
            ThinsightError: one is missing, truncated or too large.
        """
        opened = self.opened or OpenedImages()
        sources = dict(zip(self.image_keys, self.images, strict=True))
        found = {key: opened.take(key, image, self._where) for key, image in sources.items()}
        return [found[key] for key in self.image_keys]

    @property
    def _where(self) -> str:
        return f"example {self.id!r}"


def load_examples(
    source: str | Path, limit: int | None = None, seed: int | None = None, progress: Progress | None = None
) -> list[Example]:
    """Read and check a set of examples; of the images, those that are taken are decoded.

    Args:
        source: "demo:calibration", "demo:test", "demo:certification", or the path of a JSON-lines file, one
            object per line: ``{"id", "image" | "images", "question", "answer" | "answers", "metric"?}``, image
            paths relative to the file. Further fields are kept in ``extra``.
        limit: use only so many: the first ones, or a random draw when ``seed`` is given (file order is kept).
        seed: see ``limit``.
        progress: called as ``progress("images", done, total)`` while images are decoded.

    Raises:
        ThinsightError: no such file, a bad line (with its number), a missing field, a duplicate id, an
            unknown metric, an image that is missing, too large or cannot be decoded, or no examples at all.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise BadInput(f"limit is {limit!r}: it must be a whole number of at least 1")
    examples = read_examples(source)
    if limit is not None and limit < len(examples):
        chosen = range(limit) if seed is None else sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    validate_examples(examples, str(source), progress)
    return examples


def read_examples(source: str | Path) -> list[Example]:
    """The examples of a file, line by line: nothing is checked that takes more than one line, and no image is
    looked at.

    Raises:
        ThinsightError: no such file, or a bad line (with its number).
    """
    return _parse_file(_locate(source))


def validate_examples(
    examples: Sequence[Example], source: str = "the examples", progress: Progress | None = None
) -> None:
    """Check a whole set, its images included, before long work starts.

    Raises:
        ThinsightError: as `check_examples` and `check_images` do.
    """
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
        _check_fields(example, where)
        for image in example.images:
            if isinstance(image, Path) and image not in found:
                check_exists(image, where)
                found.add(image)


def check_images(examples: Sequence[Example], source: str = "the examples", progress: Progress | None = None) -> None:
    """Decode every image file of a set once; what has room in memory waits there for its processor.

    Args:
        examples: what `check_examples` let pass.
        source: what a message begins with.
        progress: called as ``progress("images", done, total)``, in examples.

    Raises:
        ThinsightError: an image that is truncated, no image, or too large.
    """
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


def _locate(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith(DEMO_PREFIX):
        name = source.removeprefix(DEMO_PREFIX)
        if name not in _DEMO_SETS:
            choices = ", ".join(DEMO_PREFIX + known for known in _DEMO_SETS)
            raise BadInput(f"unknown demo data {source!r}: use {choices}")
        return _DEMO_FOLDER / f"{name}.jsonl"
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        raise BadInput(f"data {str(source)!r} is a folder: give the JSON-lines file in it, each line {_FORMAT}")
    if not path.is_file():
        raise BadInput(f"data {str(source)!r} does not exist: give a JSON-lines file, demo:calibration or demo:test")
    return path


def _parse_file(path: Path) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would break at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_parse_line(line, path, where) for where, line in numbered]


def _parse_line(line: str, path: Path, where: str) -> Example:
    try:
        return _example(_record(line, where), path, where)
    except RecursionError:
        raise BadInput(f"{where} is not JSON (nested too deep): each line is {_FORMAT}") from None


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
        raise BadInput(f"{where} is not JSON ({reason}): each line is {_FORMAT}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise BadInput(f"{where} cannot be read ({error}): write the number as a text") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where} is not a JSON object: each line is {_FORMAT}")
    return record


def _example(record: dict[str, Any], path: Path, where: str) -> Example:
    _refuse_misspelt(record, where)
    images = _strings(record, "image", "images", where, required=True)
    answers = _strings(record, "answer", "answers", where, required=False)
    metric = record.get("metric")
    if metric is not None:
        try:
            get_metric(metric)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    return Example(
        id=_text(record, "id", where, also=int),
        images=tuple(path.parent / image for image in images),
        question=_text(record, "question", where),
        answers=answers,
        metric=metric,
        group="+".join(images),
        extra={name: value for name, value in record.items() if name not in _FIELDS},
    )


def _refuse_misspelt(record: dict[str, Any], where: str) -> None:
    """A misspelt field would silently change what is measured ("anwser" would mean: no labels)."""
    missing = [name for name in _FIELDS if record.get(name) is None]
    for name in record:
        if name not in _FIELDS and (close := difflib.get_close_matches(name, missing, n=1, cutoff=0.8)):
            raise BadInput(f"{where}: unknown field {name!r}: did you mean {close[0]!r}?")


def _text(record: dict[str, Any], name: str, where: str, also: type | None = None) -> str:
    value = record.get(name)
    if value is None:
        raise BadInput(f"{where} has no field {name!r}: each line is {_FORMAT}")
    if also is not None and isinstance(value, also) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where}: field {name!r} is {value!r}: it must be a text that is not empty")
    return value


def _strings(record: dict[str, Any], one: str, many: str, where: str, *, required: bool) -> tuple[str, ...]:
    """The texts of a field that may be given as one text or under its plural name as a list."""
    given = [name for name in (one, many) if record.get(name) is not None]
    if len(given) == 2:
        raise BadInput(f"{where} has both {one!r} and {many!r}: give one of them")
    if not given:
        if required:
            raise BadInput(f"{where} has no field {one!r} (or {many!r}): each line is {_FORMAT}")
        return ()
    name = given[0]
    values = [record[one]] if name == one else record[many]
    if not isinstance(values, list) or not values:
        raise BadInput(f"{where}: field {many!r} must be a list that is not empty")
    return tuple(_plain_value(value, name, where) for value in values)


def _plain_value(value: Any, name: str, where: str) -> str:
    """A number is accepted as the text it is written as."""
    answer = name.startswith("answer")
    if isinstance(value, float) and not math.isfinite(value):
        hint = "; null means that there is no label" if answer else ""
        raise BadInput(f"{where}: field {name!r} holds {value}: it must be a text{hint}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and answer:
        return str(value)
    if not isinstance(value, str):
        raise BadInput(f"{where}: field {name!r} holds {value!r}: it must be a text")
    if not value.strip():
        hint = "; leave it out, or write null, where there is no label" if answer else ""
        raise BadInput(f"{where}: field {name!r} holds an empty text: it must not be empty{hint}")
    return value


# -- checking ------------------------------------------------------------------------------------------------


def _check_fields(example: Example, where: str) -> None:
    if not example.question.strip():
        raise BadInput(f"{where} has an empty question: give it a text")
    if not all(answer.strip() for answer in example.answers):
        raise BadInput(f"{where} has an empty answer: leave it out where there is no label")
    _check_task(example.extra.get("task"), where)
    shown = [example.id, example.question, *example.answers, example.metric, example.group, example.task]
    for text in (*shown, *example.extra, *example.extra.values()):
        if isinstance(text, str):
            _check_unicode(text, where)
    if not example.images:
        raise BadInput(f"{where} has no image: vision tokens cannot be reduced without one; give it an image")
    if example.metric is not None:
        get_metric(example.metric)
        if example.metric != "agreement" and not example.answers:
            raise BadInput(f"{where} has no answer, which metric {example.metric!r} needs: add 'answer'")


def _check_task(task: Any, where: str) -> None:
    """Scores are listed by task."""
    if isinstance(task, (list, dict)) or (isinstance(task, float) and not math.isfinite(task)):
        what = task if isinstance(task, float) else f"a {type(task).__name__}"
        raise BadInput(f"{where}: task is {what}: write a text, or null")


def _check_unicode(text: str, where: str) -> None:
    """Half a character breaks the report that shows it, after all the work."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: {text!r} holds half of a surrogate pair: write the character itself") from None
