"""`ts.show`, and the report of a search that ran in Python, on the tiny model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from thinsight.report.pictures import draw_kept

STEPS = ts.Schedule((1.0, 0.5, 0.25, 0.25))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


@pytest.fixture(scope="module")
def examples() -> list[ts.Example]:
    return [
        ts.Example(str(place), (image,), f"what color {'? ' * place}", metric="agreement", extra={"task": "color"})
        for place, image in enumerate(tiny_images(8))
    ]


def test_show_draws_the_image_and_the_kept_tokens_of_each_layer(model: Any) -> None:
    image = tiny_images(1)[0]
    figure = ts.show(model, tiny_processor(), image, "what $x$ ?", STEPS, max_new_tokens=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["the image", "layer 1: 8 tokens (50.0 %)", "layer 2: 4 tokens (25.0 %)"]
    assert figure.get_suptitle().startswith("what $x$ ?\nfull model: ")
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert (drawn[1] != drawn[2]).any()
    picture = Image.open(io.BytesIO(figure._repr_png_()))
    assert min(picture.size) > 200
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_show_draws_what_the_reduction_kept(model: Any) -> None:
    """The very tokens that the handle says entered the layer."""
    image, processor = tiny_images(1)[0], tiny_processor()
    figure = ts.show(model, processor, image, "what color ?", ts.Reduction(STEPS, "uniform"), layers=[3])
    (whole, kept) = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    reader = ts.Evaluator(model, processor, [ts.Example("1", (image,), "what color ?", metric="agreement")]).reader
    inputs = reader.batch([ts.Example("1", (image,), "what color ?")])
    with ts.apply(model, ts.Reduction(STEPS, "uniform")) as handle:
        model(**inputs)
        expected = handle.kept(3)[0].tolist()
    seen = Image.fromarray(whole)
    again = np.asarray(draw_kept(seen, (4, 4), expected, side=max(seen.size)))
    assert len(expected) == 4
    assert (kept == again).all()


def test_show_takes_a_path_and_a_folder(model: Any, tmp_path: Path) -> None:
    tiny_images(1)[0].save(tmp_path / "a.png")
    ts.Reduction(STEPS, "uniform").save_pretrained(tmp_path / "mine")
    found = ts.show(model, tiny_processor(), str(tmp_path / "a.png"), "what ?", tmp_path / "mine", max_new_tokens=1)
    assert len(found.axes) == 3
    full = ts.show(model, tiny_processor(), tmp_path / "a.png", "what ?", ts.Schedule.full(4), max_new_tokens=1)
    assert [axes.get_title() for axes in full.axes] == ["the image", "layer 3: 16 tokens (100.0 %)"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"layers": [4]}, "layers is 4"),
        ({"layers": []}, "layers is empty"),
        ({"reduction": 0.5}, "reduction is 0.5; pass a thinsight.Reduction"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_show_refuses_by_name(model: Any, told: dict[str, Any], message: str) -> None:
    given = {"image": tiny_images(1)[0], "question": "what ?", "reduction": STEPS, **told}
    with pytest.raises(ts.BadInput, match=message):
        ts.show(model, tiny_processor(), **given)


def test_without_matplotlib_show_names_the_extra(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "thinsight.report.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ts.MissingPackage, match=r"thinsight\[figures\]"):
        ts.show(model, tiny_processor(), tiny_images(1)[0], "what ?", STEPS)


# -- reports -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(model: Any, examples: list[ts.Example]) -> ts.SearchResult:
    return ts.search(model, tiny_processor(), examples, 0.9, certify=False, max_new_tokens=2)


def test_a_result_writes_what_it_knows(found: ts.SearchResult, tmp_path: Path) -> None:
    path = found.report(tmp_path / "a" / "search.html", title="<Mine>")
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "a" / "search.html"
    assert "<h1>&lt;Mine&gt;</h1>" in page
    assert f"All {len(found.trials)} trials of the search" in page
    assert "schedule-plot-wide" in page
    assert 'id="changed"' not in page  # nothing was run


def test_with_a_model_it_says_what_comes_of_it(
    found: ts.SearchResult, model: Any, examples: list[ts.Example], tmp_path: Path
) -> None:
    path = found.report(tmp_path / "r.html", model, tiny_processor(), examples, max_new_tokens=2, pictures=1)
    page = path.read_text(encoding="utf-8")
    evaluator = ts.Evaluator(model, tiny_processor(), examples, max_new_tokens=2)
    reduced = evaluator(found.reduction)
    assert f"it scores {100 * reduced.score:.1f} %" in page.replace("\N{NO-BREAK SPACE}", " ")
    for section in ("changed", "methods", "pictures", "tasks", "search", "measured"):
        assert f'<section id="{section}">' in page, section
    assert page.count('class="viewer"') == 1


def test_a_certified_result_shows_its_promise(model: Any, examples: list[ts.Example], tmp_path: Path) -> None:
    told = {"test_examples": examples[4:], "max_new_tokens": 2, "batch_size": 4}
    result = ts.search(model, tiny_processor(), examples[:4], 0.9, **told)
    assert result.certificate is not None
    page = result.report(tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<section id="promise">' in page
    assert result.certificate.fingerprint in page


def test_a_report_takes_all_or_nothing_of_a_model(found: ts.SearchResult, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ts.BadInput, match="model, processor and examples together"):
        found.report(tmp_path / "r.html", model)
    with pytest.raises(ts.BadInput, match="told batch_size without a model"):
        found.report(tmp_path / "r.html", batch_size=4)
    assert not (tmp_path / "r.html").exists()
