"""Examples: images, a question and the answers that count as right; their JSON-lines files; how images are opened.

A file is checked as a whole before anything runs. This is the one place where users' pixels come in: turned as their
EXIF data says, scaled to 8 bits, and bounded in size before they are decoded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import BadInput, whole
from ..texts import brief
from .metrics import get_metric, metric_for

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_DEMO_SETS = ("calibration", "test", "certification")
_FIELDS = ("id", "image", "images", "question", "answer", "answers", "metric")
_FORMAT = '{"id", "image" or "images", "question", "answer" or "answers", "metric" (optional)}'

READING = 2  # of the rules here: features of images that were read by other rules have other names

_MAX_ASPECT = 200  # Qwen's processors refuse more; a resize of the shorter edge would take gigabytes
_HELD_BYTES = 2**29
_LARGEST_HELD = 2**26  # bytes of one image: 22 million pixels
_LONGEST_PATH = 400  # characters of a path that a message quotes
_HALF = re.compile(r"[\ud800-\udfff]")  # such a text breaks the report that shows it, after all the work
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose wide gray PIL may call "I", which elsewhere has 32 bits

Progress = Callable[[str, int, int], None]
ImageSource = Path | Image.Image

# -- images ----------------------------------------------------------------------------------------------------


def open_image(image: ImageSource, where: str = "") -> Image.Image:
    """The image as RGB, upright: what `transformers.image_utils.load_image` gives; of an animation the first frame.

    Gray of 16 bits is scaled to 8, where `load_image` would cut it off. Gray of 32 bits has no defined white:
    it is scaled by its own values, and a warning names the file. Messages begin with ``where``.

    Raises:
        ThinsightError: a file that is missing, truncated or no image; an image with more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million), or more than 200 times as long as it is wide.
    """
    name = _name(image, where)
    if isinstance(image, Image.Image):
        check_size(image.size, name)
        with _one_line(name):
            return _rgb(ImageOps.exif_transpose(image), image.format, name)
    check_exists(image, where)
    with _one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` is stricter
        opened = Image.open(image)
    with opened:
        check_size(opened.size, name)
        with _one_line(name):
            ImageOps.exif_transpose(opened, in_place=True)
            return _rgb(opened, opened.format, name)


def check_exists(path: Path, where: str = "", remedy: str = "image paths are relative to the data file") -> None:
    """Refuse a file that is not there, without opening it."""
    name = _name(path, where)
    try:
        exists = path.is_file()
    except OSError as error:
        raise BadInput(f"{name} cannot be read ({error.strerror}): {remedy}") from None
    if not exists:
        raise BadInput(f"{name} does not exist: {remedy}")


def check_size(size: tuple[int, int], name: str, shortest_edge: int | None = None) -> None:
    """Refuse an image that cannot be handled in bounded memory: of a size in pixels (width, height) that is 0, too
    large as it is or with its shorter edge resized to ``shortest_edge``, or too long a strip."""
    short, long = sorted(size)
    said = f"{name} has {size[0]} x {size[1]} pixels"
    if short < 1:
        raise BadInput(f"{said}: give one that is not empty")
    if long > _MAX_ASPECT * short:
        raise BadInput(f"{said}, one edge more than {_MAX_ASPECT} times the other: cut it into pieces")
    resized = 0 if shortest_edge is None else shortest_edge**2 * long // short
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and max(long * short, resized) > most:
        what = "" if long * short > most else f", which the processor would resize to {resized}"
        raise BadInput(f"{said}{what}; at most {most} are taken: make it smaller")


def image_key(image: object, where: str = "") -> str:
    """What tells an image from others: the path, or the pixels of a PIL image; anything else is refused."""
    if isinstance(image, Path):
        return str(image.resolve())
    if isinstance(image, Image.Image):
        opened = open_image(image, where)
        digest = hashlib.sha256(f"RGB {opened.size}".encode())
        digest.update(opened.tobytes())
        return f"pixels:{digest.hexdigest()[:24]}"
    raise BadInput(f"an image is a {type(image).__name__}: give a path or a PIL image")


class OpenedImages:
    """Image files that were checked by decoding them, and their pixels until somebody takes them.

    So a file is decoded once, though it is checked before the model is there. Pixels beyond ``most_bytes``, and
    images of over 22 million of them, are let go, and decoded again when they are asked for. A copy of this
    object is empty, in pickles too.
    """

    def __init__(self, most_bytes: int = _HELD_BYTES) -> None:
        self._room = most_bytes
        self._checked: set[str] = set()
        self._held: dict[str, tuple[tuple[int, int], Image.Image]] = {}

    def check(self, key: str, path: Path, where: str) -> None:
        """Decode a file that was not decoded before; as for `open_image`."""
        if key in self._checked:
            return
        opened = open_image(path, where)
        self._checked.add(key)
        size = 3 * opened.width * opened.height  # bytes
        if size <= min(self._room, _LARGEST_HELD):
            self._room -= size
            self._held[key] = (_state(path), opened)

    def take(self, key: str, image: ImageSource, where: str) -> Image.Image:
        """The image as `open_image` gives it. What was held is handed out once."""
        state, held = self._held.pop(key, (None, None))
        if held is not None:
            self._room += 3 * held.width * held.height
            if isinstance(image, Path) and state == _state(image):
                return held
        return open_image(image, where)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _name(image: ImageSource, where: str) -> str:
    """What messages call an image."""
    name = f"{where}: image" if where else "image"
    if isinstance(image, Image.Image):
        return name
    path = str(image)
    return f"{name} {path if len(path) <= _LONGEST_PATH else f'{path[:_LONGEST_PATH]}...'!r}"


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise BadInput(f"{name} does not fit into memory: make it smaller") from None
    except Image.DecompressionBombError:
        raise BadInput(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, which are too many: make it smaller"
        ) from None
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise BadInput(f"{name} is truncated or no image ({reason}): replace it") from error


def _rgb(image: Image.Image, file: str | None, name: str) -> Image.Image:
    """An upright image as RGB; ``file`` is the format that it was stored in, if PIL knows."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file in _SIXTEEN_BITS):
        wide = np.asarray(image).astype(np.uint32)  # (height, width), 0 to 65535
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)  # (height, width)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        black = min(low, 0.0)
        white = next((white for white in whites if high <= white and low >= 0), high)
        warnings.warn(
            f"{name} is gray with values from {low:g} to {high:g} (mode {image.mode}), for which no white is "
            f"defined: {black:g} is taken for black and {white:g} for white",
            stacklevel=2,
        )
        unit = np.nan_to_num((values - black) / max(white - black, 1e-9), nan=0.0).clip(0, 1)
        image = Image.fromarray((unit * 255).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, and PIL does not warn
    return image.convert("RGB")


# -- examples --------------------------------------------------------------------------------------------------


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
        images = tuple(Path(image) if isinstance(image, str) else image for image in self.images)
        object.__setattr__(self, "images", images)
        if isinstance(self.answers, str):
            raise BadInput(f"example {self.id!r}: answers is a text; pass a tuple of texts, ({self.answers!r},)")
        object.__setattr__(self, "answers", tuple(self.answers or ()))
        for name, texts in (("question", (self.question,)), ("answers", self.answers)):
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise BadInput(f"example {self.id!r}: {name} holds {wrong[0]!r}; it must be a text")
        if not self.group:
            names = (each.as_posix() if isinstance(each, Path) else image_key(each, self._where) for each in images)
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
        """The images as RGB, in their order; see `open_image`.

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
    if limit is not None:
        whole(limit, "limit")
    examples = read_examples(source)
    if limit is not None and limit < len(examples):
        chosen = range(limit) if seed is None else sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    validate_examples(examples, str(source), progress)
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


def read_examples(source: str | Path) -> list[Example]:
    """The examples of a file, each line checked alone, no image looked at."""
    path = Path(os.path.expanduser(source))
    if isinstance(source, str) and source.startswith(DEMO_PREFIX):
        name = source.removeprefix(DEMO_PREFIX)
        if name not in _DEMO_SETS:
            choices = ", ".join(DEMO_PREFIX + known for known in _DEMO_SETS)
            raise BadInput(f"unknown demo data {source!r}: use {choices}")
        path = _DEMO_FOLDER / f"{name}.jsonl"
    elif path.is_dir():
        raise BadInput(f"data {str(source)!r} is a folder: give the JSON-lines file in it, each line {_FORMAT}")
    elif not path.is_file():
        raise BadInput(f"data {str(source)!r} does not exist: give a JSON-lines file, demo:calibration or demo:test")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would break at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                examples.append(_example(_record(line, where), path, where))
        except RecursionError:
            raise BadInput(f"{where} is not JSON (nested too deep): each line is {_FORMAT}") from None
    return examples


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
    missing = [name for name in _FIELDS if record.get(name) is None]
    for name in record:  # a misspelt field would silently change what is measured ("anwser" would mean: no labels)
        if name not in _FIELDS and (close := difflib.get_close_matches(name, missing, n=1, cutoff=0.8)):
            raise BadInput(f"{where}: unknown field {name!r}: did you mean {close[0]!r}?")
    images = _strings(record, "image", where)
    if not images:
        raise BadInput(f"{where} has no field 'image' (or 'images'): each line is {_FORMAT}")
    answers = _strings(record, "answer", where)
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


def _text(record: dict[str, Any], name: str, where: str, also: type | None = None) -> str:
    value = record.get(name)
    if value is None:
        raise BadInput(f"{where} has no field {name!r}: each line is {_FORMAT}")
    if also is not None and isinstance(value, also) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where}: field {name!r} is {value!r}: it must be a text that is not empty")
    return value


def _strings(record: dict[str, Any], one: str, where: str) -> tuple[str, ...]:
    """The texts of a field given as one text or under its plural name as a list; () if it is not. A number that is an
    answer is the text it is written as."""
    many = f"{one}s"
    given = [name for name in (one, many) if record.get(name) is not None]
    if len(given) == 2:
        raise BadInput(f"{where} has both {one!r} and {many!r}: give one of them")
    if not given:
        return ()
    name, answer = given[0], one == "answer"
    values = [record[one]] if name == one else record[many]
    if not isinstance(values, list) or not values:
        raise BadInput(f"{where}: field {many!r} must be a list that is not empty")
    texts = []
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            hint = "; null means that there is no label" if answer else ""
            raise BadInput(f"{where}: field {name!r} holds {value}: it must be a text{hint}")
        text = str(value) if answer and isinstance(value, (int, float)) and not isinstance(value, bool) else value
        if not isinstance(text, str):
            raise BadInput(f"{where}: field {name!r} holds {value!r}: it must be a text")
        if not text.strip():
            hint = "; leave it out, or write null, where there is no label" if answer else ""
            raise BadInput(f"{where}: field {name!r} holds an empty text: it must not be empty{hint}")
        texts.append(text)
    return tuple(texts)
