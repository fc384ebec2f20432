"""The plots' geometry: steps where the rates step, texts that do not overlap, marks at the numbers."""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path

import matplotlib
import pytest
from PIL import ImageFont
from report.conftest import alike
from report.look import extreme

from thinsight.evaluation.result import Timing
from thinsight.report import plots
from thinsight.report.data import Interval, MethodRow

# a wide font, and the one that a browser without any of the page's own falls back to on Linux
_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
_TEXT = re.compile(r'<text x="([-\d.]+)" y="([-\d.]+)" class="([^"]+)" text-anchor="(\w+)">([^<]*)</text>')


def boxes(svg: str) -> list[tuple[str, float, float, float, float]]:
    """Every text of a plot with its left, right, top and bottom in pixels."""
    found = []
    for x, y, class_, anchor, text in _TEXT.findall(svg):
        bold, size = {"name", "strong"} & set(class_.split()), 13 if "strong" in class_ else 12
        face = _FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
        width = ImageFont.truetype(str(face), size).getlength(html.unescape(text))
        left = float(x) - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        found.append((text, left, left + width, float(y) - 9, float(y) + 3))
    return found


def check_texts(svg: str) -> None:
    """No text of a plot leaves it or lies on another."""
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    texts = boxes(svg)
    for text, left, right, top, bottom in texts:
        assert (left >= -1, right <= width + 1, top >= -1, bottom <= height + 1) == (True,) * 4, text
    for one, other in itertools.combinations(texts, 2):
        across = min(one[2], other[2]) - max(one[1], other[1])
        down = min(one[4], other[4]) - max(one[3], other[3])
        assert across <= 1 or down <= 1, (one[0], other[0])


def test_schedule_line_steps_once_per_change():
    svg = plots.schedule_plot((1.0, 1.0, 0.5, 0.5, 0.25), width=400, ident="a")
    line = re.search(r'd="([^"]+)" class="step s0"', svg).group(1)
    assert line.count("V") == 2
    assert line.count("H") == 5


def test_schedule_heights_are_proportional():
    svg = plots.schedule_plot((1.0, 0.5, 0.0), width=400, ident="a")
    line = re.search(r'd="M[\d.]+ ([\d.]+)H[\d.]+V([\d.]+)H[\d.]+V([\d.]+)H[\d.]+" class="step s0"', svg)
    top, middle, bottom = (float(v) for v in line.groups())
    assert middle == pytest.approx((top + bottom) / 2, abs=0.02)


def test_other_schedules_are_named():
    svg = plots.schedule_plot((1.0, 0.5), [("FastV & co", (1.0, 0.2), 2)], width=400, ident="a")
    assert "<title>FastV &amp; co</title>" in svg


def _rows(scores, cost=5e9):
    full = MethodRow("full", (), 0.95, None, 1.0, 2e10, 1.0, "", "full")
    return [
        full,
        *(
            MethodRow(f"m{i}", (), s, Interval(0.95 - s, 0.94 - s, 0.96 - s), 0.3, cost, 4.0)
            for i, s in enumerate(scores)
        ),
    ]


def test_equal_cost_is_spread_and_every_method_is_in_the_key_once():
    svg = plots.accuracy_plot(_rows([0.9, 0.9, 0.899, 0.901]), width=500, ident="a")
    names = re.findall(r'class="t name s\d" text-anchor="start">(\w+)<', svg)
    assert names == ["full", "m0", "m1", "m2", "m3"]
    whiskers = re.findall(r'<line x1="([\d.]+)"[^>]*class="whisker', svg)
    assert len(set(whiskers)) == 4


@pytest.mark.parametrize("width", [340, 500, 860])
@pytest.mark.parametrize("longest", [False, True])
def test_no_text_is_cut_off_or_lies_on_another(report, width, longest):
    report = extreme(report) if longest else report
    others = [(row.name, row.keep_rates, 2) for row in report.methods if row.keep_rates]
    for svg in (
        plots.schedule_plot(report.keep_rates, others, width=width, ident="a"),
        plots.accuracy_plot(report.methods, width=width, ident="a"),
        plots.drop_plot(report.methods, 0.01, width=width, ident="a"),
        plots.timing_plot(report.timing, width=width, ident="a"),
        plots.tau_plot(report.consistency, width=width, ident="a"),
        plots.matrix_plot(report.consistency.tau_matrix, width=width, ident="a"),
    ):
        assert boxes(svg)
        check_texts(svg)


@pytest.mark.parametrize("width", [340, 500])
def test_the_search_names_of_a_report_fit_whole(width):
    """The longest name that the main job gives to a method, beside scores that lie close together."""
    names = ["Sensitivity search, adaptive", "FastV-like (one step at layer 2)", "Uniform", "Random"]
    rows = [
        MethodRow(name, (), 0.9 + place / 2000, Interval(-0.12, -0.333, 0.123), 0.3, 5.7e9, 3.5)
        for place, name in enumerate(names)
    ]
    for svg in (
        plots.accuracy_plot([*_rows([])[:1], *rows], width=width, ident="a"),
        plots.drop_plot(rows, 0.01, width=width, ident="a"),
    ):
        check_texts(svg)
        assert set(names) <= {text for text, *_ in boxes(svg)}


def test_long_texts_are_cut_where_they_must_be():
    assert plots._fitting("short", 100) == "short"
    cut = plots._fitting("a name that is longer than its place", 100)
    assert cut.startswith("a name")
    assert cut.endswith("…")
    assert plots._wide(cut) <= 100


def test_spread_keeps_different_costs_in_place():
    assert plots._spread([1.0, 5.0, 9.0], close=0.5) == [0.0, 0.0, 0.0]
    assert plots._spread([1.0, 1.1, 9.0], close=0.5) == [-4.5, 4.5, 0.0]


def test_a_key_takes_as_many_lines_as_it_needs():
    assert plots._in_lines([100.0, 100.0, 101.0, 400.0, 50.0], 300.0) == [[0, 1], [2], [3], [4]]
    assert plots._in_lines([100.0, 100.0, 100.0], 300.0) == [[0, 1, 2]]


def test_drop_plot_marks_means_in_order():
    svg = plots.drop_plot(_rows([0.94, 0.9, 0.85]), 0.01, width=500, ident="a")
    marks = re.findall(r'<line x1="([\d.]+)"[^>]*x2="([\d.]+)"[^>]*class="whisker', svg)
    middles = [(float(a) + float(b)) / 2 for a, b in marks]
    assert middles == sorted(middles)
    assert len(middles) == 3
    assert 'class="allowed"' in svg
    assert plots.drop_plot(_rows([])[:1], width=500, ident="a") is None


@pytest.mark.parametrize("name", ["m", "a method with quite a long name, as some have"])
def test_drop_plot_names_fit_narrow_and_wide(name):
    row = MethodRow(name, (), 0.9, Interval(0.05, 0.04, 0.06), 0.3, 5e9, 4.0)
    for width in (340, 500):
        svg = plots.drop_plot([row], width=width, ident="a")
        assert name in svg
        assert "5.0 [4.0, 6.0]" in svg


def test_timing_bars_share_one_scale():
    timing = [Timing("prefill", (100.0,) * 7, (50.0,) * 7, 8), Timing("answer", (200.0,) * 7, (150.0,) * 7, 8)]
    svg = plots.timing_plot(timing, width=500, ident="a")
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert [w / widths[2] for w in widths] == pytest.approx([0.5, 0.25, 1.0, 0.75], abs=1e-3)


def test_tau_bars_skip_what_is_not_defined_and_reach_below_zero():
    svg = plots.tau_plot(alike((0.5, float("nan"), -0.3)), width=500, ident="a")
    assert svg.count("<rect") == 2
    assert "layer 3: tau \N{MINUS SIGN}0.30" in svg
    assert "n/a" in svg


def test_matrix_is_darkest_at_one():
    svg = plots.matrix_plot([[1.0, 0.2], [0.2, 1.0]], width=400, ident="a")
    cells = re.findall(r'fill-opacity="([\d.]+)"><title>layers (\d) and (\d)', svg)
    strength = {(i, j): float(v) for v, i, j in cells}
    assert strength["0", "0"] == 1.0
    assert strength["0", "1"] < 0.1


def test_task_bar_never_leaves_its_rail():
    svg = plots.task_bar(1.2, -0.1, ident="a", task="t")
    assert 'width="0"' in svg
    assert 'x1="119"' in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.02), (0.913, 0.914), (0, 26.1)])
def test_ticks_are_round_and_inside(low, high):
    ticks = plots._ticks(low, high, 5)
    assert 3 <= len(ticks) <= 11
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high + 1e-9


def test_colors_are_told_apart_by_kind():
    rows = [MethodRow(str(i), (), 0.5, None, 1.0, 1.0, 1.0) for i in range(8)]
    rows[3] = MethodRow("g", (), 0.5, None, 1.0, 1.0, 1.0, "", "found")
    rows[0] = MethodRow("f", (), 0.5, None, 1.0, 1.0, 1.0, "", "full")
    assert plots.series_of(rows) == [1, 2, 3, 0, 4, 5, 6, 7]
