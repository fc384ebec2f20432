"""Opens images: a file or a PIL image becomes the RGB pixels that transformers' own `load_image` gives.

The one place where users' pixels come in: turned as their EXIF data says, scaled to 8 bits, and bounded in
size before they are decoded. Knows nothing about examples, models or processors.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import BadInput

READING = 2  # of the rules here: features of images that were read by other rules have other names

_MAX_ASPECT = 200  # Qwen's processors refuse more; a resize of the shorter edge would take gigabytes
_HELD_BYTES = 2**29
_LARGEST_HELD = 2**26  # bytes of one image: 22 million pixels
_LONGEST_PATH = 400  # characters of a path that a message quotes
_NEXT_TO_DATA = "image paths are relative to the data file"
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose wide gray PIL may call "I", which elsewhere has 32 bits

ImageSource = Path | Image.Image


def open_image(image: ImageSource, where: str = "", missing: str = _NEXT_TO_DATA) -> Image.Image:
    """The image as RGB, upright: what `transformers.image_utils.load_image` gives; of an animation the first
    frame.

    Gray of 16 bits is scaled to 8, where `load_image` would cut it off. Gray of 32 bits has no defined white:
    it is scaled by its own values, and a warning names the file.

    Args:
        image: the path of a file, or a PIL image, which stays as it is.
        where: what a message begins with.
        missing: what to do when there is no such file.

    Raises:
        ThinsightError: a file that is missing, truncated or no image; an image with more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million), or more than 200 times as long as it is wide.
    """
    name = _name(image, where)
    if isinstance(image, Image.Image):
        check_size(image.size, name)
        with _one_line(name):
            return _rgb(ImageOps.exif_transpose(image), image.format, name)
    check_exists(image, where, missing)
    with _one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` is stricter
        opened = Image.open(image)
    with opened:
        check_size(opened.size, name)
        with _one_line(name):
            ImageOps.exif_transpose(opened, in_place=True)
            return _rgb(opened, opened.format, name)


def check_exists(path: Path, where: str = "", missing: str = _NEXT_TO_DATA) -> None:
    """Check that there is such a file, without opening it; arguments as for `open_image`.

    Raises:
        ThinsightError: there is none.
    """
    name = _name(path, where)
    try:
        exists = path.is_file()
    except OSError as error:
        raise BadInput(f"{name} cannot be read ({error.strerror}): {missing}") from None
    if not exists:
        raise BadInput(f"{name} does not exist: {missing}")


def check_size(size: tuple[int, int], name: str, shortest_edge: int | None = None) -> None:
    """Check that an image can be handled in bounded memory.

    Args:
        size: its width and height in pixels.
        name: what a message begins with.
        shortest_edge: to which length a processor resizes the shorter edge, if it does.

    Raises:
        ThinsightError: it has no pixels, too many of them as it is or resized, or is too long a strip.
    """
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
    """What tells an image from others: the path, or the pixels of a PIL image.

    Raises:
        ThinsightError: neither of them, or a PIL image that `open_image` refuses.
    """
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

    So a file is decoded once, though it is checked before the model is there. Pixels beyond the bound, and
    images of over 22 million of them, are let go, and decoded again when they are asked for. A copy of this
    object is empty, in pickles too.

    Args:
        most_bytes: how much memory the pixels may take.
    """

    def __init__(self, most_bytes: int = _HELD_BYTES) -> None:
        self._room = most_bytes
        self._checked: set[str] = set()
        self._held: dict[str, tuple[tuple[int, int], Image.Image]] = {}

    def check(self, key: str, path: Path, where: str, missing: str = _NEXT_TO_DATA) -> None:
        """Decode a file that was not decoded before; as for `open_image`."""
        if key in self._checked:
            return
        opened = open_image(path, where, missing)
        self._checked.add(key)
        if _num_bytes(opened) <= min(self._room, _LARGEST_HELD):
            self._room -= _num_bytes(opened)
            self._held[key] = (_state(path), opened)

    def take(self, key: str, image: ImageSource, where: str) -> Image.Image:
        """The image as `open_image` gives it. What was held is handed out once."""
        state, held = self._held.pop(key, (None, None))
        if held is None:
            return open_image(image, where)
        self._room += _num_bytes(held)
        return held if isinstance(image, Path) and state == _state(image) else open_image(image, where)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _name(image: ImageSource, where: str) -> str:
    """What messages call an image."""
    name = f"{where}: image" if where else "image"
    if isinstance(image, Image.Image):
        return name
    path = str(image)
    return f"{name} {path if len(path) <= _LONGEST_PATH else f'{path[:_LONGEST_PATH]}...'!r}"


def _num_bytes(rgb: Image.Image) -> int:
    return 3 * rgb.width * rgb.height


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
        image = Image.fromarray(_scaled(np.asarray(image, dtype=np.float32), image.mode, name))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, and PIL does not warn
    return image.convert("RGB")


def _scaled(values: NDArray[np.float32], mode: str, name: str) -> NDArray[np.uint8]:
    """Gray of 32 bits as 8: (height, width)."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whites = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    black = min(low, 0.0)
    white = next((white for white in whites if high <= white and low >= 0), high)
    warnings.warn(
        f"{name} is gray with values from {low:g} to {high:g} (mode {mode}), for which no white is defined: "
        f"{black:g} is taken for black and {white:g} for white",
        stacklevel=2,
    )
    unit = np.nan_to_num((values - black) / max(white - black, 1e-9), nan=0.0).clip(0, 1)
    return (unit * 255).round().astype(np.uint8)
