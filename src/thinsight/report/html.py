"""Writes a report as one HTML file that needs nothing else: style, plots and pictures are inside, no script.

Knows nothing about models or files on disk other than the one it writes. Every text passes through
`markup.tag`, which escapes it; a content security policy in the page keeps it from loading anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ..records import user_path, write_atomically
from . import words
from .data import Headline, ReportData
from .markup import Markup, tag
from .sections import SECTIONS

_UNIT = re.compile(r"(?<=\d) (?=%|[PTGM]?FLOPs|points)|(?<=\d,) (?=[\d\N{MINUS SIGN}]+(\.\d+)?\])")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: str | Path, data: ReportData) -> Path:
    """Writes the report to `path` (replacing what is there whole or not at all); returns the path.

    Raises:
        ThinsightError: the file cannot be written.
    """
    path = user_path(path, "report")
    write_atomically(path, render(data))
    return path


def render(data: ReportData) -> str:
    """The report as the text of an HTML page. Parts that `data` lacks leave out their section."""
    parts = [(ident, name, build(data)) for ident, name, build in SECTIONS]
    present = [(ident, name, part) for ident, name, part in parts if part is not None]
    page = tag(
        "html",
        _head(data),
        tag(
            "body",
            tag(
                "div",
                _header(data, [(ident, name) for ident, name, _ in present]),
                tag(
                    "main",
                    *(tag("section", tag("h2", name), part, id=ident) for ident, name, part in present),
                ),
                _footer(data),
                class_="wrap",
            ),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _head(data: ReportData) -> Markup:
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", data.title),
        tag("style", Markup(style)),
    )


def _header(data: ReportData, sections: Sequence[tuple[str, str]]) -> Markup:
    about = [data.model.name, data.model.device, data.model.dtype, data.created]
    contents: list[Markup | None] = [
        tag("p", " · ".join(text for text in about if text), class_="kicker"),
        tag("h1", data.title),
    ]
    if data.headline is not None:
        drop = data.headline.drop
        contents += [
            tag(
                "p",
                words.fewer(data.headline.flops_ratio, "decoder FLOPs"),
                f", drop {words.points(drop.mean)} points ",
                tag("span", words.ends(drop), class_="soft"),
                class_="headline",
            ),
            tag("p", _tight(words.scores(data)), class_="lede"),
            *(tag("p", tag("b", "Warning: "), _tight(doubt), class_="lede") for doubt in data.doubts),
            tag("p", _tight(words.meaning(data.headline, data.search)), class_="lede small"),
            _cards(data.headline),
        ]
    links = [tag("li", tag("a", name, href=f"#{ident}")) for ident, name in sections]
    contents.append(tag("nav", tag("ul", *links), aria_label="Sections") if len(links) > 1 else None)
    return tag("header", *contents)


def _tight(text: str) -> str:
    """The text with its units and intervals held to their numbers when a line breaks."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def _cards(headline: Headline) -> Markup:
    """The key figures."""
    cost = "full / reduced, prefill of one prompt"
    if headline.flops_full is not None and headline.flops is not None:
        cost = f"{words.flops(headline.flops_full)} → {words.flops(headline.flops)}"
    cards: list[tuple[str, str, str] | None] = [
        ("Decoder FLOPs", words.ratio(headline.flops_ratio), cost),
        (
            "Drop in points",
            words.points(headline.drop.mean),
            f"95 % interval {words.ends(headline.drop)}",
        ),
        (
            "Score",
            words.percent(headline.score),
            f"full model {words.percent(headline.full_score)}",
        ),
        ("Mean keep rate", words.percent(headline.mean_keep_rate), "of the vision tokens, over all layers"),
        _ratio_card("Prefill time", headline.prefill_ratio, "measured, full / reduced"),
        _ratio_card("Whole answer", headline.answer_ratio, "measured, full / reduced"),
        _ratio_card("KV cache", headline.kv_ratio, "of the prompt, full / reduced"),
    ]
    shown = [card for card in cards if card is not None]
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", tag("div", value, class_="value"), tag("div", _tight(under), class_="under")),
                class_="key main" if place < 2 else "key",
            )
            for place, (name, value, under) in enumerate(shown)
        ),
        class_="cards",
    )


def _ratio_card(name: str, value: float | None, under: str) -> tuple[str, str, str] | None:
    return None if value is None else (name, words.ratio(value), under)


def _footer(data: ReportData) -> Markup:
    version = data.environment.get("thinsight", "")
    return tag(
        "footer", f"Made by thinsight {version}".strip() + ". This page loads nothing and runs no script."
    )
