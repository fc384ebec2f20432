"""The HTML report: well formed, self-contained, escaped, and with every number of its data in it."""

from __future__ import annotations

import base64
import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from report.conftest import alike, with_changes
from rich.console import Console

from thinsight import shown
from thinsight.errors import ThinsightError
from thinsight.evaluation import drop_interval
from thinsight.evaluation.result import Timing
from thinsight.report import data as d
from thinsight.report import words
from thinsight.report.html import render, write_report
from thinsight.report.pictures import draw_kept, even_columns
from thinsight.report.plots import VOID, Markup, number, tag


class Page(HTMLParser):
    """Keeps a stack of open tags, every attribute, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parents: list[tuple[str, ...]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.parents.append(tuple(self.open))
        self.elements.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{name}>"
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


@pytest.fixture(scope="module")
def html(report) -> str:
    return render(report)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_well_formed(html, page):
    assert html.startswith("<!DOCTYPE html>")
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_links_point_into_the_page(page):
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = [attributes["href"] for attributes in page.all("a") if "download" not in attributes]
    assert len(links) == 8
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_nothing_is_loaded_and_nothing_runs(html, page):
    for name, attributes in page.elements:
        assert name not in {"script", "iframe", "object", "embed", "base", "form"}
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "srcset", "data", "action", "xlink:href", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), f"<{name} {key}={value}>"
    assert "http://" not in html
    assert "https://" not in html
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_policy_forbids_loading(page):
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_style_serves_phone_dark_and_print(html, page):
    for query in ("prefers-color-scheme: dark", "max-width: 680px", "@media print"):
        assert query in html
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_wide_tables_scroll_in_their_own_box(page):
    boxes = [place for place, (_, attributes) in enumerate(page.elements) if attributes.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table")) == 6
    for place in boxes:
        assert page.elements[place + 1][0] == "table"
        assert page.elements[place][1]["tabindex"] == "0"


def test_every_plot_has_title_and_description(html):
    plots = re.findall(r'<svg [^>]*role="img".*?</svg>', html, re.DOTALL)
    assert len(plots) == 2 * 6 + 7  # six plots for wide and narrow windows, a bar for each of seven tasks
    for svg in plots:
        title = re.search(r'<title id="([^"]+)">([^<]+)</title>', svg)
        description = re.search(r'<desc id="([^"]+)">([^<]+)</desc>', svg)
        assert title
        assert description
        assert f'aria-labelledby="{title.group(1)} {description.group(1)}"' in svg


def test_every_other_svg_is_hidden_from_readers(page):
    for attributes in page.all("svg"):
        assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"


def test_plots_stay_inside_their_box(html):
    for svg in re.findall(r'<svg [^>]*role="img".*?</svg>', html, re.DOTALL):
        width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        for x in re.findall(r' (?:x|x1|x2|cx)="([-\d.]+)"', svg):
            assert -0.01 <= float(x) <= width + 0.01
        for y in re.findall(r' (?:y|y1|y2|cy)="([-\d.]+)"', svg):
            assert -0.01 <= float(y) <= height + 0.01


def test_headline_is_said_in_words(page, report):
    assert "2.63\N{MULTIPLICATION SIGN} fewer decoder FLOPs, drop 0.3 points [\N{MINUS SIGN}0.5, 1.1]" in page.text
    assert (
        words.headline(report.headline)
        == "2.63\N{MULTIPLICATION SIGN} fewer decoder FLOPs, drop 0.3 points [\N{MINUS SIGN}0.5, 1.1]"
    )


def test_every_number_appears(page, report):
    text = page.text
    head = report.headline
    for value in (head.full_score, head.score, head.mean_keep_rate):
        assert shown.percent(value) in text
    for value in (head.flops_ratio, head.kv_ratio, head.prefill_ratio, head.answer_ratio):
        assert shown.ratio(value) in text
    for value in (head.flops_full, head.flops, head.vision_flops):
        assert shown.flops(value) in text
    for row in report.methods:
        told = [row.name, row.note, shown.percent(row.score), shown.flops(row.flops), shown.ratio(row.flops_ratio)]
        told += [words.ends(row.drop)] if row.drop else []
        assert all(one in text for one in told), row.name
    for row in report.per_task:
        assert f"{row.task}{row.n}{shown.percent(row.full)}{shown.percent(row.reduced)}" in text
    for row in report.timing:
        assert f"{shown.milliseconds(row.full_ms)}{shown.milliseconds(row.reduced_ms)}{shown.ratio(row.ratio)}" in text
    for value in (*report.consistency.tau, *report.keep_rates):
        assert shown.plain(value) in text or shown.percent(value) in text
    for row in report.trials:
        assert shown.percent(row.keep_rate) in text
    for one in (*report.environment.values(), *report.commands, report.dataset.test_hash, report.model.name):
        assert one in text
    assert report.consistency.summary() in text


def test_says_that_the_gain_is_in_prefill(page):
    assert "The gain is in prefill" in page.text


def test_schedule_counts_follow_the_one_rounding_rule(report):
    rates = (1.0, 0.5, 0.3, 0.0)
    data = d.ReportData("t", d.ModelInfo("m", num_layers=4, num_vision_tokens=10), keep_rates=rates)
    assert re.search(r"0100\.0 %10150\.0 %5230\.0 %330\.0 %0", Page(render(data)).text)


def test_pictures_are_inside_with_alternative_text(page, report):
    images = page.all("img")
    assert len(images) == sum(1 + len(picture.layers) for picture in report.pictures)
    for image in images:
        assert re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$", image["src"])
        assert len(image["alt"]) > 10
    first = report.pictures[0]
    assert any(f"layer {first.layers[0]}: {len(first.kept[0])} of" in image["alt"] for image in images)


def test_pictures_are_as_wide_as_the_card_allows(report, page):
    """One image in a viewer of its shape; drawings of a sheet in at most four columns, and lines of like length."""
    rows = [a["style"] for a in page.all("fieldset") if a.get("class") == "viewer"]
    assert rows == ["--aspect:1.0000"] * len(report.pictures)
    assert [even_columns(number) for number in range(1, 10)] == [1, 2, 3, 4, 3, 3, 4, 4, 3]
    assert "width: min(100%, 420px * var(--aspect))" in rule(".viewer")
    assert draw_kept(Image.new("RGB", (8, 8)), (16, 16), []).width == 336  # drawn as wide as it can be shown
    assert all("loading" not in image for image in page.all("img"))  # all is in the page: nothing to wait for


def test_the_slider_has_a_stop_for_each_layer_and_needs_no_script(report, page):
    """One radio button is one stop, so that the keyboard works and nothing has to run; each has its mask behind it."""
    for place, picture in enumerate(report.pictures, 1):
        stops = [a for a in page.all("input") if a.get("name") == f"layer-of-{place}"]
        assert [a["aria-label"].split(":")[0] for a in stops] == ["the image", *(f"layer {i}" for i in picture.layers)]
        assert sum("checked" in a for a in stops) == 1
        assert all(f"{len(kept)} token" in a["aria-label"] for a, kept in zip(stops[1:], picture.kept, strict=True))
    assert len([a for a in page.all("input") if a.get("class") == "enlarge"]) == len(report.pictures)
    assert ".stop input:checked ~ .kept" in resources.files("thinsight.report").joinpath("style.css").read_text("utf-8")


def test_a_layer_costs_a_mask_and_no_image(report, page):
    images = page.all("img")
    for picture in report.pictures:
        first, *masks = images[: 1 + len(picture.layers)]
        del images[: 1 + len(picture.layers)]
        assert first["alt"].startswith("The image of question")
        assert all(len(mask["src"]) < 2000 < len(first["src"]) for mask in masks)
        for mask, kept in zip(masks, picture.kept, strict=True):
            assert (mask["width"], mask["height"]) == (first["width"], first["height"])
            with Image.open(io.BytesIO(base64.b64decode(mask["src"].split(",")[1]))) as drawn:
                opacity = np.asarray(drawn.convert("RGBA"))[..., 3]
            cell = len(opacity) // picture.grid[0]
            clear = np.flatnonzero(opacity[cell // 2 :: cell, cell // 2 :: cell].ravel() == 0)
            assert clear.tolist() == list(kept)


def downloads(page: Page) -> dict[str, str]:
    links = [a for a in page.all("a") if "download" in a]
    found = {a["download"]: base64.b64decode(a["href"].split(";base64,")[1]).decode() for a in links}
    assert len(found) == len(links)
    return found


def test_every_figure_and_table_is_a_file_too(report, page):
    files = downloads(page)
    drawings = {name: ElementTree.fromstring(text) for name, text in files.items() if name.endswith(".svg")}
    assert len(drawings) == len(page.all("figure")) == 6
    for drawing in drawings.values():
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(drawing.get("width")) > 400
        assert "--s0: #3451d1" in drawing.find("{*}style").text
    tables = {name: list(csv.reader(io.StringIO(text))) for name, text in files.items() if name.endswith(".csv")}
    assert len(tables) == len(page.all("table"))
    assert all(len({len(row) for row in rows}) == 1 for rows in tables.values())
    header, *rows = tables["methods.csv"]
    assert header[:4] == ["Method", "Score in %", "Drop in points [95 %]", "Mean keep rate in %"]
    assert [row[0] for row in rows] == [row.name for row in report.methods]
    assert [float(row[1]) for row in rows] == [round(100 * row.score, 1) for row in report.methods]


def test_changed_answers_stand_side_by_side(report):
    changed = with_changes(report, worse=60, better=40)
    page = Page(render(changed))
    assert page.open == []
    assert "100 of the 1,024 test questions score differently: 60 worse, 40 better." in page.text
    assert "The first 50 of them stand here" in page.text
    header, *rows = csv.reader(io.StringIO(downloads(page)["changed-answers.csv"]))
    assert len(rows) == 50
    assert header[1:4] == ["Expected", "Full model", "Reduced"]
    assert {row[3] for row in rows} >= {words.SILENT}
    assert [page.text.count(f"scores {how}") for how in ("worse", "better", "the same")] == [1, 1, 1]
    assert "no fair sample" in page.text
    none = Page(render(replace(report, changes=d.Changes(1024, 0, 0))))
    assert "None of the 1,024 test questions scores differently." in none.text
    assert "changed-answers.csv" not in downloads(none)


def test_hostile_texts_of_changed_answers_stay_texts(report):
    formula = "=cmd()" + EVIL
    page = Page(render(with_changes(hostile_report(EVIL), text=formula)))
    assert page.open == []
    assert not page.all("script")
    assert len(page.all("img")) == 2
    files = downloads(page)
    _, *rows = csv.reader(io.StringIO(files["changed-answers.csv"]))
    assert {row[0] for row in rows} == {"'" + formula}  # a text, which no spreadsheet computes
    for name, text in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
            assert "<script" not in text


def test_a_card_is_never_narrower_than_its_number():
    assert "display: flex" in rule(".cards")
    assert "min-width: min-content" in rule(".key")
    assert "white-space: nowrap" in rule(".key .value")


def rule(selector: str) -> str:
    """What the style sheet says first about a selector, for screens of any width."""
    style = resources.files("thinsight.report").joinpath("style.css").read_text("utf-8")
    return re.search(rf"^{re.escape(selector)} {{(.*?)}}", style, re.M | re.S).group(1)


def test_trials_are_folded_away(page):
    titles = [page.parents[i] for i, (name, _) in enumerate(page.elements) if name == "summary"]
    assert len(titles) == 3
    assert all(parents[-1] == "details" for parents in titles)
    assert not any("open" in attributes for attributes in page.all("details"))
    assert "All 28 trials of the search" in page.text


EVIL = '<script>alert("x")</script>&\'"</style><img src=http://evil.example onerror=x>'


def hostile_report(text: str) -> d.ReportData:
    """A report each of whose texts is this one."""
    image = Image.new("RGB", (8, 8))
    interval = d.Interval(0.01, 0.0, 0.02)
    return d.ReportData(
        title=text,
        model=d.ModelInfo(text, text, text, text, text, 1, 2, 4),
        dataset=d.DatasetInfo(text, 3, text, 4, text, text, text),
        headline=d.Headline(0.9, 0.8, interval, 0.5, 2.0),
        search=d.SearchInfo(text, 0.01, text, text),
        keep_rates=(1.0, 0.5),
        methods=(
            d.MethodRow(text, (1.0, 1.0), 0.9, None, 1.0, 2e9, 1.0, text, "full"),
            d.MethodRow(text, (1.0, 0.5), 0.8, interval, 0.75, 1e9, 2.0, text, "found"),
            d.MethodRow(text, (1.0, 0.4), 0.8, interval, 0.75, 1e9, 2.0, text),
        ),
        per_task=(d.TaskRow(text, 3, 0.9, 0.8),),
        timing=(Timing(text, (2.0,) * 3, (1.0,) * 3, 1),),
        consistency=alike((0.5,)),
        pictures=(d.Picture(image, (2, 2), [[0]], (1,), text, text, text, text),),
        environment={text: text},
        commands=(text,),
        created=text,
    )


def test_everything_is_escaped():
    page = Page(render(hostile_report(EVIL)))
    assert page.open == []
    assert not page.all("script")
    assert len(page.all("img")) == 2
    assert len(page.all("style")) == 1
    assert page.text.count("<script>alert(") > 20


def test_controls_and_half_characters_are_shown_as_escapes():
    page = render(hostile_report("a\x1b[31mb\x9b \ud800 \u202ec"))
    page.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)
    assert page.count("a\\x1b[31mb\\x9b \\ud800 \\u202ec") > 20


def test_least_report_has_no_empty_sections(bare_report):
    page = Page(render(bare_report))
    assert page.open == []
    assert len(page.all("section")) == 1
    assert not page.all("nav")
    assert "some/model" in page.text


@pytest.mark.parametrize("part", ["headline", "search", "consistency", "dataset"])
def test_any_part_may_be_missing(report, part):
    page = Page(render(replace(report, pictures=(), **{part: None})))
    assert page.open == []
    assert "None" not in page.text


@pytest.mark.parametrize("part", ["methods", "per_task", "timing", "trials", "keep_rates", "commands"])
def test_any_list_may_be_empty(report, part):
    page = Page(render(replace(report, pictures=(), **{part: ()})))
    assert page.open == []


def test_odd_shapes_still_draw(report):
    one = d.MethodRow("only", (), 0.5, d.Interval(0.0, 0.0, 0.0), 0.5, 0.0, 1.0)
    data = replace(
        report,
        model=d.ModelInfo("m"),
        keep_rates=(1.0,),
        methods=(one,),
        timing=(Timing("t", (0.0,), (0.0,), 1),),
        consistency=alike((float("nan"), -0.4), ((1.0, -0.2, 0.1),) * 3),
        pictures=(),
    )
    text = render(data)
    assert Page(text).open == []
    assert "nan" not in re.sub(r"<[^>]*>", "", text).replace("n/a", "")
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_write_report(bare_report, tmp_path):
    path = write_report(tmp_path / "new" / "report.html", bare_report)
    assert path.read_text(encoding="utf-8") == render(bare_report)
    with pytest.raises(ThinsightError, match="cannot be written"):
        write_report(path / "inside-a-file.html", bare_report)


def test_tag_escapes_children_and_attributes():
    assert tag("p", "a<b", title='"x"') == '<p title="&quot;x&quot;">a&lt;b</p>'
    assert tag("p", Markup("<b>x</b>"), None, class_=None) == "<p><b>x</b></p>"
    assert tag("br") == "<br>"
    assert number(-0.001) == "0"
    assert number(1.50) == "1.5"


def test_winner_is_named_whoever_it_is(report):
    text = words.ranking(report.methods)
    assert text.startswith("G-Search scores highest, 93.8 %; FastV-like follows 3.8 points behind")
    better = tuple(replace(row, score=0.99) if row.name == "random" else row for row in report.methods)
    assert words.ranking(better).startswith("random scores highest, 99.0 %")
    level = tuple(replace(row, score=0.9) for row in report.methods)
    assert "level at 90.0 %" in words.ranking(level)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        (d.Interval(0.02, 0.01, 0.03), "low end of the 95 % interval is 1.00 points"),
        (d.Interval(0.0, -0.01, 0.008), "The interval contains 0"),
        (d.Interval(0.0, -0.01, 0.008), "none of up to 0.80 points is ruled out"),
        (d.Interval(-0.02, -0.03, -0.01), "beyond chance: by 1.00 points at the near end"),
    ],
)
def test_interval_in_words(drop, says):
    assert says in words.drop_meaning(drop, None)


@pytest.mark.parametrize("n", [3, 64, 1152, 20_000])
def test_equal_answers_are_no_certainty_in_words(n):
    """64 equal answers leave room for 5 points: no "[0.0, 0.0]", no "unlikely"."""
    drop = drop_interval(np.ones(n), np.ones(n))
    said = words.drop_meaning(drop, d.SearchInfo("G-Search", max_drop=0.0))
    assert "unlikely" not in said
    assert "reaches beyond that" in said
    low, high = re.search(r"\[(.+), (.+)\]", words.interval(drop).replace("\N{MINUS SIGN}", "-")).groups()
    assert float(low) <= -100 * min(1, 3.7 / n)
    assert float(high) >= 100 * min(1, 3.7 / n)


def test_ends_are_rounded_away_from_each_other():
    assert words.outward(d.Interval(0.0, -0.0041, 0.0103)) == (-0.5, 1.1)
    assert words.outward(d.Interval(0.01, 0.01, 0.012)) == (1.0, 1.2)
    assert words.ends(d.Interval(0.0, -0.0, 0.00001)) == "[0.0, 0.1]"


def test_a_score_of_nothing_says_so(report):
    headline = replace(report.headline, full_score=0.0, score=0.0, drop=drop_interval([0.0] * 8, [0.0] * 8))
    bad = replace(report, headline=headline, doubts=("on the test set the full model scores 0.0 % <why>",))
    page = Page(render(bad))
    assert "Warning: on the test set the full model scores 0.0 % <why>" in page.text
    assert "the drop says nothing" in page.text
    assert "no loss could be told" not in page.text
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(bad)
    assert "Warning: on the test set the full model scores 0.0 % <why>" in console.file.getvalue()
    assert "the drop says nothing" in console.file.getvalue()
    assert "Warning" not in Page(render(report)).text


def test_interval_against_the_allowed_drop():
    search = d.SearchInfo("G-Search", max_drop=0.01)
    assert "is within the 1.0 points" in words.drop_meaning(d.Interval(0.0, -0.01, 0.009), search)
    assert "reaches beyond that" in words.drop_meaning(d.Interval(0.0, -0.01, 0.011), search)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (shown.points(-0.0001), "0.0"),
        (shown.points(-0.012), "\N{MINUS SIGN}1.2"),
        (shown.ratio(1.96), "1.96\N{MULTIPLICATION SIGN}"),
        (shown.flops(3.95e12), "3.95 TFLOPs"),
        (shown.flops(999.0), "999 FLOPs"),
        (shown.milliseconds(12_500), "12.5 s"),
        (shown.milliseconds(412.7), "413 ms"),
        (shown.duration(148), "2 min 28 s"),
        (shown.duration(7500), "2 h 5 min"),
        (shown.duration(1.714), "1.71 s"),
        (shown.parameters(14_200_000), "14.2M"),
        (words.fewer(0.5, "FLOPs"), "2.00\N{MULTIPLICATION SIGN} more FLOPs"),
        (words.faster(0.8, "prefill ran"), "prefill ran 1.25\N{MULTIPLICATION SIGN} slower"),
        (shown.percent(float("nan")), "n/a"),
        (shown.tokens(1), "1 token"),
    ],
)
def test_numbers_in_words(got, expected):
    assert got == expected
