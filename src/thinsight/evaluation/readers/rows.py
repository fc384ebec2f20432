"""A row of data as its reader understood it, and how it becomes an example: each of its fields checked, what is wrong
named by row and column, images that stand in the data itself kept in temporary files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ...errors import BadInput, StorageError
from ..example import Example
from ..images import ImageSource
from ..metrics import get_metric

_ADDRESS = re.compile(r"(?i)(https?|ftp|s3|gs|hf)://")
_DATA_ADDRESS = re.compile(r"(?is)data:[^,]*,")
# how base64 of PNG, JPEG, GIF, WebP, BMP and TIFF begins
_ENCODED = re.compile(r"\s*(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-9A-Za-z+/]{2}|SUkqA|TU0AK)[A-Za-z0-9+/\s]+=*\s*")
_SHORTEST_ENCODED = 64  # characters: of a text that may be a path too


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        where: its place, with which messages begin: "data.tsv, line 3".
        fields: by our names: "id", "image" or "images", "question", "answer" or "answers", "metric". An image is a
            path, a data address or base64, bytes, what `datasets` has for one, or a PIL image. Other names are kept in
            `Example.extra`.
        folder: what image paths are relative to.
        form: what the data looks like, for messages.
        names: what the data calls a field, where that is not our name.
        word: what messages call a field.
    """

    where: str
    fields: Mapping[str, Any]
    folder: Path
    form: str
    names: Mapping[str, str] = field(default_factory=dict)
    word: str = "field"

    def example(self) -> Example:
        """The example, no image of a file looked at.

        Raises:
            ThinsightError: a field that is missing or cannot be right, by row and column.
        """
        try:
            return self._example()
        except RecursionError:  # a value that cannot even be shown
            raise BadInput(f"{self.where} is not JSON (nested too deep): {self.form}") from None

    def _example(self) -> Example:
        known = ("id", "image", "images", "question", "answer", "answers", "metric")
        images, names = self._images()
        metric = self.fields.get("metric")
        if metric is not None:
            try:
                get_metric(metric)
            except BadInput as error:
                raise BadInput(f"{self.where}: {error}") from None
        answers = self._answers()
        return Example(
            id=self._text("id", also=int),
            images=images,
            question=self._text("question"),
            answers=answers,
            metric=metric,
            group="+".join(names),
            extra={name: value for name, value in self.fields.items() if name not in known},
        )

    def _called(self, name: str) -> str:
        return f"{self.word} {self.names.get(name, name)!r}"

    def _text(self, name: str, also: type | None = None) -> str:
        value = self.fields.get(name)
        if value is None:
            raise BadInput(f"{self.where} has no {self._called(name)}: {self.form}")
        if also is not None and isinstance(value, also) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise BadInput(f"{self.where}: {self._called(name)} is {value!r}: it must be a text that is not empty")
        return value

    def _values(self, one: str) -> tuple[str, list[Any]]:
        """The name and the values of a field given once or under its plural name as a list; none if it is not."""
        many = f"{one}s"
        given = [name for name in (one, many) if self.fields.get(name) is not None]
        if len(given) == 2:
            raise BadInput(f"{self.where} has both {one!r} and {many!r}: give one of them")
        if not given:
            return one, []
        name = given[0]
        values = [self.fields[one]] if name == one else self.fields[many]
        if not isinstance(values, list) or not values:
            raise BadInput(f"{self.where}: {self._called(many)} must be a list that is not empty")
        return name, values

    def _checked_text(self, name: str, value: Any, hints: tuple[str, str] = ("", "")) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{self.where}: {self._called(name)} holds {value}: it must be a text{hints[0]}")
        if not isinstance(value, str):
            raise BadInput(f"{self.where}: {self._called(name)} holds {value!r}: it must be a text")
        if not value.strip():
            raise BadInput(f"{self.where}: {self._called(name)} holds an empty text: it must not be empty{hints[1]}")
        return value

    def _answers(self) -> tuple[str, ...]:
        """A number that is an answer is the text it is written as."""
        name, values = self._values("answer")
        hints = "; null means that there is no label", "; leave it out, or write null, where there is no label"
        texts = []
        for value in values:
            finite = not isinstance(value, float) or math.isfinite(value)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and finite
            texts.append(self._checked_text(name, str(value) if number else value, hints))
        return tuple(texts)

    def _images(self) -> tuple[tuple[ImageSource, ...], list[str]]:
        """The images, and what each is called in the name of the example's group."""
        name, values = self._values("image")
        if not values:
            called = self.names.get("image", "image")
            also = " (or 'images')" if called == "image" and self.word == "field" else ""
            raise BadInput(f"{self.where} has no {self.word} {called!r}{also}: {self.form}")
        found = [self._image(name, value) for value in values]
        return tuple(image for image, _ in found), [group for _, group in found]

    def _image(self, name: str, value: Any) -> tuple[ImageSource, str]:
        if isinstance(value, Image.Image):
            return self._kept(name, _png(value))
        if isinstance(value, Mapping) and {"bytes", "path"} & set(value):  # as `datasets` has it
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, (bytes, bytearray)):
            return self._kept(name, bytes(value))
        text = self._checked_text(name, value)
        data = self._decoded(name, text)
        if data is not None:
            return self._kept(name, data)
        if _ADDRESS.match(text):
            raise BadInput(
                f"{self.where}: {self._called(name)} holds the address {text[:200]!r}, and nothing is read from a "
                "network here: download the image, and give its path"
            )
        return self.folder / text, text

    def _decoded(self, name: str, text: str) -> bytes | None:
        """What a text holds as base64; None where it is a path."""
        if address := _DATA_ADDRESS.match(text):
            head, body = address[0], text[address.end() :]
            if not head.lower().endswith(";base64,"):
                raise BadInput(f"{self.where}: {self._called(name)} holds a data address without base64: write it so")
        elif len(text) >= _SHORTEST_ENCODED and _ENCODED.fullmatch(text):
            body = text
        else:
            return None
        try:
            return base64.b64decode("".join(body.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInput(
                f"{self.where}: {self._called(name)} holds base64 that cannot be decoded ({error}): replace the image"
            ) from None

    def _kept(self, name: str, data: bytes) -> tuple[Path, str]:
        """A file of its own for an image that stands in the data, made once."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked where it is opened
                Image.open(io.BytesIO(data)).close()
        except Exception as error:  # PIL raises many kinds
            reason = type(error).__name__ if "BytesIO" in str(error) else str(error) or type(error).__name__
            raise BadInput(
                f"{self.where}: {self._called(name)} holds {len(data)} bytes that are no image ({reason}): replace it"
            ) from None
        path = _SCRATCH.keep(data)
        return path, path.name


class _Scratch:
    """Images by content in a temporary folder, which goes with the process."""

    def keep(self, data: bytes) -> Path:
        """The file that holds these bytes."""
        name = hashlib.sha256(data).hexdigest()[:32]
        try:
            path = Path(self._folder.name, name)
            if not path.exists():
                path.write_bytes(data)
        except OSError as error:
            raise StorageError(
                f"images of the data cannot be kept in temporary files ({error.strerror or error}): free the disk, or "
                "name another folder with TMPDIR"
            ) from None
        return path

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="thinsight-images-")


_SCRATCH = _Scratch()


def _png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=1)
    return written.getvalue()
