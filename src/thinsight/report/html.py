"""The HTML report: one page, no file beside it, no script it needs, readable on a phone and in the dark.

From small pieces to sections to the page. Knows what a report holds (data.py), how plots and pictures are
drawn (plots.py, pictures.py) and how figures are put into words (words.py). Knows nothing about models or
searches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from PIL import Image

from ..records import user_path, write_atomically
from ..schedule import Schedule
from . import plots, words
from .data import Headline, MethodRow, Picture, ReportData, TrialRow
from .markup import Markup, join, tag
from .pictures import data_uri, draw_kept, even_columns


def figure(caption: str | None, draw: Callable[[int, str], Markup | None], ident: str, wide: int) -> Markup | None:
    """A plot drawn twice, for wide and for narrow windows; the style sheet shows one of the two."""
    drawings = [(class_, draw(width, f"{ident}-{class_}")) for class_, width in (("wide", wide), ("narrow", 340))]
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
    head = tag("tr", *(tag("th", text, scope="col", class_="n" if number else None) for text, number in headers))
    body = []
    for row, class_ in zip(rows, row_classes or [None] * len(rows), strict=True):
        cells = [
            tag("td" if place else "th", cell, scope=None if place else "row", class_="n" if number else None)
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


def _schedule(data: ReportData) -> Markup | None:
    if not data.keep_rates:
        return None
    rates = data.keep_rates
    others = [
        (row.name, row.keep_rates, series)
        for row, series in zip(data.methods, plots.series_of(data.methods), strict=True)
        if row.kind != "found" and len(row.keep_rates) == len(rates) and row.keep_rates != rates
    ]
    legend = [(_sharing(data), "step s0")]
    legend += [(other, f"step faint s{series}") for other, _, series in others]
    return join(
        tag(
            "p",
            "The share of the image's vision tokens that enters each decoder layer. A dropped token stays "
            "dropped, so the line never rises; layers are numbered from 0.",
        ),
        figure(
            None,
            lambda width, ident: plots.schedule_plot(rates, others, width=width, ident=ident),
            "schedule-plot",
            860,
        ),
        line_legend(legend) if others else None,
        _schedule_table(data),
    )


def _sharing(data: ReportData) -> str:
    """The name of the schedule's line: the search, and the baselines that use the same schedule."""
    same = [row.name for row in data.methods if row.kind == "baseline" and row.keep_rates == data.keep_rates]
    name = data.search.method if data.search else "this schedule"
    return f"{name} (the same schedule: {', '.join(same)})" if same else name


def _schedule_table(data: ReportData) -> Markup:
    total = data.model.num_vision_tokens
    headers = [("Layer", False), ("Keep rate", True)]
    rows: list[list[object]] = [[str(i), words.percent(rate)] for i, rate in enumerate(data.keep_rates)]
    if total is not None:
        headers.append((f"Tokens of {total}", True))
        for row, kept in zip(rows, Schedule(data.keep_rates).counts(total), strict=True):
            row.append(words.count(kept))
    return tag("details", tag("summary", "The schedule in numbers"), table_box(headers, rows, "Keep rate by layer"))


def _pictures(data: ReportData) -> Markup | None:
    if not data.pictures:
        return None
    return join(
        tag(
            "p",
            "What the layers still see. Dropped patches are gray and dim, kept ones are in color inside an "
            "orange outline. A ranker that reads the prompt, as text attention does, keeps other tokens for "
            "another question.",
        ),
        *(_picture(picture, place) for place, picture in enumerate(data.pictures)),
    )


def _picture(picture: Picture, place: int) -> Markup:
    answers = (("Full model:", picture.answer_full), ("Reduced:", picture.answer_reduced), ("Expected:", picture.truth))
    entries = [tag("div", tag("dt", name), tag("dd", text)) for name, text in answers if text]
    everything = range(picture.num_tokens)
    thumbs = [
        _thumb(
            draw_kept(picture.image, picture.grid, everything),
            f"The image of question {place + 1}",
            "the image",
            words.tokens(picture.num_tokens),
        )
    ]
    for layer, kept in zip(picture.layers, picture.kept, strict=True):
        share = words.percent(len(kept) / picture.num_tokens)
        thumbs.append(
            _thumb(
                draw_kept(picture.image, picture.grid, kept),
                f"Question {place + 1}, layer {layer}: {len(kept)} of {picture.num_tokens} vision tokens kept",
                f"layer {layer}",
                f"{words.tokens(len(kept))}, {share}",
            )
        )
    return tag(
        "div",
        tag("h3", picture.question),
        tag("dl", *entries, class_="answers") if entries else None,
        tag("div", *thumbs, class_="thumbs", style=f"--columns:{even_columns(len(thumbs))}"),
        class_="picture",
    )


def _thumb(image: Image.Image, alt: str, name: str, under: str) -> Markup:
    picture = tag("img", src=data_uri(image), alt=alt, width=image.width, height=image.height)
    return tag("figure", picture, tag("figcaption", tag("b", name), tag("br"), under))


def _methods(data: ReportData) -> Markup | None:
    if not data.methods:
        return None
    methods, allowed = data.methods, data.search.max_drop if data.search else None
    same = words.same_cost(methods)
    intro = "Every method ran on the same test questions" + (
        ", at the same decoder FLOPs." if same else "; mind that they differ in decoder FLOPs."
    )
    verdict = words.ranking(methods)
    drops = figure(
        "Drop against the full model, with its 95\N{NO-BREAK SPACE}% interval",
        lambda width, ident: plots.drop_plot(methods, allowed, width=width, ident=ident),
        "drop-plot",
        500,
    )
    scatter = figure(
        "Score against decoder FLOPs",
        lambda width, ident: plots.accuracy_plot(methods, width=width, ident=ident),
        "accuracy-plot",
        500,
    )
    note = (
        "Intervals are 95 % intervals of the drop on the same questions, as wide as so few changed answers "
        "call for (Tango's score interval, questions about one image taken together)."
    )
    if allowed and drops is not None:
        note += f" The dashed orange line is the drop the search allowed, {words.points(allowed)} points."
    if len(methods) > 2:
        note += " Points of equal cost stand side by side so that each can be seen."
    return join(
        tag("p", f"{intro} {verdict}".strip()),
        tag("div", drops, scatter, class_="pair") if drops is not None else scatter,
        tag("p", note, class_="note"),
        _methods_table(methods),
    )


def _methods_table(methods: Sequence[MethodRow]) -> Markup:
    headers = [
        ("Method", False),
        ("Score", True),
        ("Drop in points", True),
        ("95 % interval", True),
        ("Mean keep rate", True),
        ("Decoder FLOPs", True),
        ("Full / this", True),
    ]
    rows: list[list[object]] = []
    for row, series in zip(methods, plots.series_of(methods), strict=True):
        name = join(plots.marker_sample(series), row.name, tag("span", row.note, class_="sub") if row.note else None)
        drop = row.drop
        rows.append(
            [
                name,
                words.percent(row.score),
                words.points(drop.mean) if drop else words.NOTHING,
                words.ends(drop) if drop else words.NOTHING,
                words.percent(row.mean_keep_rate),
                words.flops(row.flops),
                words.ratio(row.flops_ratio),
            ]
        )
    classes = ["found" if row.kind == "found" else None for row in methods]
    return table_box(headers, rows, "Methods side by side", classes)


def _tasks(data: ReportData) -> Markup | None:
    if not data.per_task:
        return None
    headers = [("Task", False), ("Questions", True), ("Full", True), ("Reduced", True), ("Drop in points", True)]
    headers.append(("Reduced (bar), full (mark)", False))
    rows = [
        [
            row.task,
            words.count(row.n),
            words.percent(row.full),
            words.percent(row.reduced),
            words.points(row.full - row.reduced),
            plots.task_bar(row.full, row.reduced, ident=f"task-{place}", task=row.task),
        ]
        for place, row in enumerate(data.per_task)
    ]
    return join(
        tag(
            "p",
            "The average can hide a task that suffers; here is each one. With few questions per task, "
            "a point or two either way is chance.",
        ),
        table_box(headers, rows, "Score by task, full against reduced"),
    )


def _timing(data: ReportData) -> Markup | None:
    if not data.timing:
        return None
    headers = [("Measured", False), ("Batch", True), ("Runs", True), ("Full", True), ("Reduced", True)]
    headers.append(("Full / reduced", True))
    rows = [
        [
            row.what,
            words.count(row.batch),
            words.count(row.runs),
            words.milliseconds(row.full_ms),
            words.milliseconds(row.reduced_ms),
            words.ratio(row.ratio),
        ]
        for row in data.timing
    ]
    note = "Medians of runs that alternate between full and reduced, side by side in one process."
    if data.headline is not None and data.headline.vision_flops is not None:
        note += (
            f" The vision encoder ({words.flops(data.headline.vision_flops)} per prompt) is not reduced; "
            "the FLOPs above count the decoder only."
        )
    elif data.headline is not None:
        note += (
            " The vision encoder is not reduced, and its FLOPs are not counted: the FLOPs above are the decoder's only."
        )
    return join(
        tag(
            "p",
            tag("strong", "The gain is in prefill"),
            ", where the prompt with its vision tokens is read once. Writing the answer goes token by "
            "token and gains little; the longer the answer, the closer its total time comes to the full "
            "model's.",
        ),
        figure(None, lambda width, ident: plots.timing_plot(data.timing, width=width, ident=ident), "timing-plot", 860),
        line_legend([("full model", "step thick gray"), ("reduced", "step thick s0")]),
        table_box(headers, rows, "Measured time"),
        tag("p", note, class_="note"),
    )


def _consistency(data: ReportData) -> Markup | None:
    found = data.consistency
    if found is None or not found.tau:
        return None
    left = figure(
        "Kendall's tau with the layer before",
        lambda width, ident: plots.tau_plot(found, width=width, ident=ident),
        "tau-plot",
        600,
    )
    right = None
    if found.tau_matrix:
        right = figure(
            "All pairs of layers",
            lambda width, ident: plots.matrix_plot(found.tau_matrix, width=width, ident=ident),
            "matrix-plot",
            420,
        )
    legend = [("Kendall's tau", "step s0"), ("overlap of the top tokens", "trend s2")] if found.topk_overlap else []
    headers = [("Layer", False), ("Tau with the layer before", True)]
    headers += [("Top-token overlap", True)] if found.topk_overlap else []
    headers += [("Tied pairs", True)] if found.tied_share else []
    rows = []
    for layer in range(len(found.tau) + 1):
        row: list[object] = [str(layer), words.plain(found.tau[layer - 1]) if layer else words.NOTHING]
        if found.topk_overlap:
            row.append(words.percent(found.topk_overlap[layer - 1]) if layer else words.NOTHING)
        if found.tied_share:
            row.append(words.percent(found.tied_share[layer]))
        rows.append(row)
    return join(
        tag(
            "p",
            "How alike neighboring layers rank the vision tokens: 1 is the same order, 0 is no relation. The "
            "search rests on this: where the orders agree, a token that is dropped early would not be missed "
            "later.",
        ),
        tag("p", found.words) if found.words else None,
        tag("div", left, right, class_="pair lean") if right is not None else left,
        line_legend(legend) if legend else None,
        tag(
            "details",
            tag("summary", "Rank consistency in numbers"),
            table_box(headers, rows, "Rank consistency by layer"),
        ),
    )


def _search(data: ReportData) -> Markup | None:
    if data.search is None and not data.trials:
        return None
    found = data.search
    facts: list[tuple[str, str]] = []
    if found is not None:
        facts = [
            ("Method", " · ".join(text for text in (found.method, found.solver) if text)),
            ("Ranker", found.ranker),
            ("Allowed drop", f"{words.points(found.max_drop)} points" if found.max_drop is not None else ""),
            ("Budget", found.budget),
            ("Seed", "" if found.seed is None else str(found.seed)),
            ("Evaluations", "" if found.evaluations is None else words.count(found.evaluations)),
            (
                "Cost",
                ""
                if found.full_forwards is None
                else f"{found.full_forwards:.1f} runs of the full model over the calibration set (FLOPs)",
            ),
            ("Time", "" if found.seconds is None else words.duration(found.seconds)),
            ("Calibration score, full", _known(found.calibration_full_score)),
            ("Calibration score, reduced", _known(found.calibration_score)),
        ]
    return join(fact_list(facts), _frontier(data) if data.frontier else None, _trials(data) if data.trials else None)


def _known(value: float | None) -> str:
    return "" if value is None else words.percent(value)


def _frontier(data: ReportData) -> Markup:
    headers = [("Mean keep rate", True), ("FLOPs", True), ("Calibration score", True), ("", False)]
    rows = [
        [
            words.percent(row.mean_keep_rate),
            words.ratio(row.flops_ratio),
            words.percent(row.score),
            "taken" if row.chosen else "",
        ]
        for row in data.frontier
    ]
    return table_box(headers, rows, "The frontier: one schedule for each cost, found in one run")


def _trials(data: ReportData) -> Markup:
    headers = [("Trial", False), ("Layer", True), ("Keep rate", True), ("Tokens", True), ("Score", True)]
    headers += [("Verdict", False), ("Time", True)]
    if any(row.layer is None for row in data.trials):
        headers[1], headers[-2] = ("Candidate", False), ("Examples", True)
    rows = [
        [
            str(place + 1),
            row.why if row.layer is None else str(row.layer),
            words.percent(row.keep_rate),
            words.count(row.count),
            words.percent(row.score) if row.complete else f"≤ {words.percent(row.score)}",
            _verdict(row),
            words.duration(row.seconds),
        ]
        for place, row in enumerate(data.trials)
    ]
    title = f"All {words.count(len(rows))} trials of the search"
    return tag("details", tag("summary", title), table_box(headers, rows, "Trials, on the calibration set"))


def _verdict(row: TrialRow) -> str:
    if row.layer is None:
        return words.percent(row.share)
    return ("accepted" if row.accepted else "rejected") + ("" if row.complete else ", stopped early")


def _measured(data: ReportData) -> Markup | None:
    model, dataset = data.model, data.dataset
    facts = [
        ("Model", " · ".join(text for text in (model.name, model.model_type) if text)),
        ("Parameters", "" if model.parameters is None else words.parameters(model.parameters)),
        ("Decoder layers", "" if model.num_layers is None else str(model.num_layers)),
        ("Vision tokens", "" if model.num_vision_tokens is None else f"{model.num_vision_tokens} per prompt"),
        ("Runs as", ", ".join(text for text in (model.dtype, model.device, model.attention) if text)),
    ]
    if dataset is not None:
        facts += [
            ("Test set", _set_text(dataset.test_name, dataset.test_size)),
            ("Test hash", dataset.test_hash),
            ("Calibration set", _set_text(dataset.calibration_name, dataset.calibration_size)),
            ("Calibration hash", dataset.calibration_hash),
            ("Metric", dataset.metric),
        ]
    facts += list(data.environment.items())
    commands = [tag("h3", "Commands"), tag("pre", "\n".join(data.commands), tabindex="0")] if data.commands else []
    return join(
        tag(
            "p",
            "Scores are those of real greedy decoding. Decoder FLOPs count each layer's inputs: projections, "
            "attention and MLP of the prefill. Calibration questions, which the search saw, and "
            "test questions, which the scores come from, do not overlap.",
        ),
        fact_list(facts),
        *commands,
    )


def _set_text(name: str, size: int | None) -> str:
    return name if size is None else f"{name}, {words.count(size)} questions".lstrip(", ")


SECTIONS: tuple[tuple[str, str, Callable[[ReportData], Markup | None]], ...] = (
    ("schedule", "The schedule", _schedule),
    ("pictures", "Kept vision tokens", _pictures),
    ("methods", "Methods side by side", _methods),
    ("tasks", "Task by task", _tasks),
    ("timing", "Measured time", _timing),
    ("consistency", "Rank consistency", _consistency),
    ("search", "The search", _search),
    ("measured", "How it was measured", _measured),
)


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
                tag("main", *(tag("section", tag("h2", name), part, id=ident) for ident, name, part in present)),
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
        ("Drop in points", words.points(headline.drop.mean), f"95 % interval {words.ends(headline.drop)}"),
        ("Score", words.percent(headline.score), f"full model {words.percent(headline.full_score)}"),
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
    return tag("footer", f"Made by thinsight {version}".strip() + ". This page loads nothing and runs no script.")
