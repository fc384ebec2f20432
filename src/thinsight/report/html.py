"""The HTML report: one page, no file beside it, no script in it, readable on a phone and in the dark.

What moves in it, the slider over a picture's layers and its larger view, is inputs and style sheet alone. Downloads are
`data:` links: every figure as an SVG that stands alone, every table as CSV.

`page.html.j2` holds the page and its prose, tables.py the tables; here is what both need from a report's data.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import shown, texts
from ..certificate import steps_table
from ..evaluation.result import consistency_table, timing_table
from ..records import user_path, write_atomically
from ..schedule import Schedule, schedule_table
from ..searches.run import trials_table
from . import plots, tables, words
from .data import Picture, ReportData
from .pictures import data_uri, kept_overlay, overlay_uri, resized, view_side

_MEDIA = {"svg": "image/svg+xml", "csv": "text/csv;charset=utf-8"}
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
    changes = data.changes
    sections = {
        "promise": ("What is promised", data.certificate),
        "schedule": ("The schedule", data.keep_rates),
        "changed": ("Changed answers", changes),
        "pictures": ("Kept vision tokens", data.pictures),
        "methods": ("Methods side by side", data.methods),
        "benchmarks": ("Benchmarks", data.measures),
        "tasks": ("Task by task", data.per_task),
        "timing": ("Measured time", data.timing),
        "consistency": ("Rank consistency", data.consistency),
        "search": ("The search", data.search or data.trials),
        "measured": ("How it was measured", True),
    }
    return shown.fill(
        "page.html.j2",
        data=data,
        sections={ident: name for ident, (name, there) in sections.items() if there},
        style=Markup(_sheet("plots.css") + _sheet("style.css")),
        others=_other_schedules(data),
        shared=_sharing(data),
        schedule=data.keep_rates and schedule_table(Schedule(data.keep_rates), data.model.num_vision_tokens),
        methods=_methods(data),
        benchmarks=tables.measures_table(data.measures),
        tasks=_tasks(data),
        timing=timing_table(data.timing),
        consistency=data.consistency and consistency_table(data.consistency),
        frontier=tables.frontier_table(data.frontier, data.certificate),
        steps=data.certificate and steps_table(data.certificate, data.path_ratios),
        trials=trials_table(data.trials),
        changed=changes and tables.changes_table(changes),
        view=_view,
        figure=_figure,
        download=_download,
        tight=_tight,
        plots=plots,
        shown=shown,
        words=words,
    )


def _sheet(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figure(plot: Callable[..., Markup | None], ident: str, wide: int, caption: str, *told: Any) -> Markup | None:
    """A plot drawn twice, for wide and for narrow windows, of which the style sheet shows one; and a link to the wide
    one as a file."""
    drawings: list[Markup] = []
    link: Markup | None = None
    for class_, width in (("wide", wide), ("narrow", 340)):
        drawn = plot(*told, width=width, ident=f"{ident}-{class_}")
        if drawn is None:
            return None
        link = link or _download(ident, "svg", plots.standalone(drawn, _sheet("plots.css")))
        drawings.append(Markup(str(drawn).replace("<svg ", f'<svg class="{class_}" ', 1)))
    return plots.tag("figure", plots.tag("figcaption", caption) if caption else None, *drawings, link)


def _download(name: str, kind: str, content: str) -> Markup:
    """A link to a file that is in the page itself."""
    coded = base64.b64encode(content.encode("utf-8", "backslashreplace")).decode("ascii")
    address = f"data:{_MEDIA[kind]};base64,{coded}"
    link = plots.tag("a", kind.upper(), href=address, download=f"{name}.{kind}", aria_label=f"{name} as {kind.upper()}")
    return plots.tag("p", link, class_="get")


def _tight(text: str) -> str:
    """The text with its units and intervals held to their numbers when a line breaks."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


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


def _methods(data: ReportData) -> shown.Table:
    """With each method's marker of the plots, and its note."""
    marked = [
        Markup(f"{plots.marker_sample(series)}{texts.html(row.name)}{_note(row.note)}")
        for row, series in zip(data.methods, plots.series_of(data.methods), strict=True)
    ]
    return tables.methods_table(data.methods).put(0, marked)


def _note(text: str) -> str:
    return plots.tag("span", text, class_="sub") if text else ""


def _tasks(data: ReportData) -> shown.Table:
    """With a bar of each score."""
    bars = [
        plots.task_bar(row.full, row.reduced, ident=f"task-{place}", task=row.task)
        for place, row in enumerate(data.per_task)
    ]
    return tables.tasks_table(data.per_task).put(5, bars, "Reduced (bar), full (mark)")


def _view(picture: Picture, place: int) -> dict[str, Any]:
    """The image, what lies over it at each stop of the slider, and the stop that is shown first."""
    total, side = picture.num_tokens, view_side(picture.image)
    image = resized(picture.image, picture.grid, side)
    stops: list[dict[str, str | None]] = [
        {"name": "image", "label": "the image", "told": shown.tokens(total), "src": None, "alt": None}
    ]
    for layer, kept in zip(picture.layers, picture.kept, strict=True):
        alt = f"Question {place}, layer {layer}: {len(kept)} of {texts.counted(total, 'vision token')} kept"
        told = f"{shown.tokens(len(kept))}, {shown.percent(len(kept) / total)}"
        src = overlay_uri(kept_overlay(picture.grid, kept, side=side))
        stops.append({"name": str(layer), "label": f"layer {layer}", "told": told, "src": src, "alt": alt})
    return {
        "src": data_uri(image),
        "width": image.width,
        "height": image.height,
        "stops": stops,
        "first": len(stops) // 2,
    }
