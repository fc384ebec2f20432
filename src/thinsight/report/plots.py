"""The report's plots as inline SVG, written by hand so that a report needs no script and no picture file.

Colors and fonts come from the page's style sheet by class name. Every plot takes its width in pixels, so that a phone
gets a drawing of its own and not a shrunken one, and an `ident` that is unique in the page. Escaping is by
construction, see drawing.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from .. import shown
from ..drawing import VOID as VOID
from ..drawing import Axis, Canvas, layer_ticks, number, tag
from ..drawing import schedule_plot as schedule_plot
from ..evaluation.result import RankConsistency, Timing
from . import words
from .data import MethodRow

_SLIM, _BROAD = frozenset(" .,:;'|!()[]-fijlrtI1"), frozenset(f"%mwMW@{shown.TIMES}{shown.MINUS}")
_GAP = 9.0  # distance between points of equal cost that are spread sideways
_CORNERS: dict[int, list[tuple[float, float]]] = {  # of the marker shapes that are no circle, about (0, 0)
    1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    2: [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
    3: [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    4: [(-1.15, -0.85), (1.15, -0.85), (0, 1.25)],
}
_MARK, _KEY_GAP, _KEY_LINE = 16.0, 18.0, 19.0  # of the key: room for a marker, between names, for a line
_SAME_COST = 0.025  # share of the axis below which two costs are drawn as one


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, roughly `about` of them."""
    raw = (high - low) / max(about, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _marker(canvas: Canvas, series: int, x: float, y: float, class_: str) -> None:
    """A point; its shape changes with the series so that color is never the only sign."""
    shape, size = series % 5, 4.6
    if shape == 0:
        canvas.add("circle", cx=x, cy=y, r=size, class_=class_)
        return
    scale = size * 0.88
    points = " ".join(f"{number(x + a * scale)},{number(y + b * scale)}" for a, b in _CORNERS[shape])
    canvas.add("polygon", points=points, class_=class_)


def standalone(drawn: Markup, sheet: str) -> str:
    """A plot as an SVG file that looks as on a light page: on white, its style sheet inside."""
    width, height = drawn.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    font = "svg { font-family: system-ui, 'Liberation Sans', sans-serif; background: #fff; }"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    body = str(drawn).replace("<svg ", head, 1).replace(">", f"><style>{sheet}{font}</style>", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def marker_sample(series: int) -> Markup:
    """A method's marker by itself, to stand before its name in a table."""
    canvas = Canvas(12, 12, "", "", "")
    _marker(canvas, series, 6, 6, f"dot s{series}")
    return tag("svg", *canvas.elements, viewBox="0 0 12 12", class_="key-mark", aria_hidden="true")


def series_of(methods: Sequence[MethodRow]) -> list[int]:
    """The color and marker number of each method: 0 the search's, 1 the full model, 2 to 7 the baselines."""
    baselines = itertools.cycle(range(2, 8))
    return [{"found": 0, "full": 1}[row.kind] if row.kind != "baseline" else next(baselines) for row in methods]


def _spread(costs: Sequence[float], close: float) -> list[float]:
    """Sideways shift in pixels of each point, so that points of (nearly) the same cost stand side by side."""
    groups: list[list[int]] = []  # from the cheapest to the dearest
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if groups and costs[i] - costs[groups[-1][0]] <= close:
            groups[-1].append(i)
        else:
            groups.append([i])
    shifts = [0.0] * len(costs)
    for group in groups:
        for place, member in enumerate(sorted(group)):
            shifts[member] = (place - (len(group) - 1) / 2) * _GAP
    return shifts


def _wide(text: str) -> float:
    """Pixels that a line of the plots' 12 px text takes, in a wide font and in bold."""
    return math.fsum(4.9 if c in _SLIM else 11.5 if c in _BROAD or ord(c) > 0x1100 else 8.2 for c in text)


def _fitting(text: str, room: float) -> str:
    """The text, cut where it is too long for ``room`` pixels."""
    if _wide(text) <= room:
        return text
    letters = next(n for n in range(len(text), -1, -1) if _wide(text[:n] + "…") <= room or n == 0)
    return f"{text[:letters].rstrip()}…"


def _in_lines(widths: Sequence[float], room: float) -> list[list[int]]:
    """The places of things of these widths, in lines no wider than ``room`` as far as each one fits."""
    lines: list[list[int]] = [[]]
    left = room
    for i, width in enumerate(widths):
        if lines[-1] and width > left:
            lines.append([])
            left = room
        lines[-1].append(i)
        left -= width
    return lines


def accuracy_plot(methods: Sequence[MethodRow], *, width: int, ident: str) -> Markup:
    """Score against decoder FLOPs, one point per method, with the 95 % interval of its drop, and a key.

    Points of equal cost are spread sideways by a few pixels so that each interval can be seen.
    """
    names = [_fitting(row.name, width - _MARK) for row in methods]
    widths = [_MARK + _wide(name) + _KEY_GAP for name in names]
    lines = _in_lines(widths, width + _KEY_GAP)
    plot = 320 if width > 400 else 280
    height = plot + _KEY_LINE * len(lines)
    full_score = next((row.score for row in methods if row.kind == "full"), None)
    ranges = [  # (low, score, high): the interval of the drop, hung under the full model's score
        (row.score,) * 3
        if row.drop is None or full_score is None
        else (full_score - row.drop.high, row.score, full_score - row.drop.low)
        for row in methods
    ]
    scale, unit = shown.flops_unit(max(row.flops for row in methods))
    costs = [row.flops / scale for row in methods]
    bottom, top = min(r[0] for r in ranges), max(r[2] for r in ranges)
    pad = max(0.08 * (top - bottom), 0.005)
    y = Axis(bottom - pad, top + pad, plot - 46, 12)
    ticks = {tick: f"{100 * tick:g} %".replace("-", shown.MINUS) for tick in _ticks(y.low, y.high, 5)}
    x = Axis(0, max(costs) * 1.06 or 1, 10 + max(map(_wide, ticks.values())), width - 12)
    said = "; ".join(f"{row.name}: {shown.percent(row.score)} at {shown.flops(row.flops)}" for row in methods)
    canvas = Canvas(width, height, "Score against decoder FLOPs", f"{said}.", ident)
    canvas.levels(x, y, ticks)
    canvas.line(x.start, y.start, x.end, y.start, "axis")
    for tick in _ticks(0, x.high, 5 if width > 400 else 4):
        canvas.text(x(tick), y.start + 18, f"{tick:g}", "t muted", "middle")
    canvas.text((x.start + x.end) / 2, plot - 6, f"decoder {unit} per prompt", "t muted", "middle")
    if full_score is not None:
        canvas.line(x.start, y(full_score), x.end, y(full_score), "reference")
    series = series_of(methods)
    shifts = _spread(costs, _SAME_COST * (x.high - x.low))
    for place, (low, score, high) in enumerate(ranges):
        at = x(costs[place]) + shifts[place]
        if high > low:
            canvas.line(at, y(low), at, y(high), f"whisker s{series[place]}")
        _marker(canvas, series[place], at, y(score), f"dot s{series[place]}")
    for place, line in enumerate(lines):
        at, middle = 0.0, plot + _KEY_LINE * (place + 0.5)
        for i in line:
            _marker(canvas, series[i], at + 6, middle, f"dot s{series[i]}")
            canvas.text(at + _MARK, middle + 4, names[i], f"t name s{series[i]}")
            at += widths[i]
    return canvas.close()


def drop_plot(methods: Sequence[MethodRow], max_drop: float | None = None, *, width: int, ident: str) -> Markup | None:
    """The drop of every reduced method with its interval, in points; None when no method has one."""
    rows = [
        (row, series, row.drop)
        for row, series in zip(methods, series_of(methods), strict=True)
        if row.drop is not None and row.kind != "full"
    ]
    if not rows:
        return None
    longest = max(_wide(row.name) for row, _, _ in rows) + 16
    values = max(_wide(words.interval(drop)) for _, _, drop in rows) + 8
    beside = longest + values + 130 <= width  # else a name stands above its interval
    tall, head = (32, 10) if beside else (44, 10)
    height = head + tall * len(rows) + 44
    edges = [0.0, max_drop or 0.0, *(v for _, _, drop in rows for v in (drop.low, drop.high))]
    pad = max(0.05 * (max(edges) - min(edges)), 0.002)
    x = Axis(min(edges) - pad, max(edges) + pad, longest if beside else 14, width - values)
    said = "; ".join(f"{row.name}: {words.interval(drop)} points" for row, _, drop in rows)
    canvas = Canvas(width, height, "Drop against the full model, with its 95 % interval", f"{said}.", ident)
    base = head + tall * len(rows)
    for tick in _ticks(x.low, x.high, 6 if width > 400 else 4):
        canvas.line(x(tick), head, x(tick), base, "grid")
        canvas.text(x(tick), base + 18, f"{100 * tick:g}".replace("-", shown.MINUS), "t muted", "middle")
    canvas.line(x(0), head, x(0), base, "zero")
    if max_drop:
        canvas.line(x(max_drop), head, x(max_drop), base, "allowed")
    title = "drop in points (left is better)"
    middle = max((x.start + x.end) / 2, _wide(title) / 2)
    canvas.text(middle, height - 6, title, "t muted", "middle")
    for place, (row, series, drop) in enumerate(rows):
        middle = head + tall * place + (16 if beside else 31)
        baseline = middle + 4 if beside else middle - 14
        canvas.text(0, baseline, _fitting(row.name, width), f"t name halo s{series}")
        canvas.text(width, middle + 4, words.interval(drop), "t halo", "end")
        canvas.line(x(drop.low), middle, x(drop.high), middle, f"whisker s{series}")
        _marker(canvas, series, x(drop.mean), middle, f"dot s{series}")
    return canvas.close()


def task_bar(full: float, reduced: float, *, ident: str, task: str) -> Markup:
    """A bar of the reduced score with a mark at the full model's, for a table cell; both are fractions."""
    width, height = 120.0, 14.0
    title = f"{task}: full {shown.percent(full)}, reduced {shown.percent(reduced)}"
    said = "The bar is the reduced model's score, the mark the full model's."
    canvas = Canvas(width, height, title, said, ident)
    canvas.rect(0, 4, width, 6, rx=3.0, class_="rail")
    canvas.rect(0, 4, width * min(max(reduced, 0), 1), 6, rx=3.0, class_="fill s0")
    at = min(max(full, 0), 1) * (width - 2) + 1
    canvas.line(at, 0, at, height, "tick")
    return canvas.close("task-bar")


def timing_plot(timing: Sequence[Timing], *, width: int, ident: str) -> Markup:
    """Two bars for every measurement, full above reduced, all on one scale of milliseconds."""
    tall, head = 74, 6
    height = head + tall * len(timing)
    longest = max(max(row.full_ms, row.reduced_ms) for row in timing)
    x = Axis(0, longest or 1, 0, width - 84)
    said = "; ".join(
        f"{row.what}: {shown.milliseconds(row.full_ms)} full, {shown.milliseconds(row.reduced_ms)} reduced, "
        f"ratio {shown.ratio(row.ratio)}"
        for row in timing
    )
    canvas = Canvas(width, height, "Measured time, full against reduced", f"{said}.", ident)
    for place, row in enumerate(timing):
        top = head + tall * place
        canvas.text(0, top + 12, _fitting(f"{row.what}, batch {row.batch}", width - 84), "t strong")
        canvas.text(width, top + 12, shown.ratio(row.ratio), "t strong", "end")
        for offset, value, class_ in ((20, row.full_ms, "bar full"), (41, row.reduced_ms, "bar s0")):
            canvas.rect(0, top + offset, max(x(value), 1.0), 17, rx=3.0, class_=class_)
            canvas.text(x(value) + 7, top + offset + 13, shown.milliseconds(value), "t muted")
    return canvas.close()


def tau_plot(found: RankConsistency, *, width: int, ident: str) -> Markup:
    """Kendall's tau between neighboring layers, and the overlap of their top tokens."""
    tau, overlap = found.tau.tolist(), found.topk_overlap.tolist()
    layers, height = len(tau) + 1, 390 if width > 400 else 250
    known = [v for v in (*tau, *overlap) if not math.isnan(v)]
    low = min(0.0, math.floor(10 * min(known, default=0.0)) / 10)
    x = Axis(0.5, layers - 0.5, 44, width - 10)
    y = Axis(low, 1, height - 44, 14)
    said = "Kendall's tau by layer: " + ", ".join(f"{i + 1}: {shown.plain(v)}" for i, v in enumerate(tau))
    canvas = Canvas(width, height, "Rank consistency of neighboring layers", f"{said}.", ident)
    canvas.levels(x, y, {tick: shown.plain(tick, 1) for tick in _ticks(low, 1, 5)}, base=0)
    title = "decoder layer, compared with the one before"
    canvas.layers(x, y, layer_ticks(1, layers - 1, x.end - x.start), title)
    half = min(0.36 * (x.end - x.start) / max(1, layers - 1), 16.0)
    for i, value in enumerate(tau):
        if not math.isnan(value):
            top, bottom = y(max(value, 0)), y(min(value, 0))
            title = tag("title", f"layer {i + 1}: tau {shown.plain(value)}")
            canvas.rect(x(i + 1) - half, top, 2 * half, max(bottom - top, 0.5), title, rx=2.0, class_="bar s0")
    points = [(x(i + 1), y(v)) for i, v in enumerate(overlap) if not math.isnan(v)]
    if points:
        canvas.add("path", d="M" + "L".join(f"{number(a)} {number(b)}" for a, b in points), class_="trend s2")
    for a, b in points:
        canvas.add("circle", cx=a, cy=b, r=2.6, class_="dot s2")
    return canvas.close()


def matrix_plot(matrix: Sequence[Sequence[float]], *, width: int, ident: str) -> Markup:
    """Kendall's tau between all pairs of layers as a heat map with its scale below."""
    layers = len(matrix)
    left, top, foot = 34.0, 6.0, 84.0
    cell = (width - left - 6) / layers
    height = top + cell * layers + foot
    values = [v for row in matrix for v in row if not math.isnan(v)]
    low = min(math.floor(10 * min(values, default=0.0)) / 10, 0.9)
    said = f"A {layers} by {layers} map; the lowest tau is {shown.plain(min(values, default=math.nan))}."
    canvas = Canvas(width, height, "Kendall's tau between all pairs of layers", said, ident)

    def box(x: float, y: float, wide: float, high: float, value: float, *children: object) -> None:
        strength = 0.04 + 0.96 * min(max((value - low) / (1 - low), 0), 1)
        canvas.rect(x, y, wide, high, *children, class_="cell", fill_opacity=strength)

    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if not math.isnan(value):
                title = tag("title", f"layers {i} and {j}: {shown.plain(value)}")
                box(left + j * cell, top + i * cell, cell, cell, value, title)
    for layer in layer_ticks(0, layers - 1, width - left):
        middle = (layer + 0.5) * cell
        canvas.text(left + middle, top + cell * layers + 16, str(layer), "t muted", "middle")
        canvas.text(left - 8, top + middle + 4, str(layer), "t muted", "end")
    canvas.text(left + cell * layers / 2, top + cell * layers + 34, "decoder layer", "t muted", "middle")
    for step in range(20):  # the scale, from the lowest tau to 1
        wide = (width - left - 6) / 20
        box(left + step * wide, height - 34, wide, 10, low + (1 - low) * step / 19)
    canvas.text(left, height - 8, f"tau {shown.plain(low, 1)}", "t muted")
    canvas.text(width - 6, height - 8, "1.0", "t muted", "end")
    return canvas.close()
