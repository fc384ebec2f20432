"""Images as users have them: opened upright, scaled to 8 bits, and bounded in size before they are decoded.

This is the one place where users' pixels come in. Knows nothing about questions or models.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import BadInput

READING = 2  # of the rules here: features of images that were read by other rules have other names

_MAX_ASPECT = 200  # Qwen's processors refuse more; a resize of the shorter edge would take gigabytes
_HELD_BYTES = 2**29
_LARGEST_HELD = 2**26  # bytes of one image: 22 million pixels
_LONGEST_PATH = 400  # characters of a path that a message quotes
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose wide gray PIL may call "I", which elsewhere has 32 bits

ImageSource = Path | Image.Image


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
