"""The HTML report: one page, no file beside it, no script it needs, readable on a phone and in the dark.

`page.html.j2` holds the page and its prose, tables.py the tables; here is what both need from a report's data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import tables, texts, words
from ..records import user_path, write_atomically
from ..schedule import Schedule
from . import plots
from .data import Headline, Picture, ReportData
from .pictures import data_uri, draw_kept, even_columns

_UNIT = re.compile(r"(?<=\d) (?=%|[PTGM]?FLOPs|points)|(?<=\d,) (?=[\d\N{MINUS SIGN}]+(\.\d+)?\])")


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
    sections = {
        "schedule": ("The schedule", data.keep_rates),
        "pictures": ("Kept vision tokens", data.pictures),
        "methods": ("Methods side by side", data.methods),
        "tasks": ("Task by task", data.per_task),
        "timing": ("Measured time", data.timing),
        "consistency": ("Rank consistency", data.consistency),
        "search": ("The search", data.search or data.trials),
        "measured": ("How it was measured", True),
    }
    return tables.fill(
        "page.html.j2",
        data=data,
        sections={ident: name for ident, (name, there) in sections.items() if there},
        style=Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")),
        cards=_cards(data.headline) if data.headline else [],
        others=_other_schedules(data),
        shared=_sharing(data),
        schedule=Schedule(data.keep_rates) if data.keep_rates else None,
        methods=_methods(data),
        tasks=_tasks(data),
        search_facts=_search_facts(data),
        facts=_facts(data),
        thumbs=_thumbs,
        figure=_figure,
        tight=_tight,
        even_columns=even_columns,
        plots=plots,
        tables=tables,
        words=words,
    )


def _figure(plot: Callable[..., Markup | None], ident: str, wide: int, caption: str, *told: Any) -> Markup | None:
    """A plot drawn twice, for wide and for narrow windows; the style sheet shows one of the two."""
    drawings = []
    for class_, width in (("wide", wide), ("narrow", 340)):
        drawn = plot(*told, width=width, ident=f"{ident}-{class_}")
        if drawn is None:
            return None
        drawings.append(Markup(str(drawn).replace("<svg ", f'<svg class="{class_}" ', 1)))
    return plots.tag("figure", plots.tag("figcaption", caption) if caption else None, *drawings)


def _tight(text: str) -> str:
    """The text with its units and intervals held to their numbers when a line breaks."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def _cards(headline: Headline) -> list[tuple[str, str, str]]:
    """The key figures: name, value, what stands under it."""
    cost = "full / reduced, prefill of one prompt"
    if headline.flops_full is not None and headline.flops is not None:
        cost = f"{words.flops(headline.flops_full)} → {words.flops(headline.flops)}"
    cards = [
        ("Decoder FLOPs", words.ratio(headline.flops_ratio), cost),
        ("Drop in points", words.points(headline.drop.mean), f"95 % interval {words.ends(headline.drop)}"),
        ("Score", words.percent(headline.score), f"full model {words.percent(headline.full_score)}"),
        ("Mean keep rate", words.percent(headline.mean_keep_rate), "of the vision tokens, over all layers"),
    ]
    measured = (
        ("Prefill time", headline.prefill_ratio, "measured, full / reduced"),
        ("Whole answer", headline.answer_ratio, "measured, full / reduced"),
        ("KV cache", headline.kv_ratio, "of the prompt, full / reduced"),
    )
    return cards + [(name, words.ratio(value), under) for name, value, under in measured if value is not None]


def _other_schedules(data: ReportData) -> list[tuple[str, tuple[float, ...], int]]:
    """(name, keep rates, series) of the methods that have another schedule of as many layers."""
    return [
        (row.name, row.keep_rates, series)
        for row, series in zip(data.methods, plots.series_of(data.methods), strict=True)
        if row.kind != "found" and len(row.keep_rates) == len(data.keep_rates) and row.keep_rates != data.keep_rates
    ]


def _sharing(data: ReportData) -> str:
    """The name of the schedule's line: the search, and the baselines that use the same schedule."""
    same = [row.name for row in data.methods if row.kind == "baseline" and row.keep_rates == data.keep_rates]
    name = data.search.method if data.search else "this schedule"
    return f"{name} (the same schedule: {', '.join(same)})" if same else name


def _methods(data: ReportData) -> tables.Table:
    """With each method's marker of the plots, and its note."""
    marked = [
        Markup(f"{plots.marker_sample(series)}{texts.html(row.name)}{_note(row.note)}")
        for row, series in zip(data.methods, plots.series_of(data.methods), strict=True)
    ]
    return tables.methods_table(data.methods).put(0, marked)


def _note(text: str) -> str:
    return plots.tag("span", text, class_="sub") if text else ""


def _tasks(data: ReportData) -> tables.Table:
    """With a bar of each score."""
    bars = [
        plots.task_bar(row.full, row.reduced, ident=f"task-{place}", task=row.task)
        for place, row in enumerate(data.per_task)
    ]
    return tables.tasks_table(data.per_task).put(5, bars, "Reduced (bar), full (mark)")


def _thumbs(picture: Picture, place: int) -> list[dict[str, Any]]:
    """The image, and what each layer sees of it."""
    total = picture.num_tokens
    drawn = [(tuple(range(total)), f"The image of question {place}", "the image", words.tokens(total))]
    for layer, kept in zip(picture.layers, picture.kept, strict=True):
        alt = f"Question {place}, layer {layer}: {len(kept)} of {total} vision tokens kept"
        share = words.percent(len(kept) / total)
        drawn.append((kept, alt, f"layer {layer}", f"{words.tokens(len(kept))}, {share}"))
    thumbs = []
    for kept, alt, name, under in drawn:
        image = draw_kept(picture.image, picture.grid, kept)
        size = {"width": image.width, "height": image.height}
        thumbs.append({"src": data_uri(image), "alt": alt, "name": name, "under": under, **size})
    return thumbs


def _search_facts(data: ReportData) -> list[tuple[str, str]]:
    found = data.search
    if found is None:
        return []
    runs = "" if found.full_forwards is None else f"{found.full_forwards:.1f} runs of the full model"
    return [
        ("Method", _together(" · ", found.method, found.solver)),
        ("Ranker", found.ranker),
        ("Allowed drop", "" if found.max_drop is None else f"{words.points(found.max_drop)} points"),
        ("Budget", found.budget),
        ("Seed", _known(found.seed, str)),
        ("Evaluations", _known(found.evaluations, words.count)),
        ("Cost", f"{runs} over the calibration set (FLOPs)" if runs else ""),
        ("Time", _known(found.seconds, words.duration)),
        ("Calibration score, full", _known(found.calibration_full_score, words.percent)),
        ("Calibration score, reduced", _known(found.calibration_score, words.percent)),
    ]


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """About model, data and machine."""
    model, dataset = data.model, data.dataset
    facts = [
        ("Model", _together(" · ", model.name, model.model_type)),
        ("Parameters", _known(model.parameters, words.parameters)),
        ("Decoder layers", _known(model.num_layers, str)),
        ("Vision tokens", _known(model.num_vision_tokens, lambda tokens: f"{tokens} per prompt")),
        ("Runs as", _together(", ", model.dtype, model.device, model.attention)),
    ]
    if dataset is not None:
        questions = _known(dataset.calibration_size, lambda size: f"{words.count(size)} questions")
        facts += [
            ("Test set", _together(", ", dataset.test_name, f"{words.count(dataset.test_size)} questions")),
            ("Test hash", dataset.test_hash),
            ("Calibration set", _together(", ", dataset.calibration_name, questions)),
            ("Calibration hash", dataset.calibration_hash),
            ("Metric", dataset.metric),
        ]
    return facts + list(data.environment.items())


def _known(value: Any, show: Callable[[Any], str]) -> str:
    return "" if value is None else show(value)


def _together(between: str, *parts: str) -> str:
    return between.join(filter(None, parts))
