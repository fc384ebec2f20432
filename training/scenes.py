"""Draws one scene: coloured shapes, a printed and a handwritten number and a bar chart, over a background.

A scene is 224 x 224 pixels in 4 x 4 cells of 56. Besides the pixels it knows, for every 14-pixel patch, what
is drawn there: the auxiliary loss and the grounding loss need that. Knows nothing about questions or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.assets import Assets

SIZE, PATCH, CELL, GRID = 224, 14, 56, 4
PATCHES = SIZE // PATCH  # 16 a side

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 210),
    "yellow": (240, 215, 30),
    "orange": (250, 135, 20),
    "purple": (130, 60, 170),
    "pink": (245, 130, 190),
    "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
COLOR_NAMES = tuple(COLORS)

# Patch classes of the auxiliary loss; 0 always means "nothing".
PATCH_LABELS = {
    "kind": 1 + len(KINDS) + 10 + 10 + 1,  # shapes, printed digits, handwritten digits, bar
    "color": 1 + len(COLORS),
    "row": 1 + GRID,
    "column": 1 + GRID,
    "height": 1 + 8,
    "slot": 1 + 4,  # place of a digit in its number
}


@dataclass
class Thing:
    """Anything a question can be about: a shape, one digit of a number, or one bar."""

    group: str  # "shape", "printed", "handwritten" or "bar"
    kind: str
    color: str = ""
    row: int = -1
    column: int = -1
    height: int = 0
    slot: int = 0


@dataclass
class Scene:
    """``pixels`` (224, 224, 3) uint8; ``owner`` (16, 16): index of the thing in a patch, or -1."""

    pixels: np.ndarray
    things: list[Thing] = field(default_factory=list)
    owner: np.ndarray = field(default_factory=lambda: np.full((PATCHES, PATCHES), -1))
    photographic: bool = False

    def of(self, group: str) -> list[int]:
        return [i for i, thing in enumerate(self.things) if thing.group == group]

    def patches(self, things: list[int]) -> np.ndarray:
        """(256,) bool: the patches in which any of ``things`` is drawn."""
        return np.isin(self.owner, things).reshape(-1)

    def labels(self) -> np.ndarray:
        """(6, 256) int64: the patch classes in the order of PATCH_LABELS."""
        nothing = (0,) * len(PATCH_LABELS)
        rows = np.array([*map(thing_labels, self.things), nothing], dtype=np.int64)
        return rows[self.owner.reshape(-1)].T


def thing_labels(thing: Thing) -> tuple[int, ...]:
    """The six classes of a thing, in the order of PATCH_LABELS."""
    color = 1 + COLOR_NAMES.index(thing.color) if thing.color else 0
    return _kind_class(thing), color, thing.row + 1, thing.column + 1, thing.height, thing.slot


def _kind_class(thing: Thing) -> int:
    if thing.group == "shape":
        return 1 + KINDS.index(thing.kind)
    if thing.group == "bar":
        return PATCH_LABELS["kind"] - 1
    return 1 + len(KINDS) + int(thing.kind) + (10 if thing.group == "handwritten" else 0)


def draw_scene(rng: np.random.Generator, assets: Assets) -> Scene:
    """One random scene. Calling it with equal generator states gives equal scenes."""
    return _Painter(rng, assets).scene()


class _Painter:
    def __init__(self, rng: np.random.Generator, assets: Assets) -> None:
        self.rng, self.assets = rng, assets
        self.free = np.ones((GRID, GRID), dtype=bool)
        self.things: list[Thing] = []
        self.ids = np.full((SIZE, SIZE), -1, dtype=np.int64)  # thing drawn at each pixel

    def scene(self) -> Scene:
        photographic = bool(self.rng.random() < 0.5)
        self.pixels = self._background(photographic)
        if self.rng.random() < 0.6:
            self._chart(*self._block(2, 2))
        if self.rng.random() < 0.6:
            self._printed(*self._block(1, 2))
        if self.rng.random() < 0.6:
            self._handwritten(*self._block(1, 2))
        self._shapes()
        pixels = np.clip(self.pixels, 0, 255).astype(np.uint8)
        return Scene(pixels, self.things, self._owners(), photographic)

    def _owners(self) -> np.ndarray:
        patch = np.arange(SIZE) // PATCH
        patch_of_pixel = patch[:, None] * PATCHES + patch[None, :]
        n = len(self.things) + 1
        counts = np.bincount((patch_of_pixel * n + self.ids + 1).reshape(-1), minlength=PATCHES**2 * n)
        counts = counts.reshape(PATCHES**2, n)[:, 1:]  # drop the count of "nothing"
        best = counts.argmax(1)
        best[counts.max(1) < 0.2 * PATCH**2] = -1
        return best.reshape(PATCHES, PATCHES)

    def _background(self, photographic: bool) -> np.ndarray:
        base = self.rng.uniform(25, 205, 3) if self.rng.random() < 0.5 else np.full(3, self.rng.uniform(20, 215))
        plain = np.broadcast_to(base, (SIZE, SIZE, 3)).astype(np.float32)
        if not photographic:
            return plain + self.rng.uniform(0, 6) * self.rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
        photo = self.assets.photos[self.rng.integers(len(self.assets.photos))]
        side = int(self.rng.integers(100, min(400, *photo.shape[:2]) + 1))
        y, x = (int(self.rng.integers(0, length - side + 1)) for length in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        strength = self.rng.uniform(0.35, 0.8)
        return strength * np.asarray(crop, dtype=np.float32) + (1 - strength) * plain

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        """A free block of cells, taken; its top left cell."""
        spots = [
            (r, c)
            for r in range(GRID - rows + 1)
            for c in range(GRID - columns + 1)
            if self.free[r : r + rows, c : c + columns].all()
        ]
        if not spots:
            return -1, -1
        r, c = spots[self.rng.integers(len(spots))]
        self.free[r : r + rows, c : c + columns] = False
        return r, c

    def _add(self, thing: Thing) -> int:
        self.things.append(thing)
        return len(self.things) - 1

    def _blend(self, y: int, x: int, alpha: np.ndarray, color: np.ndarray, thing: int | None) -> None:
        """Paints ``color`` through ``alpha`` (h, w) in 0..1, and marks the pixels as ``thing``'s."""
        h, w = alpha.shape
        region = self.pixels[y : y + h, x : x + w]
        region += alpha[..., None] * (color.astype(np.float32) - region)
        if thing is not None:
            self.ids[y : y + h, x : x + w][alpha > 0.35] = thing

    def _paint(self, name: str) -> np.ndarray:
        return np.clip(np.array(COLORS[name]) + self.rng.uniform(-14, 14, 3), 0, 255)

    def _shapes(self) -> None:
        cells = [tuple(map(int, cell)) for cell in np.argwhere(self.free)]
        n = min(int(self.rng.integers(3, 9)), len(cells))
        # A few colours and kinds repeat, so that counting has something to count.
        colors = self.rng.choice(COLOR_NAMES, size=int(self.rng.integers(3, 8)), replace=False)
        kinds = self.rng.choice(KINDS, size=int(self.rng.integers(3, 8)), replace=False)
        for index in self.rng.choice(len(cells), size=n, replace=False):
            row, column = cells[index]
            size = int(self.rng.choice((26, 30, 34, 38, 42)))
            color, kind = str(self.rng.choice(colors)), str(self.rng.choice(kinds))
            thing = self._add(Thing("shape", kind, color, row, column))
            edge, body = shape_masks(kind, size)
            y, x = (int(cell * CELL + self.rng.integers(2, CELL - len(edge) - 1)) for cell in (row, column))
            self._blend(y, x, edge, np.full(3, self.rng.uniform(0, 40)), None)
            self._blend(y, x, body, self._paint(color), thing)

    def _plate(self, row: int, column: int, light: bool) -> None:
        y, x = row * CELL, column * CELL
        shade = self.rng.uniform(215, 250) if light else self.rng.uniform(5, 45)
        top, left = self.rng.integers(2, 8, 2)
        alpha = np.full((CELL - 2 * top, 2 * CELL - 2 * left), self.rng.uniform(0.75, 1.0), dtype=np.float32)
        self._blend(y + top, x + left, alpha, np.full(3, shade), None)

    def _number(self, row: int, column: int, group: str, glyphs: list[tuple[int, np.ndarray]]) -> None:
        """Digits side by side, a little apart, somewhere inside a block of 1 x 2 cells."""
        light = bool(self.rng.random() < 0.6)
        self._plate(row, column, light)
        ink = self.rng.uniform(0, 60, 3) if light else self.rng.uniform(200, 255, 3)
        widths = [glyph.shape[1] for _, glyph in glyphs]
        gap = int(self.rng.integers(1, 5))
        total = sum(widths) + gap * (len(glyphs) - 1)
        x = column * CELL + int(self.rng.integers(8, max(9, 2 * CELL - 8 - total)))
        height = max(glyph.shape[0] for _, glyph in glyphs)
        y = row * CELL + int(self.rng.integers(8, max(9, CELL - 8 - height)))
        for slot, (digit, glyph) in enumerate(glyphs, start=1):
            thing = self._add(Thing(group, str(digit), slot=slot))
            self._blend(y, x, glyph, ink, thing)
            # A thin digit covers few pixels: its whole box is its own.
            self.ids[y : y + glyph.shape[0], x : x + glyph.shape[1]] = thing
            x += glyph.shape[1] + gap

    def _printed(self, row: int, column: int) -> None:
        if row < 0:
            return
        font = self.assets.fonts[self.rng.integers(len(self.assets.fonts))]
        size = int(self.rng.choice((28, 32, 36)))
        digits = self.rng.integers(0, 10, int(self.rng.integers(2, 5)))
        self._number(row, column, "printed", [(int(d), glyph_mask(str(font), size, int(d))) for d in digits])

    def _handwritten(self, row: int, column: int) -> None:
        if row < 0:
            return
        glyphs = []
        for _ in range(int(self.rng.integers(1, 3))):
            index = int(self.rng.integers(len(self.assets.digits)))
            side = int(self.rng.integers(28, 35))
            image = Image.fromarray((self.assets.digits[index] * 255).astype(np.uint8))
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            image = image.rotate(float(self.rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
            ink = np.clip(np.asarray(image, dtype=np.float32) / 255 * 1.3, 0, 1)
            columns = np.flatnonzero(ink.max(0) > 0.2)
            glyphs.append((int(self.assets.digit_labels[index]), ink[:, columns[0] : columns[-1] + 1]))
        self._number(row, column, "handwritten", glyphs)

    def _chart(self, row: int, column: int) -> None:
        if row < 0:
            return
        y, x = row * CELL + int(self.rng.integers(1, 6)), column * CELL + int(self.rng.integers(1, 6))
        side, unit, base = 2 * CELL - 8, 12, 2 * CELL - 10  # heights are multiples of one grid line
        dark = bool(self.rng.random() < 0.3)
        panel, line = (np.full(3, 45.0), np.full(3, 85.0)) if dark else (np.full(3, 240.0), np.full(3, 200.0))
        self._blend(y, x, np.ones((side, side), dtype=np.float32), panel, None)
        for level in range(9):
            self.pixels[y + base - level * unit - 1, x + 2 : x + side - 2] = line
        n = int(self.rng.integers(3, 6))
        colors = self.rng.choice([name for name in COLOR_NAMES if name != "white"], size=n, replace=False)
        heights = self.rng.choice(np.arange(1, 9), size=n, replace=False)
        pitch = (side - 8) // n
        width = min(pitch - 4, 18)
        for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
            thing = self._add(Thing("bar", "bar", str(color), height=int(height)))
            left, top = x + 6 + i * pitch, y + base - int(height) * unit
            self._blend(top, left, np.ones((int(height) * unit, width), np.float32), self._paint(str(color)), thing)


@cache
def shape_masks(kind: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(outline, body): two (size + 4, size + 4) masks in 0..1, antialiased."""
    scale, full = 4, (size + 4) * 4

    def mask(grow: float) -> np.ndarray:
        image = Image.new("L", (full, full))
        draw = ImageDraw.Draw(image)
        c, r = full / 2, size * scale / 2 + grow * scale
        if kind in ("circle", "ring"):
            draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
            if kind == "ring":
                inner = r * 0.5 - 2 * grow * scale
                draw.ellipse((c - inner, c - inner, c + inner, c + inner), fill=0)
        elif kind == "square":
            draw.rectangle((c - 0.85 * r, c - 0.85 * r, c + 0.85 * r, c + 0.85 * r), fill=255)
        elif kind == "cross":
            draw.rectangle((c - r, c - 0.33 * r, c + r, c + 0.33 * r), fill=255)
            draw.rectangle((c - 0.33 * r, c - r, c + 0.33 * r, c + r), fill=255)
        else:
            draw.polygon(_corners(kind, c, r), fill=255)
        return np.asarray(image.resize((size + 4, size + 4), Image.Resampling.BOX), dtype=np.float32) / 255

    return mask(1.5), mask(0.0)


def _corners(kind: str, c: float, r: float) -> list[tuple[float, float]]:
    points, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.42)}[kind]
    angles = [2 * np.pi * i / points - np.pi / 2 for i in range(points)]
    radii = [r * (inner if kind == "star" and i % 2 else 1.0) for i in range(points)]
    return [(c + q * np.cos(a), c + q * np.sin(a)) for a, q in zip(angles, radii, strict=True)]


@cache
def glyph_mask(font: str, size: int, digit: int) -> np.ndarray:
    """One printed digit, cut to its ink, (h, w) in 0..1; h is alike for all digits of a font and size."""
    face = ImageFont.truetype(font, size)
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, size // 4), str(digit), font=face, fill=255)
    top, bottom = face.getbbox("0123456789", anchor="la")[1::2]
    ink = np.asarray(image, dtype=np.float32)[size // 4 + top : size // 4 + bottom] / 255
    columns = np.flatnonzero(ink.max(0) > 0.1)
    return ink[:, columns[0] : columns[-1] + 1]
