"""Markup made by hand: elements, drawings as inline SVG, and the plot of a schedule.

Colors and fonts come from a style sheet by class name (report/plots.css). Escaping is by construction: only `tag` makes
markup, and it escapes every plain string it is given. Knows nothing about reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from . import shown
from .texts import html

VOID = frozenset({"meta", "img", "br", "hr", "link", "col", "input"})


def number(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` means class, other underscores mean hyphens; what is None is left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            text = number(value) if isinstance(value, float) else value
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{html(text)}"')
    within = "".join(each if isinstance(each, Markup) else html(each) for each in children if each is not None)
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{within}</{name}>")


@dataclass
class Canvas:
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

    def rect(self, x: float, y: float, width: float, height: float, *children: object, **attributes: object) -> None:
        self.add("rect", *children, x=float(x), y=float(y), width=float(width), height=float(height), **attributes)

    def levels(self, x: Axis, y: Axis, labels: Mapping[float, str], base: float | None = None) -> None:
        """Lines across the plot with their labels at the left; the one at ``base`` is the axis."""
        for value, label in labels.items():
            self.line(x.start, y(value), x.end, y(value), "axis" if value == base else "grid")
            self.text(x.start - 8, y(value) + 4, label, "t muted", "end")

    def layers(self, x: Axis, y: Axis, numbers: Sequence[int], title: str) -> None:
        """Layer numbers below the plot."""
        for layer in numbers:
            self.text(x(layer), y.start + 18, str(layer), "t muted", "middle")
        self.text((x.start + x.end) / 2, self.height - 6, title, "t muted", "middle")

    def close(self, class_: str | None = None) -> Markup:
        names = f"{self.ident}-title", f"{self.ident}-desc"
        about = tag("title", self.title, id=names[0]), tag("desc", self.description, id=names[1])
        box = f"0 0 {number(self.width)} {number(self.height)}"
        label = " ".join(names)
        return tag("svg", *about, *self.elements, viewBox=box, role="img", aria_labelledby=label, class_=class_)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def layer_ticks(first: int, last: int, room: float) -> list[int]:
    """Whole layer numbers, at least 26 px apart."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, 1000) if room / max(1, last - first) * s >= 26)
    return list(range(-(-first // step) * step, last + 1, step))


def step_path(rates: Sequence[float], x: Axis, y: Axis) -> str:
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
    """Keep rate by layer as a filled step line; behind it others of as many layers, (name, rates, series number)."""
    layers, height = len(keep_rates), 300 if width > 500 else 240
    x = Axis(-0.5, layers - 0.5, 46, width - 10)
    y = Axis(0, 1, height - 44, 14)
    first, last, mean = map(shown.percent, (keep_rates[0], keep_rates[-1], sum(keep_rates) / layers))
    said = f"From {first} of the vision tokens at layer 0 down to {last} at layer {layers - 1}; the mean is {mean}."
    canvas = Canvas(width, height, "Keep rate of every decoder layer", said, ident)
    canvas.levels(x, y, {tick: f"{100 * tick:.0f} %" for tick in (0, 0.25, 0.5, 0.75, 1)}, base=0)
    canvas.layers(x, y, layer_ticks(0, layers - 1, x.end - x.start), "decoder layer")
    outline = step_path(keep_rates, x, y)
    canvas.add("path", d=f"{outline}V{number(y.start)}H{number(x.start)}Z", class_="area s0")
    for name, rates, series in others:
        canvas.add("path", tag("title", name), d=step_path(rates, x, y), class_=f"step faint s{series}")
    canvas.add("path", d=outline, class_="step s0")
    return canvas.close()
