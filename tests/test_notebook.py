"""In a notebook: objects as HTML whose markup is ours alone, and progress in one place below the cell."""

from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from report.conftest import make_report
from test_shown import COMPARISON, EVIL, FOUND, OBJECTS, REDUCTION, STEP

import thinsight as ts
from thinsight import notebook
from thinsight.certificate import Certificate, Step
from thinsight.drawing import VOID
from thinsight.progress import Progress, SearchPlan, Watcher
from thinsight.report.data import Picture
from thinsight.schedule import Adaptive
from thinsight.shown import notebook_style

CERTIFICATE = Certificate(
    (STEP, ts.Schedule((1.0, 0.25, 0.25))),
    (Step(0.9, 1, 2, 0.01, 1.0, True), Step(0.8, 9, 1, 0.5, 1.0, False)),
    400,
    200,
    0.05,
    0.95,
    0.9,
    "f",
    metric=EVIL,
)
FAMILY = Adaptive("concentration", 1, (0.5,), (STEP, ts.Schedule((1.0, 1.0, 0.0))), (0.25, 0.75))
PICTURE = make_report(pictures=1).pictures[0]
MORE: dict[str, Any] = {
    "schedule": STEP,
    "adaptive": FAMILY,
    "reduction of a family": replace(REDUCTION, schedule=FAMILY.mean(), adaptive=FAMILY),
    "certificate": CERTIFICATE,
    "certified search": replace(FOUND, certificate=CERTIFICATE, reduction=replace(REDUCTION, certificate=CERTIFICATE)),
    "picture": PICTURE,
    "report with pictures": make_report(pictures=2),
}
ALL = {**{name: item for name, (item, _) in OBJECTS.items()}, **MORE}


class Page(HTMLParser):
    """Reads a page, and holds that every element is closed in the order in which it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_gets_one_well_formed_element(name: str) -> None:
    page = ALL[name]._repr_html_()
    read = Page(page)
    assert page.startswith('<div class="thinsight"><style>')
    assert page.rstrip().endswith("</div>")
    assert not {"script", "iframe", "link"} & set(read.names)
    assert not [each for each in read.attributes if each[0].startswith("on")]
    assert all((value or "").startswith("data:") for key, value in read.attributes if key in ("src", "href"))


@pytest.mark.parametrize("name", ["schedule", "adaptive", "reduction", "search", "frontier", "certificate"])
def test_a_schedule_is_drawn_as_svg(name: str) -> None:
    page = ALL[name]._repr_html_()
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    steps = [each for each in drawing.iter("path") if "step" in each.get("class", "").split()]
    assert len(steps) == (3 if name == "adaptive" else 1)
    assert drawing.find("title").text == "Keep rate of every decoder layer"
    assert f"From {100:.1f} % of the vision tokens at layer 0" in drawing.find("desc").text


def test_drawings_of_one_name_are_the_same() -> None:
    """Names are of the page, which may hold the outputs of many cells."""
    found = {ts.Schedule.step(8, 2, rate)._repr_html_().split('labelledby="')[1][:20] for rate in (0.5, 0.25, 0.5)}
    assert len(found) == 2


def test_no_text_of_a_user_becomes_markup() -> None:
    evil = '<img src=x onerror=alert(1)>"&\x1b[2J'
    picture = replace(PICTURE, question=evil, answer_full=evil, truth=evil)
    report = replace(make_report(pictures=0), title=evil, doubts=(evil,), pictures=(picture,))
    comparison = replace(COMPARISON, doubt=evil, runs=(replace(COMPARISON.runs[0], title=evil),))
    reduction = ts.Reduction(STEP, {"name": "random", "note": evil}, base_model_name_or_path="m", model_type=evil)
    found = replace(FOUND, method=evil, trials=(replace(FOUND.trials[0], layer=None, why=evil),))
    for item in (picture, report, comparison, reduction, found):
        page = item._repr_html_()
        assert "<img src=x" not in page
        assert "\x1b" not in page
        assert '<img src=x onerror=alert(1)>"&\\x1b[2J' in Page(page).text


def test_a_picture_shows_the_image_and_every_layer() -> None:
    read = Page(PICTURE._repr_html_())
    assert read.names.count("img") == len(PICTURE.layers) + 1
    for layer, kept in zip(PICTURE.layers, PICTURE.kept, strict=True):
        assert f"layer {layer}: {len(kept)} token" in read.text
    empty = Picture(PICTURE.image, (2, 2), ((),), (3,), "q")
    assert "layer 3: 0 tokens" in Page(empty._repr_html_()).text


def test_long_tables_are_folded() -> None:
    assert "details" not in Page(ts.Schedule.full(12)._repr_html_()).names
    assert "details" in Page(ts.Schedule.full(13)._repr_html_()).names


def test_the_style_sheet_stays_in_our_element_and_knows_the_dark() -> None:
    """Every rule begins inside our class; a notebook's own word on dark comes behind the browser's."""
    sheet, depth, outer = str(notebook_style()), 0, []
    start = 0
    for place, letter in enumerate(sheet):
        if letter == "{":
            if depth == 0:
                outer.append(sheet[start:place].strip())
            depth += 1
        elif letter == "}":
            depth -= 1
            start = place + 1
    assert depth == 0
    assert [each for each in outer if not each.endswith(".thinsight") and not each.startswith("@media")] == []
    assert ":root" not in sheet
    assert sheet.index("prefers-color-scheme: dark") < sheet.index('data-jp-theme-light="true"')
    light, dark = sheet.split("--ink: ")[1][:7], sheet.split("--ink: ")[2][:7]
    assert light != dark
    assert [part[:7] for part in sheet.split("--ink: ")[1:]] == [light, dark, light, dark]


# -- short lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_object_is_one_short_line_without_arrays(name: str) -> None:
    line = repr(ALL[name])
    assert len(line) <= 300
    assert line.isprintable()
    assert "array(" not in line


def test_a_run_is_one_line() -> None:
    assert repr(COMPARISON.runs[0]) == "Run('fastv' at 0.5: score 0.5)"
    assert repr(replace(COMPARISON.runs[0], seed=3, refused="no")) == "Run('fastv' at 0.5, seed 3: refused: no)"
    assert repr(COMPARISON) == "Comparison(m: 1 methods at 1 budgets, 2 examples of t, full model 1)"


# -- progress ------------------------------------------------------------------------------------------------


class Display:
    """Stands for IPython: a shell with a kernel, and what was displayed in each output."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []
        self.shell = SimpleNamespace(kernel=object(), execution_count=1)
        self.display = SimpleNamespace(display=self._display)

    def get_ipython(self) -> Any:
        return self.shell

    def _display(self, data: dict[str, str], *, raw: bool, display_id: bool, metadata: dict[str, str]) -> Any:
        assert raw
        assert display_id
        assert metadata == {"thinsight": "progress"}
        output = [data]
        self.outputs.append(output)
        return SimpleNamespace(update=lambda data, **told: output.append(data))


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    made = Display()
    monkeypatch.setitem(sys.modules, "IPython", made)
    monkeypatch.delenv(notebook.VARIABLE, raising=False)
    monkeypatch.setattr(notebook, "_place", notebook._Place())
    monkeypatch.setattr(notebook, "_LEAST", 0.0)
    return made


def test_nothing_is_drawn_outside_of_a_notebook(monkeypatch: pytest.MonkeyPatch, display: Display) -> None:
    assert isinstance(notebook.watcher(), notebook.NotebookWatcher)
    monkeypatch.setenv(notebook.VARIABLE, "0")
    assert type(notebook.watcher()) is Watcher
    assert notebook.progress() is None
    monkeypatch.delenv(notebook.VARIABLE)
    del display.shell.kernel  # IPython in a terminal
    assert type(notebook.watcher()) is Watcher
    monkeypatch.delitem(sys.modules, "IPython")
    assert notebook.progress() is None


def test_a_search_and_its_evaluator_share_one_output(display: Display) -> None:
    tell, watcher = notebook.progress(), notebook.watcher()
    assert tell is not None
    tell("full model", 8, 16)
    tell("full model", 16, 16)
    watcher.on_start(SearchPlan("gsearch", 4, 2, 16, 1.0, 0.01, recorded=5, expected=10))
    watcher.on_trial(FOUND.trials[0], Progress(layer=3, evaluations=6, expected=10, seconds=6.0))
    tell("reduced model", 8, 16)
    watcher.on_end(FOUND)
    watcher.on_note(f"note {EVIL}")
    (output,) = display.outputs
    lines = [each["text/plain"].splitlines()[-1] for each in output]
    assert lines[0] == "full model 8/16"
    assert lines[1].startswith("✓ full model 16/16  0:0")
    assert "gsearch: layer 3, 8 tokens: score 0.875, at most 0:04 left" in lines
    assert any("0:04 left · reduced model 8/16" in line for line in lines)
    assert any(line.startswith("✓ gsearch: 2 evaluations  0:0") for line in lines)
    assert output[-1]["text/plain"].startswith("5 evaluations are in the journal")
    Page(output[-1]["text/html"])
    assert "<b>" not in output[-1]["text/html"]
    assert '<progress style="' in output[0]["text/html"]
    assert 'value="8" max="16"' in output[0]["text/html"]


def test_each_cell_has_a_place_of_its_own(display: Display) -> None:
    watcher = notebook.watcher()
    watcher.on_stage("Reading")
    display.shell.execution_count = 2
    watcher.on_progress("images", 1, 2)
    assert [each[-1]["text/plain"] for each in display.outputs] == ["Reading", "images 1/2"]


def test_what_comes_at_once_is_drawn_once(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "_LEAST", 3600.0)
    tell = notebook.progress()
    assert tell is not None
    for done in range(1, 101):
        tell("images", done, 100)
    (output,) = display.outputs
    assert len(output) == 2  # the first, and the end
    assert output[-1]["text/plain"].startswith("✓ images 100/100")
