"""Kept-token pictures: the right patches fade, the right ones keep their color, sizes fit the grid."""

from __future__ import annotations

import numpy as np
import pytest
from damage import failing_writes, full_disk
from PIL import Image

from thinsight.errors import BadInput, StorageError, ThinsightError
from thinsight.report.data import Picture
from thinsight.report.pictures import OUTLINE, contact_strip, data_uri, draw_kept, kept_mask, save_contact_strip

RED = Image.new("RGB", (64, 64), (220, 30, 40))


def _center(image: Image.Image, grid: tuple[int, int], index: int) -> tuple[int, int, int]:
    cell = image.width // grid[1]
    row, column = divmod(index, grid[1])
    return image.getpixel((column * cell + cell // 2, row * cell + cell // 2))


def test_mask_is_in_reading_order():
    mask = kept_mask((2, 3), [0, 5])
    assert mask.tolist() == [[True, False, False], [False, False, True]]


def test_dropped_patches_are_gray_and_dim_and_kept_ones_untouched():
    grid, kept = (4, 4), {1, 2, 9}
    drawn = draw_kept(RED, grid, kept, side=64)
    for index in range(16):
        red, green, blue = _center(drawn, grid, index)
        if index in kept:
            assert (red, green, blue) == (220, 30, 40)
        else:
            assert max(red, green, blue) - min(red, green, blue) < 20
            assert red < 110


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (336, 336)), ((24, 24), (336, 336)), ((2, 4), (336, 168))])
def test_size_is_whole_patches(grid, size):
    drawn = draw_kept(RED, grid, [0])
    assert drawn.size == size
    assert drawn.mode == "RGB"


def test_large_grid_keeps_patches_visible():
    assert draw_kept(RED, (200, 100), [0], side=100).size == (400, 800)


def test_outline_only_on_the_edge_of_kept_areas():
    drawn = np.asarray(draw_kept(RED, (4, 4), [5, 6], side=160))
    gold = (drawn == OUTLINE).all(axis=-1)
    assert gold.any()
    rows, columns = np.nonzero(gold)
    assert rows.min() == 40
    assert rows.max() == 79
    assert columns.min() == 40
    assert columns.max() == 119
    assert not gold[50:70, 70:90].any()  # the shared edge of two kept neighbors


def test_everything_kept_is_the_plain_image():
    drawn = np.asarray(draw_kept(RED, (4, 4), range(16), side=64))
    assert (drawn == np.asarray(RED)).all()


def test_nothing_kept_is_all_dim():
    drawn = np.asarray(draw_kept(RED, (4, 4), [], side=64)).astype(int)
    assert drawn.max() < 110
    assert not (drawn == OUTLINE).all(axis=-1).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_image_modes(mode):
    assert draw_kept(RED.convert(mode), (2, 2), [0], side=32).size == (32, 32)


@pytest.mark.parametrize(("grid", "kept"), [((2, 2), [4]), ((2, 2), [-1]), ((0, 2), [])])
def test_bad_indices_and_grids(grid, kept):
    with pytest.raises(ThinsightError, match="grid"):
        draw_kept(RED, grid, kept)


def test_data_uri_picks_the_smaller_kind():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8), "RGB")
    assert data_uri(RED).startswith("data:image/png;base64,")
    assert data_uri(noise).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(("columns", "lines"), [(None, 2), (6, 1), (1, 6)])
def test_contact_strip_grows_with_its_lines(report, columns, lines):
    picture = report.pictures[0]
    assert len(picture.layers) == 5
    sheet = contact_strip(picture, side=96, columns=columns)
    single = contact_strip(picture, side=96, columns=6)
    assert sheet.height == single.height + (lines - 1) * (96 + 26 + 16)


def test_contact_strip_wraps_a_long_question():
    long = Picture(RED, (2, 2), [[0]], (3,), "word " * 60, "a", "b", "c")
    short = Picture(RED, (2, 2), [[0]], (3,), "word", "a", "b", "c")
    tall, low = contact_strip(long), contact_strip(short)
    assert tall.width == low.width
    assert tall.height > low.height


def test_save_contact_strip(report, tmp_path):
    path = save_contact_strip(tmp_path / "new" / "strip.png", report.pictures[0], side=64)
    with Image.open(path) as image:
        assert image.format == "PNG"
    for ending in ("words", "", "msp", "svg"):  # msp: black and white alone
        with pytest.raises(BadInput, match=r"does not end like a picture: name a \.png file"):
            save_contact_strip(tmp_path / f"strip.{ending}", report.pictures[0])
    with pytest.raises(StorageError, match=r"cannot be written .*; name a .png file you may write"):
        save_contact_strip(path / "strip.png", report.pictures[0])
    with failing_writes(2, full_disk()), pytest.raises(StorageError, match="No space left"):
        save_contact_strip(path, report.pictures[0], side=32)
    with Image.open(path) as image:  # the old one
        image.load()
    assert [each.name for each in path.parent.iterdir()] == ["strip.png"]
