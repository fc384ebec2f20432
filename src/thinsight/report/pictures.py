"""Draws which vision tokens were kept: dropped patches fade, kept ones keep their color and get an outline."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import BadInput
from ..records import user_path, write_atomically
from ..shown import percent

if TYPE_CHECKING:
    from .data import Picture

OUTLINE = (255, 176, 0)
FADE = (30, 35, 46)  # dropped patches move toward this color
FADE_SHARE = 0.62
OVERLAY_SHARE = 0.78  # the same where the color below cannot be taken away first
_INK, _MUTED, _PAPER = (22, 32, 46), (90, 102, 117), (255, 255, 255)


def kept_mask(grid: tuple[int, int], kept: Iterable[int]) -> NDArray[np.bool_]:
    """Which patches were kept, shape (rows, columns).

    Raises:
        ThinsightError: an empty grid or an index outside of it.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise BadInput(f"picture grid {rows} x {columns} is empty; give rows and columns of at least 1")
    mask = np.zeros(rows * columns, dtype=bool)
    for index in kept:
        if not 0 <= int(index) < rows * columns:
            raise BadInput(f"token {int(index)} is outside the {rows} x {columns} grid of this picture")
        mask[int(index)] = True
    return mask.reshape(rows, columns)


def draw_kept(image: Image.Image, grid: tuple[int, int], kept: Iterable[int], *, side: int = 336) -> Image.Image:
    """The image with its dropped patches gray and dim and its kept ones outlined, as RGB.

    ``side`` is the longer one of the drawing in pixels, rounded to whole patches of at least 4.
    """
    mask, cell = kept_mask(grid, kept), _cell(grid, side)
    pixels = np.asarray(resized(image, grid, side), dtype=np.float32)  # (h, w, 3)
    gray = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (h, w)
    faded = (1 - FADE_SHARE) * gray[..., None] + FADE_SHARE * np.array(FADE, dtype=np.float32)
    shown = _enlarged(mask, cell)
    drawn = np.where(shown[..., None], pixels, faded).round().astype(np.uint8)
    if not mask.all():
        drawn[_border(shown, thickness=max(1, cell // 10))] = OUTLINE
    return Image.fromarray(drawn, "RGB")


def view_side(image: Image.Image) -> int:
    """The longer side at which a viewer shows an image, in pixels: its own, within what a window can use."""
    return min(max(*image.size, 336), 672)


def resized(image: Image.Image, grid: tuple[int, int], side: int) -> Image.Image:
    """The image in whole patches as `draw_kept` has them, RGB."""
    size = (grid[1] * _cell(grid, side), grid[0] * _cell(grid, side))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def kept_overlay(grid: tuple[int, int], kept: Iterable[int], *, side: int = 336) -> Image.Image:
    """What to lay over the `resized` image: dropped patches dim, kept ones clear and outlined; three colors with their
    opacity, so that a PNG of it is small.

    Raises:
        ThinsightError: an empty grid or an index outside of it.
    """
    mask, cell = kept_mask(grid, kept), _cell(grid, side)
    shown = _enlarged(mask, cell)
    drawn = np.where(shown, 0, 1).astype(np.uint8)  # (h, w)
    if not mask.all():
        drawn[_border(shown, thickness=max(1, cell // 10))] = 2
    overlay = Image.fromarray(drawn, "P")
    overlay.putpalette((*_PAPER, *FADE, *OUTLINE))
    overlay.info["transparency"] = bytes((0, round(255 * OVERLAY_SHARE), 255))
    return overlay


def overlay_uri(overlay: Image.Image) -> str:
    """An overlay as a `data:` address."""
    buffer = io.BytesIO()
    overlay.save(buffer, "png", bits=2, compress_level=9, transparency=overlay.info["transparency"])
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _cell(grid: tuple[int, int], side: int) -> int:
    return max(4, round(side / max(grid)))


def _enlarged(mask: NDArray[np.bool_], cell: int) -> NDArray[np.bool_]:
    """A pixel of patches as so many of the drawing, shape (h, w)."""
    return np.repeat(np.repeat(mask, cell, axis=0), cell, axis=1)


def _border(shown: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """The pixels of the shown area within `thickness` of its edge, shape (h, w)."""
    inner, core = np.pad(shown, thickness, constant_values=False), shown.copy()
    height, width = shown.shape
    for down, right in itertools.product((0, thickness, 2 * thickness), repeat=2):
        core &= inner[down : down + height, right : right + width]
    return shown & ~core


def data_uri(image: Image.Image) -> str:
    """The image as a `data:` address: PNG where that is small, JPEG for photographs."""
    files = {}
    for kind, settings in (("png", {"compress_level": 6}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind, **settings)
        files[kind] = buffer.getvalue()
    kind = "png" if len(files["png"]) <= 24_000 else min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode('ascii')}"


def even_columns(number: int) -> int:
    """In how many columns so many drawings stand: at most four, in lines of like length."""
    return -(-number // -(-number // 4))


def contact_strip(picture: Picture, *, side: int = 240, columns: int | None = None, text: int = 13) -> Image.Image:
    """One sheet with the question, the answers, the image and a drawing per layer, for `thinsight show`.

    ``side`` is the longer one of a drawing in pixels, ``columns`` the drawings in a line, ``text`` the size of captions
    in pixels.
    """
    drawings = [draw_kept(picture.image, picture.grid, range(picture.num_tokens), side=side)]
    drawings += [draw_kept(picture.image, picture.grid, kept, side=side) for kept in picture.kept]
    total, captions = picture.num_tokens, ["the image"]
    for layer, kept in zip(picture.layers, picture.kept, strict=True):
        captions.append(f"layer {layer}: {len(kept)} of {total} ({percent(len(kept) / total)})")
    columns = max(1, min(len(drawings), even_columns(len(drawings)) if columns is None else columns))
    font, bold = ImageFont.load_default(text), ImageFont.load_default(round(1.3 * text))
    pad, gap, under, line = 24, 16, 2 * text, round(1.85 * text)
    wide, tall = drawings[0].size
    step = max(wide, round(max(map(font.getlength, captions))))
    width = max(2 * pad + columns * step + (columns - 1) * gap, 420)
    heading = [(words, bold, _INK) for words in _wrapped(picture.question, bold, width - 2 * pad)]
    named = (("full model", picture.answer_full), ("reduced", picture.answer_reduced), ("expected", picture.truth))
    answers = " · ".join(f"{name}: {answer}" for name, answer in named if answer)
    heading += [(words, font, _MUTED) for words in _wrapped(answers, font, width - 2 * pad)]
    top = pad + line * len(heading) + (12 if heading else 0)
    lines = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (width, top + lines * (tall + under) + (lines - 1) * gap + pad - 8), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (words, face, color) in enumerate(heading):
        draw.text((pad, pad + line * place), words, fill=color, font=face)
    for place, (drawing, caption) in enumerate(zip(drawings, captions, strict=True)):
        left = pad + place % columns * (step + gap)
        upper = top + place // columns * (tall + under + gap)
        sheet.paste(drawing, (left, upper))
        draw.text((left, upper + tall + 6), caption, fill=_MUTED, font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> Sequence[str]:
    """The text in lines no wider than `width` pixels; a longer single word stays whole."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def check_picture_name(path: str | Path) -> str:
    """The image format that a file name's ending stands for.

    Raises:
        ThinsightError: for none, or one that cannot be written.
    """
    Image.init()
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):  # no format, one that is only read, one without colors
        raise BadInput(f"out {path} does not end like a picture: name a .png file") from None
    return kind


def save_contact_strip(path: str | Path, picture: Picture, **settings: int) -> Path:
    """Writes the contact strip as an image file of the format that its name says; returns its path.

    Raises:
        ThinsightError: the file cannot be written, or its ending is no image format.
    """
    path, buffer = user_path(path, "out"), io.BytesIO()
    contact_strip(picture, **settings).save(buffer, check_picture_name(path))
    write_atomically(path, buffer.getvalue(), "name a .png file you may write")
    return path
