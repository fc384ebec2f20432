"""Images in every job: turned as transformers turns them, opened and processed once, and none that no example
within the limit shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import SmallRun
from tiny import tiny_images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from thinsight.errors import ThinsightError
from thinsight.job import commands
from thinsight.job.compare import compare
from thinsight.job.opening import load_sets
from thinsight.job.options import (
    AnalyzeOptions,
    BenchOptions,
    CompareOptions,
    EvaluateOptions,
    ModelOptions,
    SearchOptions,
    ShowOptions,
)
from thinsight.job.pipeline import search_and_report
from thinsight.progress import Watcher

ORIENTATION, QUARTER = 0x0112, 6
QUESTIONS = ("what color is the circle ?", "how many ?")


class Seen:
    """The files that PIL opens, and the pixels that the image processor is given."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.pixels: list[bytes] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    opening, processing = Image.open, CLIPImageProcessorPil.preprocess

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        found.opened.append(str(file))
        return opening(file, *args, **options)

    def processed(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        flat = [image for each in images for image in (each if isinstance(each, list) else [each])]
        found.pixels += [np.asarray(image).tobytes() for image in flat]
        return processing(self, images, *args, **options)

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(CLIPImageProcessorPil, "preprocess", processed)
    return found


def written(folder: Path, name: str, images: range, turn: bool) -> str:
    """A set of two questions about each image; turned ones are stored lying down, with EXIF data."""
    folder.mkdir(exist_ok=True)
    lines = []
    pictures = tiny_images(images.stop)
    for number in images:
        exif = pictures[number].getexif()
        if turn:
            exif[ORIENTATION] = QUARTER
        stored = pictures[number].transpose(Image.Transpose.ROTATE_90) if turn else pictures[number]
        stored.save(folder / f"{number}.png", exif=exif)
        lines += [{"id": f"{number} {q}", "image": f"{number}.png", "question": q, "task": q[:8]} for q in QUESTIONS]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def search_options(small: SmallRun, data: str | None, test: str | None, out: Path) -> SearchOptions:
    return SearchOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=data,
        test_data=test,
        max_drop=0.7,
        max_new_tokens=2,
        batch_size=4,
        timing_runs=1,
        new_tokens=2,
        pictures=2,
        out=out,
    )


def job(kind: Any, small: SmallRun, data: str, limit: int | None = None, **more: Any) -> Any:
    return kind(ModelOptions(small.model, device="cpu"), data, limit, **more)


def searched(small: SmallRun, first: str, second: str, out: Path) -> Any:
    data = search_and_report(search_options(small, first, second, out)).data
    pictures = [(np.asarray(each.image).tobytes(), each.kept, each.answer_full) for each in data.pictures]
    return [row.score for row in data.methods], data.keep_rates, data.consistency, pictures


def compared(small: SmallRun, first: str, second: str, out: Path) -> Any:
    options = CompareOptions(
        model=ModelOptions(small.model, device="cpu"),
        data=first,
        test_data=second,
        budgets=(0.5,),
        methods=("fitprune", "fastv"),
        max_new_tokens=2,
        out=out,
    )
    return [(run.keep_rates, run.per_example) for run in compare(options).comparison.runs]


def evaluated(small: SmallRun, first: str, second: str, out: Path) -> Any:
    data = commands.evaluate(job(EvaluateOptions, small, second, max_new_tokens=2))
    return [(row.score, row.flops) for row in data.methods]


def analyzed(small: SmallRun, first: str, second: str, out: Path) -> Any:
    return commands.analyze(job(AnalyzeOptions, small, second, out=out / "plot.html")).consistency


def benched(small: SmallRun, first: str, second: str, out: Path) -> Any:
    return commands.bench(job(BenchOptions, small, second, batch_size=2, runs=1, new_tokens=1)).flops


def shown(small: SmallRun, first: str, second: str, out: Path) -> Any:
    image = str(Path(second).parent / "4.png")
    pictures = [
        commands.show(
            job(ShowOptions, small, second, image=path, question=question, max_new_tokens=2, out=out / "kept.png")
        ).picture
        for path, question in ((image, QUESTIONS[0]), (None, None))
    ]
    return [(np.asarray(each.image).tobytes(), each.kept, each.answer_full) for each in pictures]


@pytest.mark.parametrize("command", [searched, compared, evaluated, analyzed, benched, shown])
def test_a_picture_stored_lying_down_is_the_one_stored_upright(
    command: Callable[..., Any], small: SmallRun, seen: Seen, tmp_path: Path
) -> None:
    results, pixels = [], []
    for turn in (False, True):
        folder = tmp_path / str(turn)
        first, second = (written(folder, name, images, turn) for name, images in (("a", range(4)), ("b", range(4, 7))))
        seen.pixels.clear()
        results.append(command(small, first, second, folder / "out"))
        pixels.append(list(seen.pixels))
    assert results[0] == results[1]
    assert pixels[0] == pixels[1]
    upright = {np.asarray(image).tobytes() for image in tiny_images(7)}
    assert set(pixels[1]) <= upright
    assert pixels[1]


@pytest.mark.parametrize(
    ("command", "images"), [(searched, 7), (compared, 7), (evaluated, 3), (analyzed, 3), (benched, 3), (shown, 2)]
)
def test_each_image_is_opened_and_processed_once_per_job(
    command: Callable[..., Any], images: int, small: SmallRun, seen: Seen, tmp_path: Path
) -> None:
    first, second = (written(tmp_path, name, r, False) for name, r in (("a", range(4)), ("b", range(4, 7))))
    command(small, first, second, tmp_path / "out")
    assert len(seen.pixels) == images
    files = [path for path in seen.opened if Path(path).parent == tmp_path]
    assert len(files) == images


def test_the_limit_counts_before_images_are_decoded(small: SmallRun, seen: Seen) -> None:
    sets = load_sets(small.both, None, 2)  # one file, split by image: 28 examples of 14 images
    assert [len(sets.calibration), len(sets.test)] == [2, 2]
    shown = {str(image) for example in (*sets.calibration, *sets.test) for image in example.images}
    assert set(seen.opened) == shown
    assert len(seen.opened) == len(shown) <= 4
    whole = load_sets(small.both, None, None)
    assert (sets.calibration, sets.test) == (whole.calibration[:2], whole.test[:2])


def test_a_bad_image_is_found_before_the_model_is_loaded(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path, "a", range(4), False)
    monkeypatch.setattr("thinsight.job.opening.load_model", lambda *_: pytest.fail("it was loaded"))
    Image.new("RGB", (30000, 1)).save(tmp_path / "2.png")
    with pytest.raises(ThinsightError, match=r"example '2 what color .*2.png' has 30000 x 1 pixels"):
        search_and_report(search_options(small, data, None, tmp_path / "out"))
    (tmp_path / "2.png").unlink()
    with pytest.raises(ThinsightError, match=r"example '2 what color .*2.png' does not exist"):
        search_and_report(search_options(small, data, None, tmp_path / "out"))
    with pytest.raises(ThinsightError, match=r"2.png' does not exist: give the path of an image file"):
        commands.show(job(ShowOptions, small, data, image=str(tmp_path / "2.png"), question="what ?"))


class Told(Watcher):
    def __init__(self) -> None:
        self.stage, self.said = "", []

    def on_stage(self, title: str) -> None:
        self.stage = title

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.said.append((self.stage, what, done, total))


def test_progress_shows_while_images_are_read(small: SmallRun) -> None:
    watcher = Told()
    commands.evaluate(job(EvaluateOptions, small, small.test, 4, max_new_tokens=1), watcher)
    reading, processing = "Reading the data", "Processing the images"
    expected = [(reading, "images", n, 4) for n in range(1, 5)]
    assert watcher.said[:6] == expected + [(processing, "images", n, 4) for n in (2, 4)]


def test_nothing_to_show_is_one_line(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    options = job(ShowOptions, small, str(tmp_path / "empty.jsonl"))
    with pytest.raises(ThinsightError, match="has no examples"):
        commands.show(options)
