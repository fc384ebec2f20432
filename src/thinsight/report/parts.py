"""The building blocks of the page's sections: a plot in two widths, a boxed table, a legend, a list of facts.

Knows nothing about what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .markup import Markup, join, tag


def figure(
    caption: str | None, draw: Callable[[int, str], Markup | None], ident: str, wide: int
) -> Markup | None:
    """A plot drawn twice, for wide and for narrow windows; the style sheet shows one of the two."""
    drawings = [
        (class_, draw(width, f"{ident}-{class_}")) for class_, width in (("wide", wide), ("narrow", 340))
    ]
    if any(svg is None for _, svg in drawings):
        return None
    return tag(
        "figure",
        tag("figcaption", caption) if caption else None,
        *(Markup(str(svg).replace("<svg ", f'<svg class="{class_}" ', 1)) for class_, svg in drawings),
    )


def table_box(
    headers: Sequence[tuple[str, bool]],
    rows: Sequence[Sequence[object]],
    caption: str,
    row_classes: Sequence[str | None] | None = None,
) -> Markup:
    """A table that scrolls inside its own box. A header is (text, is a number).

    The first cell of a row heads it.
    """
    head = tag(
        "tr", *(tag("th", text, scope="col", class_="n" if number else None) for text, number in headers)
    )
    body = []
    for row, class_ in zip(rows, row_classes or [None] * len(rows), strict=True):
        cells = [
            tag(
                "td" if place else "th",
                cell,
                scope=None if place else "row",
                class_="n" if number else None,
            )
            for place, (cell, (_, number)) in enumerate(zip(row, headers, strict=True))
        ]
        body.append(tag("tr", *cells, class_=class_))
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def line_legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Line samples with their names: (name, class of the line)."""
    items = []
    for name, class_ in entries:
        sample = tag("svg", tag("path", d="M1 6H25", class_=class_), viewBox="0 0 26 12", aria_hidden="true")
        items.append(tag("li", sample, name))
    return tag("ul", *items, class_="legend")


def fact_list(facts: Sequence[tuple[str, str]]) -> Markup | None:
    shown = [join(tag("dt", name), tag("dd", text)) for name, text in facts if text]
    return tag("dl", *shown, class_="facts") if shown else None
