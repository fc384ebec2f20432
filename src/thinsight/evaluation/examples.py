"""Examples: an image (or several), a question and the answers that count as right; and the JSON-lines files
they come in.

A file is checked as a whole before anything runs. Knows nothing about models, prompts or scores.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadInput
from .metrics import get_metric

__all__ = [
    "DEMO_PREFIX",
    "Example",
    "ImageSource",
    "check_image_file",
    "load_examples",
    "open_image",
    "validate_examples",
]

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_DEMO_SETS = ("calibration", "test")
_FIELDS = ("id", "image", "images", "question", "answer", "answers", "metric")
_FORMAT = '{"id", "image" or "images", "question", "answer" or "answers", "metric" (optional)}'

ImageSource = Path | Image.Image


@dataclass(frozen=True)
class Example:
    """One question about one or more images.

    Attributes:
        id: unique in its set.
        images: paths or PIL images, in the order in which the prompt shows them.
        question: the text; it may contain the model's image token where an image belongs, else images come
            first.
        answers: the texts that count as right; empty where there are no labels (metric "agreement").
        metric: name of this example's own metric, or None.
        group: what examples about the same image share; a confidence interval resamples groups. Made from the
            images when left empty.
        extra: any further fields of the line, such as "task".
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    metric: str | None = None
    group: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, (tuple, list)):
            raise BadInput(f"example {self.id!r}: images must be a tuple of paths or PIL images")
        object.__setattr__(
            self, "images", tuple(Path(image) if isinstance(image, str) else image for image in self.images)
        )
        if isinstance(self.answers, str):
            raise BadInput(
                f"example {self.id!r}: answers is a text; pass a tuple of texts, ({self.answers!r},)"
            )
        object.__setattr__(self, "answers", tuple(self.answers or ()))
        for name, texts in (("question", (self.question,)), ("answers", self.answers)):
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise BadInput(f"example {self.id!r}: {name} holds {wrong[0]!r}; it must be a text")
        if not self.group:
            object.__setattr__(self, "group", "+".join(_group_name(image) for image in self.images))

    @property
    def task(self) -> str | None:
        """The line's "task" field, if it has one."""
        task = self.extra.get("task")
        return None if task is None else str(task)

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """One key per image; two images with one key are the same image."""
        return tuple(_image_key(image) for image in self.images)


def load_examples(source: str | Path, limit: int | None = None, seed: int | None = None) -> list[Example]:
    """Read and check a set of examples.

    Args:
        source: "demo:calibration", "demo:test", or the path of a JSON-lines file, one object per line:
            ``{"id", "image" | "images", "question", "answer" | "answers", "metric"?}``, image paths relative
            to the file. Further fields are kept in ``extra``.
        limit: use only so many: the first ones, or a random draw when ``seed`` is given (file order is kept).
        seed: see ``limit``.

    Raises:
        ThinsightError: no such file, a bad line (with its number), a missing field, a duplicate id, an
            unknown metric, an image that is missing or cannot be decoded, or no examples at all.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise BadInput(f"limit is {limit!r}: it must be a whole number of at least 1")
    path = _locate(source)
    examples = _parse_file(path)
    if limit is not None and limit < len(examples):
        chosen = (
            range(limit) if seed is None else sorted(random.Random(seed).sample(range(len(examples)), limit))
        )
        examples = [examples[index] for index in chosen]
    validate_examples(examples, source=str(source))
    return examples


def validate_examples(examples: Sequence[Example], source: str = "the examples") -> None:
    """Check a whole set before long work starts; every distinct image is decoded once.

    Raises:
        ThinsightError: no examples, a duplicate id, an empty question, no image, an unknown metric, a metric
            that needs answers without any, or an image that is missing or cannot be decoded.
    """
    if isinstance(examples, str) or not isinstance(examples, Sequence):
        raise BadInput(
            f"examples is {examples!r}; pass a list of Example, such as load_examples(...) returns"
        )
    if len(examples) == 0:
        raise BadInput(f"{source} has no examples: give at least one")
    seen: set[str] = set()
    for example in examples:
        if not isinstance(example, Example):
            raise BadInput(f"{source}: one is a {type(example).__name__}; pass thinsight.Example objects")
        if example.id in seen:
            raise BadInput(f"{source}: id {example.id!r} occurs twice: ids must be unique")
        seen.add(example.id)
        _check_fields(example, source)
    _check_images(examples, source)


def open_image(image: ImageSource) -> Image.Image:
    """The image decoded, as RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as opened:
        return opened.convert("RGB")


# -- reading -------------------------------------------------------------------------------------------------


def _locate(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith(DEMO_PREFIX):
        name = source.removeprefix(DEMO_PREFIX)
        if name not in _DEMO_SETS:
            choices = " or ".join(DEMO_PREFIX + known for known in _DEMO_SETS)
            raise BadInput(f"unknown demo data {source!r}: use {choices}")
        return _DEMO_FOLDER / f"{name}.jsonl"
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        raise BadInput(
            f"data {str(source)!r} is a folder: give the JSON-lines file in it, each line {_FORMAT}"
        )
    if not path.is_file():
        raise BadInput(
            f"data {str(source)!r} does not exist: give a JSON-lines file, demo:calibration or demo:test"
        )
    return path


def _parse_file(path: Path) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would break at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error
    return [_parse_line(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: str, path: Path, number: int) -> Example:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, ValueError) else "nested too deep"
        raise BadInput(f"{where} is not JSON ({reason}): each line is {_FORMAT}") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where} is not a JSON object: each line is {_FORMAT}")
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
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name.startswith("answer"):
        return str(value)
    if not isinstance(value, str) or (not value.strip() and name.startswith("image")):
        raise BadInput(f"{where}: field {name!r} holds {value!r}: it must be a text")
    return value


# -- checking ------------------------------------------------------------------------------------------------


def _check_fields(example: Example, source: str) -> None:
    where = f"{source}: example {example.id!r}"
    if not example.question.strip():
        raise BadInput(f"{where} has an empty question: give it a text")
    for text in (example.question, *example.answers):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(
                f"{where}: {text!r} holds half of a surrogate pair: write the character itself"
            ) from None
    if not example.images:
        raise BadInput(f"{where} has no image: vision tokens cannot be reduced without one; give it an image")
    if example.metric is not None:
        get_metric(example.metric)
        if example.metric != "agreement" and not example.answers:
            raise BadInput(f"{where} has no answer, which metric {example.metric!r} needs: add 'answer'")


def _check_images(examples: Iterable[Example], source: str) -> None:
    checked: set[Path] = set()
    for example in examples:
        for image in example.images:
            where = f"{source}: example {example.id!r}"
            if isinstance(image, Image.Image):
                continue
            if not isinstance(image, Path):
                raise BadInput(f"{where}: an image is a {type(image).__name__}: give a path or a PIL image")
            if image not in checked:
                checked.add(image)
                check_image_file(image, where)


def check_image_file(
    path: Path, where: str, missing: str = "image paths are relative to the data file"
) -> None:
    """Check that a file is an image that can be decoded to its end.

    Args:
        path: the file.
        where: what the message begins with.
        missing: what to do when there is no such file.

    Raises:
        ThinsightError: a file that is missing, truncated or no image.
    """
    try:
        exists = path.is_file()
    except OSError as error:
        raise BadInput(
            f"{where}: image {str(path)[:80]!r} cannot be read ({error.strerror}): {missing}"
        ) from None
    if not exists:
        raise BadInput(f"{where}: image {str(path)!r} does not exist: {missing}")
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:  # verify() leaves an image unusable and does not decode all pixels
            image.load()
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise BadInput(
            f"{where}: image {str(path)!r} is truncated or no image ({reason}): replace it"
        ) from error


def _group_name(image: object) -> str:
    return image.as_posix() if isinstance(image, Path) else _image_key(image)


def _image_key(image: object) -> str:
    if isinstance(image, Path):
        return str(image.resolve())
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
        return f"pixels:{digest.hexdigest()[:24]}"
    raise BadInput(f"an image is a {type(image).__name__}: give a path or a PIL image")
