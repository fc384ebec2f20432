"""The report's plots as inline SVG, written by hand so that a report needs no script and no picture file.

Knows nothing about the page around them: colors and fonts come from its style sheet by class name. Every
plot takes its width in pixels, so that a phone gets a drawing of its own and not a shrunken one, and an
`ident` that is unique in the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import words
from .data import Consistency, Interval, MethodRow, TimingRow
from .markup import Markup, number, tag

_SLIM, _BROAD = frozenset(" .,:;'|!()[]-fijlrtI1"), frozenset(f"%mwMW@{words.TIMES}{words.MINUS}")
_GAP = 9.0  # distance between points of equal cost that are spread sideways
_CORNERS: dict[int, list[tuple[float, float]]] = {  # of the marker shapes that are no circle, about (0, 0)
    1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    2: [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
    3: [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    4: [(-1.15, -0.85), (1.15, -0.85), (0, 1.25)],
}
_MARK, _KEY_GAP, _KEY_LINE = 16.0, 18.0, 19.0  # of the key: room for a marker, between names, for a line
_SAME_COST = 0.025  # share of the axis below which two costs are drawn as one


@dataclass
class _Canvas:
    """Collects elements and closes them into one accessible <svg>."""

    width: float
    height: float
    title: str
    description: str
    ident: str
    elements: list[Markup] = field(default_factory=list)

    def add(self, name: str, /, *children: object, **attributes: object) -> None:
        self.elements.append(tag(name, *children, **attributes))

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        self.add("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)

    def text(self, x: float, y: float, text: str, class_: str = "t", anchor: str = "start") -> None:
        self.add("text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)

    def path(self, steps: str, class_: str) -> None:
        self.add("path", d=steps, class_=class_)

    def close(self, class_: str | None = None) -> Markup:
        label = f"{self.ident}-title {self.ident}-desc"
        return tag(
            "svg",
            tag("title", self.title, id=f"{self.ident}-title"),
            tag("desc", self.description, id=f"{self.ident}-desc"),
            *self.elements,
            viewBox=f"0 0 {number(self.width)} {number(self.height)}",
            role="img",
            aria_labelledby=label,
            class_=class_,
        )


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, roughly `about` of them."""
    raw = (high - low) / max(about, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _layer_ticks(first: int, last: int, room: float) -> list[int]:
    """Whole layer numbers, at least 26 px apart."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, 1000) if room / max(1, last - first) * s >= 26)
    return list(range(-(-first // step) * step, last + 1, step))


def _marker(canvas: _Canvas, series: int, x: float, y: float, class_: str) -> None:
    """A point; its shape changes with the series so that color is never the only sign."""
    shape, size = series % 5, 4.6
    if shape == 0:
        canvas.add("circle", cx=x, cy=y, r=size, class_=class_)
        return
    scale = size * 0.88
    points = " ".join(f"{number(x + a * scale)},{number(y + b * scale)}" for a, b in _CORNERS[shape])
    canvas.add("polygon", points=points, class_=class_)


def marker_sample(series: int) -> Markup:
    """A method's marker by itself, to stand before its name in a table."""
    canvas = _Canvas(12, 12, "", "", "")
    _marker(canvas, series, 6, 6, f"dot s{series}")
    return tag("svg", *canvas.elements, viewBox="0 0 12 12", class_="key-mark", aria_hidden="true")


def series_of(methods: Sequence[MethodRow]) -> list[int]:
    """The color and marker number of each method: 0 the search's, 1 the full model, 2 to 7 the baselines."""
    baselines = itertools.cycle(range(2, 8))
    return [{"found": 0, "full": 1}[row.kind] if row.kind != "baseline" else next(baselines) for row in methods]


def _step_path(rates: Sequence[float], x: _Axis, y: _Axis) -> str:
    """A step line, layer i reaching from i - 0.5 to i + 0.5."""
    parts = [f"M{number(x(-0.5))} {number(y(rates[0]))}"]
    for i, rate in enumerate(rates):
        if i and rate != rates[i - 1]:
            parts.append(f"V{number(y(rate))}")
        parts.append(f"H{number(x(i + 0.5))}")
    return "".join(parts)


def schedule_plot(
    keep_rates: Sequence[float], others: Sequence[tuple[str, Sequence[float], int]] = (), *, width: int, ident: str
) -> Markup:
    """Keep rate by layer as a filled step line, other schedules faintly behind it.

    Args:
        keep_rates: the schedule, fractions of the vision tokens, one per layer.
        others: (name, keep rates, series number) of the schedules to compare with, of as many layers.
        width: of the drawing in pixels; also decides how many ticks there is room for.
        ident: unique in the page.
    """
    layers, height = len(keep_rates), 300 if width > 500 else 240
    x = _Axis(-0.5, layers - 0.5, 46, width - 10)
    y = _Axis(0, 1, height - 44, 14)
    mean = sum(keep_rates) / layers
    canvas = _Canvas(
        width,
        height,
        "Keep rate of every decoder layer",
        f"From {words.percent(keep_rates[0])} of the vision tokens at layer 0 "
        f"down to {words.percent(keep_rates[-1])} at layer {layers - 1}; the mean is {words.percent(mean)}.",
        ident,
    )
    for tick in (0, 0.25, 0.5, 0.75, 1):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid" if tick else "axis")
        canvas.text(x.start - 8, y(tick) + 4, f"{100 * tick:.0f} %", "t muted", "end")
    for layer in _layer_ticks(0, layers - 1, x.end - x.start):
        canvas.text(x(layer), y.start + 18, str(layer), "t muted", "middle")
    canvas.text((x.start + x.end) / 2, height - 6, "decoder layer", "t muted", "middle")
    outline = _step_path(keep_rates, x, y)
    canvas.path(f"{outline}V{number(y.start)}H{number(x.start)}Z", "area s0")
    for name, rates, series in others:
        canvas.add("path", tag("title", name), d=_step_path(rates, x, y), class_=f"step faint s{series}")
    canvas.path(outline, "step s0")
    return canvas.close()


def _score_range(method: MethodRow, full_score: float | None) -> tuple[float, float, float]:
    """(low, score, high): the interval of the drop, hung under the full model's score."""
    if method.drop is None or full_score is None:
        return method.score, method.score, method.score
    return full_score - method.drop.high, method.score, full_score - method.drop.low


def _clusters(costs: Sequence[float], close: float) -> list[list[int]]:
    """The places of points of (nearly) the same cost, grouped, from the cheapest group to the dearest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if groups and costs[i] - costs[groups[-1][0]] <= close:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _spread(costs: Sequence[float], close: float) -> list[float]:
    """Sideways shift in pixels of each point, so that points of (nearly) the same cost stand side by side."""
    shifts = [0.0] * len(costs)
    for group in _clusters(costs, close):
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
    ranges = [_score_range(row, full_score) for row in methods]
    scale, unit = words.flops_unit(max(row.flops for row in methods))
    costs = [row.flops / scale for row in methods]
    bottom, top = min(r[0] for r in ranges), max(r[2] for r in ranges)
    pad = max(0.08 * (top - bottom), 0.005)
    y = _Axis(bottom - pad, top + pad, plot - 46, 12)
    ticks = {tick: f"{100 * tick:g} %" for tick in _ticks(y.low, y.high, 5)}
    x = _Axis(0, max(costs) * 1.06 or 1, 10 + max(map(_wide, ticks.values())), width - 12)
    canvas = _Canvas(
        width,
        height,
        "Score against decoder FLOPs",
        "; ".join(f"{row.name}: {words.percent(row.score)} at {words.flops(row.flops)}" for row in methods) + ".",
        ident,
    )
    for tick, label in ticks.items():
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 8, y(tick) + 4, label.replace("-", words.MINUS), "t muted", "end")
    canvas.line(x.start, y.start, x.end, y.start, "axis")
    for tick in _ticks(0, x.high, 5 if width > 400 else 4):
        canvas.text(x(tick), y.start + 18, f"{tick:g}", "t muted", "middle")
    canvas.text((x.start + x.end) / 2, plot - 6, f"decoder {unit} per prompt", "t muted", "middle")
    if full_score is not None:
        canvas.line(x.start, y(full_score), x.end, y(full_score), "reference")
    _draw_points(canvas, methods, ranges, costs, x, y)
    series = series_of(methods)
    for place, line in enumerate(lines):
        at, middle = 0.0, plot + _KEY_LINE * (place + 0.5)
        for i in line:
            _marker(canvas, series[i], at + 6, middle, f"dot s{series[i]}")
            canvas.text(at + _MARK, middle + 4, names[i], f"t name s{series[i]}")
            at += widths[i]
    return canvas.close()


def _draw_points(
    canvas: _Canvas,
    methods: Sequence[MethodRow],
    ranges: Sequence[tuple[float, float, float]],
    costs: Sequence[float],
    x: _Axis,
    y: _Axis,
) -> None:
    shifts = _spread(costs, _SAME_COST * (x.high - x.low))
    for series, (low, score, high), cost, shift in zip(series_of(methods), ranges, costs, shifts, strict=True):
        at = x(cost) + shift
        if high > low:
            canvas.line(at, y(low), at, y(high), f"whisker s{series}")
        _marker(canvas, series, at, y(score), f"dot s{series}")


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
    edges = [0.0, *(v for _, _, drop in rows for v in (drop.low, drop.high))]
    edges += [] if max_drop is None else [max_drop]
    pad = max(0.05 * (max(edges) - min(edges)), 0.002)
    x = _Axis(min(edges) - pad, max(edges) + pad, longest if beside else 14, width - values)
    canvas = _Canvas(
        width,
        height,
        "Drop against the full model, with its 95 % interval",
        "; ".join(f"{row.name}: {words.interval(drop)} points" for row, _, drop in rows) + ".",
        ident,
    )
    base = head + tall * len(rows)
    for tick in _ticks(x.low, x.high, 6 if width > 400 else 4):
        canvas.line(x(tick), head, x(tick), base, "grid")
        canvas.text(x(tick), base + 18, f"{100 * tick:g}".replace("-", words.MINUS), "t muted", "middle")
    canvas.line(x(0), head, x(0), base, "zero")
    if max_drop:
        canvas.line(x(max_drop), head, x(max_drop), base, "allowed")
    title = "drop in points (left is better)"
    middle = max((x.start + x.end) / 2, _wide(title) / 2)
    canvas.text(middle, height - 6, title, "t muted", "middle")
    for place, (row, series, drop) in enumerate(rows):
        middle = head + tall * place + (16 if beside else 31)
        name = _fitting(row.name, width)
        _drop_row(canvas, name, drop, series, middle, middle + 4 if beside else middle - 14, x)
    return canvas.close()


def _drop_row(
    canvas: _Canvas, name: str, drop: Interval, series: int, middle: float, baseline: float, x: _Axis
) -> None:
    """One method: its interval and numbers at height `middle`, its name at height `baseline`."""
    class_ = f"s{series}"
    canvas.text(0, baseline, name, f"t name halo {class_}")
    canvas.text(canvas.width, middle + 4, words.interval(drop), "t halo", "end")
    canvas.line(x(drop.low), middle, x(drop.high), middle, f"whisker {class_}")
    _marker(canvas, series, x(drop.mean), middle, f"dot {class_}")


def task_bar(full: float, reduced: float, *, ident: str, task: str) -> Markup:
    """A bar of the reduced score with a mark at the full model's, for a table cell; both are fractions."""
    width, height = 120.0, 14.0
    canvas = _Canvas(
        width,
        height,
        f"{task}: full {words.percent(full)}, reduced {words.percent(reduced)}",
        "The bar is the reduced model's score, the mark the full model's.",
        ident,
    )
    canvas.add("rect", x=0.0, y=4.0, width=width, height=6.0, rx=3.0, class_="rail")
    canvas.add("rect", x=0.0, y=4.0, width=width * min(max(reduced, 0), 1), height=6.0, rx=3.0, class_="fill s0")
    at = min(max(full, 0), 1) * (width - 2) + 1
    canvas.line(at, 0, at, height, "tick")
    return canvas.close("task-bar")


def timing_plot(timing: Sequence[TimingRow], *, width: int, ident: str) -> Markup:
    """Two bars for every measurement, full above reduced, all on one scale of milliseconds."""
    tall, head = 74, 6
    height = head + tall * len(timing)
    longest = max(max(row.full_ms, row.reduced_ms) for row in timing)
    x = _Axis(0, longest or 1, 0, width - 84)
    canvas = _Canvas(
        width,
        height,
        "Measured time, full against reduced",
        "; ".join(
            f"{row.what}: {words.milliseconds(row.full_ms)} full, "
            f"{words.milliseconds(row.reduced_ms)} reduced, "
            f"ratio {words.ratio(row.ratio)}"
            for row in timing
        )
        + ".",
        ident,
    )
    for place, row in enumerate(timing):
        top = head + tall * place
        canvas.text(0, top + 12, _fitting(f"{row.what}, batch {row.batch}", width - 84), "t strong")
        canvas.text(width, top + 12, words.ratio(row.ratio), "t strong", "end")
        for offset, value, class_ in ((20, row.full_ms, "bar full"), (41, row.reduced_ms, "bar s0")):
            canvas.add(
                "rect", x=0.0, y=float(top + offset), width=max(x(value), 1.0), height=17.0, rx=3.0, class_=class_
            )
            canvas.text(x(value) + 7, top + offset + 13, words.milliseconds(value), "t muted")
    return canvas.close()


def tau_plot(consistency: Consistency, *, width: int, ident: str) -> Markup:
    """Kendall's tau between neighboring layers, and the overlap of their top tokens where it was measured."""
    tau, overlap = consistency.tau, consistency.topk_overlap
    layers, height = len(tau) + 1, 390 if width > 400 else 250
    known = [v for v in (*tau, *overlap) if not math.isnan(v)]
    low = min(0.0, math.floor(10 * min(known, default=0.0)) / 10)
    x = _Axis(0.5, layers - 0.5, 44, width - 10)
    y = _Axis(low, 1, height - 44, 14)
    canvas = _Canvas(
        width,
        height,
        "Rank consistency of neighboring layers",
        "Kendall's tau by layer: " + ", ".join(f"{i + 1}: {words.plain(v)}" for i, v in enumerate(tau)) + ".",
        ident,
    )
    for tick in _ticks(low, 1, 5):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid" if abs(tick) > 1e-9 else "axis")
        canvas.text(x.start - 8, y(tick) + 4, words.plain(tick, 1), "t muted", "end")
    for layer in _layer_ticks(1, layers - 1, x.end - x.start):
        canvas.text(x(layer), y.start + 18, str(layer), "t muted", "middle")
    canvas.text((x.start + x.end) / 2, height - 6, "decoder layer, compared with the one before", "t muted", "middle")
    half = min(0.36 * (x.end - x.start) / max(1, layers - 1), 16.0)
    for i, value in enumerate(tau):
        if not math.isnan(value):
            top, bottom = y(max(value, 0)), y(min(value, 0))
            canvas.add(
                "rect",
                tag("title", f"layer {i + 1}: tau {words.plain(value)}"),
                x=x(i + 1) - half,
                y=top,
                width=2 * half,
                height=max(bottom - top, 0.5),
                rx=2.0,
                class_="bar s0",
            )
    _overlap_line(canvas, overlap, x, y)
    return canvas.close()


def _overlap_line(canvas: _Canvas, overlap: Sequence[float], x: _Axis, y: _Axis) -> None:
    points = [(x(i + 1), y(v)) for i, v in enumerate(overlap) if not math.isnan(v)]
    if not points:
        return
    canvas.path("M" + "L".join(f"{number(a)} {number(b)}" for a, b in points), "trend s2")
    for a, b in points:
        canvas.add("circle", cx=a, cy=b, r=2.6, class_="dot s2")


def matrix_plot(matrix: Sequence[Sequence[float]], *, width: int, ident: str) -> Markup:
    """Kendall's tau between all pairs of layers as a heat map with its scale below."""
    layers = len(matrix)
    left, top, foot = 34.0, 6.0, 84.0
    cell = (width - left - 6) / layers
    height = top + cell * layers + foot
    values = [v for row in matrix for v in row if not math.isnan(v)]
    low = min(math.floor(10 * min(values, default=0.0)) / 10, 0.9)
    canvas = _Canvas(
        width,
        height,
        "Kendall's tau between all pairs of layers",
        f"A {layers} by {layers} map; the lowest tau is {words.plain(min(values, default=math.nan))}.",
        ident,
    )
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if math.isnan(value):
                continue
            canvas.add(
                "rect",
                tag("title", f"layers {i} and {j}: {words.plain(value)}"),
                x=left + j * cell,
                y=top + i * cell,
                width=cell,
                height=cell,
                class_="cell",
                fill_opacity=_strength(value, low),
            )
    for layer in _layer_ticks(0, layers - 1, width - left):
        middle = (layer + 0.5) * cell
        canvas.text(left + middle, top + cell * layers + 16, str(layer), "t muted", "middle")
        canvas.text(left - 8, top + middle + 4, str(layer), "t muted", "end")
    canvas.text(left + cell * layers / 2, top + cell * layers + 34, "decoder layer", "t muted", "middle")
    _matrix_scale(canvas, low, left, height - 34)
    return canvas.close()


def _strength(value: float, low: float) -> float:
    return 0.04 + 0.96 * min(max((value - low) / (1 - low), 0), 1)


def _matrix_scale(canvas: _Canvas, low: float, left: float, top: float) -> None:
    """Twenty boxes from the lowest tau to 1, with both ends named."""
    width = (canvas.width - left - 6) / 20
    for step in range(20):
        value = low + (1 - low) * step / 19
        canvas.add(
            "rect",
            x=left + step * width,
            y=top,
            width=width,
            height=10.0,
            class_="cell",
            fill_opacity=_strength(value, low),
        )
    canvas.text(left, top + 26, f"tau {words.plain(low, 1)}", "t muted")
    canvas.text(canvas.width - 6, top + 26, "1.0", "t muted", "end")
