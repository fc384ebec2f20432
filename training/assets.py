"""Fonts, photographs and handwritten digits, each split into training and held-out material.

Everything comes out of installed Python packages (matplotlib, scikit-image, scikit-learn and the font-*
packages), so no download is needed. Knows nothing about scenes, questions or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

# The digits stand in the data set writer by writer (13 writers, about 138 digits each): contiguous blocks
# with a gap between them keep the writers of the splits apart.
DIGIT_BLOCKS = {"train": (0, 1240), "calibration": (1290, 1515), "test": (1565, 1797)}

TRAINING_FONTS = (
    "Roboto-Regular", "Roboto-Medium", "Roboto-Bold", "Roboto-Italic", "Roboto-Light", "Roboto-Black",
    "Manrope-Regular", "Manrope-ExtraBold", "SourceSerifPro-Regular", "SourceSerifPro-Bold",
    "SourceSerifPro-It", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmtt10",
)  # fmt: skip
HELD_OUT_FONTS = ("SourceSansPro-Regular", "SourceSansPro-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "cmss10")

TRAINING_PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png",
    "camera.png", "moon.png", "ihc.png", "clock_motion.png", "china.jpg", "flower.jpg",
)  # fmt: skip
# Calibration takes its crops from the left half of these, test from the right half.
HELD_OUT_PHOTOS = ("hubble_deep_field.jpg", "retina.jpg", "coins.png")


@dataclass(frozen=True)
class Assets:
    """What a scene may be drawn with: font files, photographs (H, W, 3) uint8, digits (n, 8, 8) in 0..1."""

    fonts: tuple[Path, ...]
    photos: tuple[np.ndarray, ...]
    digits: np.ndarray
    digit_labels: np.ndarray


@lru_cache(maxsize=1)
def _font_files() -> dict[str, Path]:
    import font_manrope
    import font_roboto
    import font_source_sans_pro
    import font_source_serif_pro
    import matplotlib

    folders = [Path(matplotlib.get_data_path()) / "fonts" / "ttf"]
    folders += [
        Path(package.font_directory)
        for package in (font_manrope, font_roboto, font_source_sans_pro, font_source_serif_pro)
    ]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.[ot]tf"))}


def _photo_files() -> dict[str, Path]:
    import skimage
    import sklearn.datasets

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"]
    return {path.name: path for folder in folders for path in folder.iterdir()}


def _photo(name: str, side: str | None) -> np.ndarray:
    image = np.asarray(Image.open(_photo_files()[name]).convert("RGB"))
    half = image.shape[1] // 2
    return {None: image, "left": image[:, :half], "right": image[:, half:]}[side]


def load_assets(split: str) -> Assets:
    """The material of ``split``: "train", "calibration" or "test"."""
    from sklearn.datasets import load_digits

    held_out = split != "train"
    side = {"train": None, "calibration": "left", "test": "right"}[split]
    start, stop = DIGIT_BLOCKS[split]
    digits = load_digits()
    return Assets(
        fonts=tuple(_font_files()[name] for name in (HELD_OUT_FONTS if held_out else TRAINING_FONTS)),
        photos=tuple(_photo(name, side) for name in (HELD_OUT_PHOTOS if held_out else TRAINING_PHOTOS)),
        digits=(digits.images[start:stop] / 16.0).astype(np.float32),
        digit_labels=digits.target[start:stop],
    )
