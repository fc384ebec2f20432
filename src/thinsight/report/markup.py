"""Builds HTML and SVG elements as text; whatever is not already markup is escaped.

Knows nothing about reports. Escaping is by construction: only `tag` makes `Markup`, and it escapes every
plain string it is given, in children and attributes alike.
"""

from __future__ import annotations

from ..texts import html

VOID = frozenset({"meta", "img", "br", "hr", "link", "col"})


class Markup(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """The value as markup, escaped unless it is markup already."""
    return value if isinstance(value, Markup) else Markup(html(value))


def join(*children: object) -> Markup:
    """Children side by side; None is skipped."""
    return Markup("".join(escape(child) for child in children if child is not None))


def number(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` means class, other underscores mean hyphens; None attributes are left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = number(value) if isinstance(value, float) else value
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{html(shown)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{join(*children)}</{name}>")
