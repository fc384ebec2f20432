"""Pixels are those of transformers' own `load_image`, whatever the file; what cannot be read is one line."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_images
from transformers.image_utils import load_image

from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example, OpenedImages, check_images, check_size, image_key, open_image
from thinsight.evaluation.features import hash_image

ORIENTATION = 0x0112
UPRIGHT = {  # how the picture comes out of each stored orientation
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def a_picture(width: int = 12, height: int = 8) -> Image.Image:
    return tiny_images(1, size=32)[0].crop((0, 0, width, height))


def turned(path: Path, orientation: int, picture: Image.Image | None = None) -> Path:
    picture = (picture or a_picture()).copy()
    exif = picture.getexif()
    exif[ORIENTATION] = orientation
    picture.save(path, exif=exif, lossless=True)
    return path


def array(image: Image.Image) -> np.ndarray[Any, Any]:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every file that PIL opens."""
    seen: list[Any] = []
    original = Image.open

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        seen.append(file)
        return original(file, *args, **options)

    monkeypatch.setattr(Image, "open", counted)
    return seen


# -- the pixels of load_image --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_a_picture_is_turned_as_its_exif_data_says(ending: str, orientation: int, tmp_path: Path) -> None:
    path = turned(tmp_path / f"a.{ending}", orientation)
    expected = UPRIGHT[orientation](array(a_picture()))
    if ending == "jpg":
        with Image.open(path) as stored:
            expected = UPRIGHT[orientation](array(stored.convert("RGB")))
    with Image.open(path) as stored:
        assert np.array_equal(array(open_image(stored)), expected)  # a PIL image too
    assert np.array_equal(array(open_image(path)), expected)
    assert np.array_equal(array(load_image(str(path))), expected)


def test_a_pil_image_stays_as_it_is() -> None:
    picture = a_picture()
    picture.getexif()[ORIENTATION] = 6
    before = picture.tobytes()
    assert open_image(picture).size == (8, 12)
    assert (picture.tobytes(), picture.size, picture.getexif()[ORIENTATION]) == (before, (12, 8), 6)


def stored(folder: Path, mode: str) -> Path:
    """A file of each kind."""
    noise, path = a_picture(), folder / "a.png"
    if mode == "P with transparency":
        noise.quantize(8).save(path, transparency=bytes([0, 128, 255]))
    elif mode == "gif":
        path = path.with_suffix(".gif")
        noise.quantize(8).save(path, transparency=3)
    elif mode == "animated":
        path = path.with_suffix(".gif")
        noise.quantize(8).save(path, save_all=True, append_images=[noise.rotate(90).quantize(8)])
    elif mode in ("CMYK", "YCbCr"):
        path = path.with_suffix(".jpg")
        noise.convert(mode).save(path)
    elif mode in ("RGBA", "LA"):
        noise.putalpha(Image.linear_gradient("L").resize(noise.size))
        noise.convert(mode).save(path)
    else:
        noise.convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "RGB", "RGBA", "P", "P with transparency", "gif", "animated", "CMYK", "YCbCr"]
)
def test_every_mode_comes_out_as_transformers_loads_it(mode: str, tmp_path: Path) -> None:
    path = stored(tmp_path, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(path)
        with Image.open(path) as held:
            again = open_image(held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(array(opened), array(load_image(str(path))))
    assert np.array_equal(array(again), array(opened))


# -- wide gray, which load_image cuts off --------------------------------------------------------------------

WIDE = (np.arange(24 * 16, dtype=np.uint32).reshape(16, 24) * 65535 // 383).astype(np.uint16)
NARROW = np.rint(WIDE / 257).astype(np.uint8)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_gray_of_16_bits_is_scaled(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 24 16 65535\n" + WIDE.astype(">u2").tobytes())
    else:
        Image.fromarray(WIDE).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = array(open_image(path))
        with Image.open(path) as held:
            assert np.array_equal(array(open_image(held)), found)
    assert np.array_equal(found, np.repeat(NARROW[..., None], 3, axis=2))
    assert (array(load_image(str(path))) == 255).mean() > 0.9  # why


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bits_of_either_byte_order(byte_order: str, tmp_path: Path) -> None:
    Image.fromarray(WIDE.astype(byte_order)).save(tmp_path / "a.tif")
    assert np.array_equal(array(open_image(tmp_path / "a.tif"))[..., 0], NARROW)


def test_eight_bits_stored_in_sixteen_come_back() -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(eight.astype(np.uint16) * 257)
    assert np.array_equal(array(open_image(image))[..., 1], eight)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (NARROW.astype(np.float32) / 255, "0 is taken for black and 1 for white"),
        (NARROW.astype(np.float32), "0 is taken for black and 255 for white"),
        (NARROW.astype(np.float32) * 257, "0 is taken for black and 65535 for white"),
        (NARROW.astype(np.float32) * 3000, "0 is taken for black and 765000 for white"),
        (NARROW.astype(np.int32), "0 is taken for black and 255 for white"),
        (NARROW.astype(np.int32) * 257, "0 is taken for black and 65535 for white"),
    ],
)
def test_gray_without_a_white_is_scaled_with_a_warning(values: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    with pytest.warns(UserWarning, match=rf"image '.*deep.tif' is gray with values .*{said}"):
        found = array(open_image(path))
    assert np.array_equal(found[..., 0], NARROW)


def test_gray_below_0_and_without_a_number() -> None:
    values = np.array([[-1.0, 0.0, 1.0], [np.nan, np.inf, -np.inf]], dtype=np.float32)
    with pytest.warns(UserWarning, match="-1 is taken for black and 1 for white"):
        found = array(open_image(Image.fromarray(values)))
    assert found[..., 0].tolist() == [[0, 128, 255], [0, 255, 0]]
    with pytest.warns(UserWarning, match="from 0 to 0"):
        assert not array(open_image(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))).any()


# -- bounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30000, 1), (1, 3000), (201, 1), (4020, 20)])
def test_a_strip_is_refused_before_it_is_decoded(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", size).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    expected = rf"^e: image '.*strip.png' has {size[0]} x {size[1]} pixels, one edge more than 200 times"
    with pytest.raises(ThinsightError, match=expected):
        open_image(path, "e")


def test_a_strip_of_200_to_1_is_taken(tmp_path: Path) -> None:
    Image.new("RGB", (200, 1)).save(tmp_path / "strip.png")
    assert open_image(tmp_path / "strip.png").size == (200, 1)


@pytest.mark.parametrize("side", [9500, 20000])  # PIL warns of the one and refuses the other
def test_too_many_pixels_are_refused_by_the_header(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ThinsightError, match=r"large.png' has .* 89478485.*make it smaller"):
            open_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_bound_is_that_of_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 95)
    with pytest.raises(ThinsightError, match=r"a.png' has 12 x 8 pixels; at most 95 are taken"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ThinsightError, match=r"^image has 12 x 8 pixels; at most 95 are taken"):
        open_image(a_picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "a.png").size == (12, 8)


def test_a_resize_of_the_shorter_edge_counts() -> None:
    check_size((200, 1), "it", 336)
    check_size((4000, 20), "it", 336)
    with pytest.raises(ThinsightError, match="it has 200 x 1 pixels, which the processor would resize to 2"):
        check_size((200, 1), "it", 1024)


def test_an_image_without_pixels() -> None:
    with pytest.raises(ThinsightError, match="has 0 x 4 pixels: give one that is not empty"):
        open_image(Image.new("RGB", (0, 4)))


def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_picture().save(tmp_path / "a.png")

    def full(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", full)
    with pytest.raises(ThinsightError, match=r"a.png' does not fit into memory: make it smaller"):
        open_image(tmp_path / "a.png")


def test_no_damage_changes_a_pixel(tmp_path: Path) -> None:
    path, found = tmp_path / "a.png", 0
    a_picture(32, 32).save(path)
    data = path.read_bytes()
    places = range(data.index(b"IDAT") + 4, len(data) - 12, 41)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            assert np.array_equal(array(open_image(path)), array(a_picture(32, 32)))
        except ThinsightError as error:
            found += "a.png' is truncated or no image" in str(error)
    assert found > 0.9 * len(places)


# -- what tells images apart ---------------------------------------------------------------------------------


def hashed(image: Any) -> str:
    digest = hashlib.sha256()
    hash_image(digest, image)
    return digest.hexdigest()


def test_images_that_look_different_have_different_keys() -> None:
    plain, turned_, palette = a_picture(), a_picture(), a_picture().quantize(4)
    turned_.getexif()[ORIENTATION] = 6
    other = palette.copy()
    other.putpalette([7, 7, 7] * 4)
    images = [plain, turned_, palette, other]
    assert len({image_key(image) for image in images}) == 4
    assert len({hashed(image) for image in images}) == 4
    assert image_key(plain) == image_key(plain.copy())
    assert image_key(open_image(turned_)) == image_key(turned_)  # one picture, stored in two ways


def test_features_of_pictures_that_were_not_turned_have_other_names(tmp_path: Path) -> None:
    path = turned(tmp_path / "a.png", 6)
    data = path.read_bytes()
    before = hashlib.sha256(json.dumps(["file", len(data)], sort_keys=True).encode() + data).hexdigest()
    assert hashed(path) != before


# -- decoded once --------------------------------------------------------------------------------------------


def test_what_was_checked_is_not_opened_again(opens: list[Any], tmp_path: Path) -> None:
    a_picture().save(tmp_path / "a.png")
    examples = [Example(str(n), (tmp_path / "a.png",), "what ?") for n in range(3)]
    check_images(examples)
    check_images(examples)
    assert np.array_equal(array(examples[1].open_images()[0]), array(a_picture()))
    assert len(opens) == 1
    examples[0].open_images()  # it was handed out
    assert len(opens) == 2


def test_an_image_that_stands_twice_in_a_prompt_is_opened_once(opens: list[Any], tmp_path: Path) -> None:
    a_picture().save(tmp_path / "a.png")
    found = Example("e", (tmp_path / "a.png",) * 2, "same ?").open_images()
    assert len(opens) == 1
    assert found[0] is found[1]


def test_what_has_no_room_is_opened_again(opens: list[Any], tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, picture in zip(paths, tiny_images(3, size=8), strict=True):
        picture.save(path)
    held = OpenedImages(most_bytes=2 * 3 * 8 * 8)
    for path in paths:
        held.check(path.name, path, "e")
    assert len(opens) == 3
    for path, picture in zip(paths, tiny_images(3, size=8), strict=True):
        assert np.array_equal(array(held.take(path.name, path, "e")), array(picture))
    assert opens[3:] == paths[2:]


def test_a_file_that_changed_is_opened_again(opens: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    a_picture().save(path)
    held = OpenedImages()
    held.check("a", path, "e")
    Image.new("RGB", (40, 40), "red").save(path)
    assert held.take("a", path, "e").size == (40, 40)
    assert len(opens) == 2


def test_copies_of_examples_carry_no_pixels(tmp_path: Path) -> None:
    a_picture(32, 32).save(tmp_path / "a.png")
    example = Example("e", (tmp_path / "a.png",), "what ?")
    check_images([example])
    sent = pickle.dumps(example)
    assert len(sent) < 1000
    assert pickle.loads(sent) == example
    assert "opened" not in repr(example)
