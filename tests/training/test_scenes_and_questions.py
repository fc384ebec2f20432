"""Scenes know what they show, questions have the answers that the scene has, and the splits share nothing."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from training import assets, make_data
from training.assets import Assets, load_assets
from training.model import ARCHITECTURES
from training.packed import LENGTH, encode_question
from training.questions import (
    COARSE_WEIGHTS,
    FIRST_WEIGHTS,
    LAST_WEIGHTS,
    LATER_WEIGHTS,
    NUMBERS,
    TASKS,
    WORDS,
    Question,
    ask,
)
from training.scenes import CELL, PATCH, PATCH_LABELS, SIZE, Scene, draw_scene


@pytest.fixture(scope="module")
def material() -> Assets:
    return load_assets("train")


@pytest.fixture(scope="module")
def asked(material: Assets) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(5)
    scenes = [draw_scene(rng, material) for _ in range(60)]
    return [(scene, q) for scene in scenes for q in ask(rng, scene, 8, FIRST_WEIGHTS)]


def test_a_seed_gives_one_scene(material: Assets) -> None:
    first, second = (draw_scene(np.random.default_rng(3), material) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert first.things == second.things
    assert not np.array_equal(first.pixels, draw_scene(np.random.default_rng(4), material).pixels)


def test_patches_belong_to_what_is_drawn_there(asked: list[tuple[Scene, Question]]) -> None:
    for scene, _ in asked[::8]:
        for i in scene.of("shape"):
            rows, columns = np.nonzero(scene.owner == i)
            assert len(rows), "a shape fills at least one patch"
            cells = {(r * PATCH // CELL, c * PATCH // CELL) for r, c in zip(rows, columns, strict=True)}
            assert cells == {(scene.things[i].row, scene.things[i].column)}
        labels = scene.labels()
        assert labels.shape == (len(PATCH_LABELS), (SIZE // PATCH) ** 2)
        assert (labels[:, scene.owner.reshape(-1) < 0] == 0).all()
        assert (labels.max(1) < list(PATCH_LABELS.values())).all()


def test_every_task_is_asked(asked: list[tuple[Scene, Question]]) -> None:
    assert {question.task for _, question in asked} == set(TASKS)


def test_answers_are_those_of_the_scene(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        words = question.text.split()
        about = [scene.things[i] for i in question.about]
        if question.task == "color":
            assert question.answer == about[0].color
            assert sum(scene.things[i].kind == words[4] for i in scene.of("shape")) == 1
        elif question.task == "count":
            of = words[2] if words[2] != "shapes" else None
            counted = [t for t in scene.things if t.group == "shape" and (of is None or of in (t.color, t.kind))]
            assert question.answer == NUMBERS[len(counted)]
            assert about == counted
        elif question.task == "relation":
            a, b = about
            down, right = a.row - b.row, a.column - b.column
            moved = {"left": -right, "right": right, "above": -down, "below": down}
            assert max(moved, key=lambda direction: moved[direction]) == question.answer
        elif question.task in ("printed", "handwritten"):
            assert question.answer.split() == [t.kind for t in scene.things if t.group == question.task]
        elif question.task == "extreme bar":
            best = max if words[4] == "tallest" else min
            assert question.answer == best(about, key=lambda bar: bar.height).color
        elif question.task == "bar height":
            assert question.answer == NUMBERS[about[0].height]
            assert about[0].color == words[4]


def test_words_point_at_what_they_name(asked: list[tuple[Scene, Question]]) -> None:
    pointing = 0
    for scene, question in asked:
        line = [*question.text.split(), "assistant", ":", *question.answer.split()]
        for word, things in question.points:
            named = [scene.things[i] for i in things]
            if question.task in ("printed", "handwritten"):
                assert line[word + 1] == named[0].kind, "a digit written looks for the next one"
            elif question.task in ("color", "position", "relation"):
                assert line[word] == named[0].kind
            pointing += 1
    assert pointing > 100


def test_questions_fit_the_vocabulary_and_the_length(asked: list[tuple[Scene, Question]]) -> None:
    assert set(FIRST_WEIGHTS) == set(LATER_WEIGHTS) == set(LAST_WEIGHTS) == set(COARSE_WEIGHTS) == set(TASKS)
    for _, question in asked:
        assert {*question.text.split(), *question.answer.split()} <= set(WORDS)
        for architecture in ARCHITECTURES.values():
            prompt, answer = encode_question(question, architecture.vocabulary)
            assert len(prompt) + len(answer) - 1 <= LENGTH


def test_splits_share_no_digit_writer_font_or_photograph() -> None:
    blocks = sorted(assets.DIGIT_BLOCKS.values())
    assert all(stop + 40 <= start for (_, stop), (start, _) in itertools.pairwise(blocks))
    assert not set(assets.TRAINING_FONTS) & set(assets.HELD_OUT_FONTS)
    assert not set(assets.TRAINING_PHOTOS) & set(assets.HELD_OUT_PHOTOS)
    calibration, test = load_assets("calibration"), load_assets("test")
    assert calibration.fonts == test.fonts
    for left, right in zip(calibration.photos, test.photos, strict=True):
        assert not np.array_equal(left, right[:, : left.shape[1]])


def test_the_frozen_questions_are_those_of_the_generator(tmp_path) -> None:
    for split in make_data.IMAGES:
        make_data.write_split(split, 2024, tmp_path, 12)
        drawn = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        frozen = (make_data.DEMO / f"{split}.jsonl").read_text().splitlines()
        assert len(drawn) == 36
        assert drawn == frozen[:36]


def test_the_frozen_sets_are_disjoint_and_large_enough() -> None:
    sets = {
        split: [json.loads(line) for line in (make_data.DEMO / f"{split}.jsonl").read_text().splitlines()]
        for split in make_data.IMAGES
    }
    assert len(sets["calibration"]) >= 384
    assert len(sets["test"]) >= 1024
    assert len(sets["certification"]) == 3000
    for one, other in itertools.combinations(sets.values(), 2):
        assert not {e["image"] for e in one} & {e["image"] for e in other}
    pictures = [path.read_bytes() for path in (make_data.DEMO / "images").iterdir()]
    assert len(set(pictures)) == len(pictures) == sum(make_data.IMAGES.values())
    for examples in sets.values():
        assert {e["task"] for e in examples} == set(TASKS)
        assert {e["background"] for e in examples} == {"plain", "photograph"}


def test_further_images_are_drawn_beside_the_package(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["make_data", "--further", "4", "--out", str(tmp_path)])
    make_data.main()
    drawn = [json.loads(line) for line in (tmp_path / "further.jsonl").read_text().splitlines()]
    assert len(drawn) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"images", "further.jsonl"}
    certification = {path.read_bytes() for path in (make_data.DEMO / "images").iterdir()}
    assert not certification & {path.read_bytes() for path in (tmp_path / "images").iterdir()}
    monkeypatch.setattr("sys.argv", ["make_data", "--further", "4"])
    with pytest.raises(SystemExit):
        make_data.main()
    assert "--out" in capsys.readouterr().err
