"""Damaged and hostile files: an error of ours, or a result equal to that of the sound file; nothing else."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from searches.oracles import NeedOracle

from thinsight import Reduction, Schedule, gsearch, load_examples
from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example
from thinsight.job.opening import RunFolder

from .strategies import HOSTILE_NUMBERS, Raw, changed_json, damaged, json_values, texts

fuzz = settings(settings.get_profile("fuzz"))
T = TypeVar("T")


def _found(read: Callable[[], T], where: str) -> T | None:
    """What is read; None where it is refused, by a message that says where."""
    try:
        return read()
    except ThinsightError as error:
        message = str(error)
    assert where in message
    return None


# -- reductions: written by hand as well, so what a sound file says is what is read --------------------------

REDUCTION = Reduction(
    Schedule([1.0, 1.0, 0.5, 0.25]),
    ranker={"name": "text-attention", "rows": 8},
    base_model_name_or_path="owner/model",
    model_type="llava",
    search={"method": "gsearch", "max_drop": 0.01, "seed": 0},
    measured={"full_score": 0.9, "score": 0.9, "drop": {"value": 0.0, "low": -0.01, "high": 0.01}},
)


@cache
def _reduction_text() -> str:
    with TemporaryDirectory() as folder:
        REDUCTION.save_pretrained(folder)
        return (Path(folder) / "reduction_config.json").read_text(encoding="utf-8")


@fuzz
@given(st.data())
def test_reductions(data: st.DataObject) -> None:
    sound = _reduction_text()
    content = data.draw(
        st.one_of(
            changed_json(json.loads(sound)).map(lambda text: text.encode("utf-8", "surrogatepass")),
            damaged(sound.encode()),
        )
    )
    with TemporaryDirectory() as name:
        path = Path(name) / "reduction_config.json"
        path.write_bytes(content)
        try:
            found = Reduction.from_pretrained(name)
        except ThinsightError:
            return
        stored = json.loads(content)
        assert list(found.schedule.keep_rates) == stored["keep_rates"]
        assert all(math.isfinite(rate) for rate in found.schedule.keep_rates)
        again = Path(name) / "again"
        found.save_pretrained(again)  # what was read can be written, card included
        assert Reduction.from_pretrained(again) == found


@fuzz
@given(st.lists(st.one_of(st.floats(), st.integers(), json_values, st.just(10**400)), max_size=6))
def test_keep_rates(rates: list[Any]) -> None:
    try:
        schedule = Schedule(rates)
    except ThinsightError:
        return
    assert list(schedule.keep_rates) == rates
    assert all(0 <= low <= high <= 1 for high, low in itertools.pairwise(rates))


# -- data ----------------------------------------------------------------------------------------------------

LINE = {"id": "1", "image": "a.png", "question": "what ?", "answers": ["cat"], "metric": "exact_match", "task": "t"}


@cache
def _png() -> bytes:
    buffer = BytesIO()
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _load(folder: str, line: bytes, image: bytes) -> list[Example] | None:
    (Path(folder) / "a.png").write_bytes(image)
    (Path(folder) / "data.jsonl").write_bytes(line)
    try:
        return load_examples(Path(folder) / "data.jsonl")
    except ThinsightError:
        return None


@fuzz
@given(st.data())
def test_data_lines(data: st.DataObject) -> None:
    line = data.draw(
        st.one_of(
            changed_json(LINE).map(lambda text: text.encode("utf-8", "surrogatepass")),
            damaged(json.dumps(LINE).encode()),
        )
    )
    with TemporaryDirectory() as folder:
        found = _load(folder, line, _png())
        if found is None:
            return
        for example in found:
            stored = next(
                each
                for each in map(json.loads, filter(bytes.strip, line.split(b"\n")))
                if str(each["id"]) == example.id
            )
            assert example.question == stored["question"]
            assert len(example.images) == 1
            labels = stored.get("answers", stored.get("answer"))
            assert bool(example.answers) == (labels is not None)
            for text in (example.id, example.question, *example.answers, example.task or ""):
                text.encode()  # can be printed, saved and sent


@fuzz
@given(st.data())
def test_image_files(data: st.DataObject) -> None:
    image = data.draw(damaged(_png()))
    with TemporaryDirectory() as folder:
        found = _load(folder, json.dumps(LINE).encode(), image)
        assert found is None or len(found) == 1


# -- what a run resumes from -------------------------------------------------------------------------------

ORACLE = ((8, 6, 4, 2), (8, 8, 3, 1), (5, 2, 2, 0), (7, 6, 6, 6), (8, 1, 1, 1), (6, 6, 2, 2))


def _oracle() -> NeedOracle:
    return NeedOracle(8, ORACLE, lost=1)


@cache
def _journal() -> tuple[bytes, Schedule]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.jsonl"
        result = gsearch(_oracle(), max_drop=0.2, study=path)
        return path.read_bytes(), result.schedule


@fuzz
@given(st.data())
def test_journals(data: st.DataObject) -> None:
    sound, schedule = _journal()
    content = data.draw(damaged(sound))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.jsonl"
        path.write_bytes(content)
        found = _found(lambda: gsearch(_oracle(), max_drop=0.2, study=path, resume=True).schedule, path.name)
    assert found in (None, schedule)


@dataclass(frozen=True)
class Stage:
    """Such as a run keeps them."""

    score: float
    parts: tuple[float, ...]
    name: str


STAGE = Stage(0.875, (1.0, 0.0, 0.5), "found")


@fuzz
@given(st.data())
def test_stages_and_settings_of_a_run(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = RunFolder(name, resume=False)
        folder.bind({"seed": 3, "model": "demo"})
        folder.once("test", Stage, lambda: STAGE)
        files = sorted(path for path in Path(name).rglob("*.json"))
        path = data.draw(st.sampled_from(files))
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        again = RunFolder(name, resume=True)

        def resumed() -> Stage:
            again.bind({"seed": 3, "model": "demo"})
            return again.once("test", Stage, lambda: STAGE)

        assert _found(resumed, name) in (None, STAGE)


@fuzz
@given(st.sampled_from([*HOSTILE_NUMBERS, "[" * 20_000, '{"a":' * 20_000]), texts)
def test_hostile_stages(written: str, text: str) -> None:
    """Well-formed or not, a file in the place of a stage is never taken for one."""
    with TemporaryDirectory() as name:
        folder = RunFolder(name, resume=False)
        content = f'{{"score": {Raw(written)}, "parts": [], "name": {json.dumps(text)}}}'
        (Path(name) / "stages" / "test.json").write_text(content, encoding="utf-8")
        with pytest.raises(ThinsightError):
            folder.once("test", Stage, lambda: STAGE)
