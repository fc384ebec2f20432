"""Every table, defined once and shown in three places: an HTML page, a terminal (rich) and a Markdown text.

A function makes each table from the records that hold its numbers, and by `Shown` those records show themselves in a
terminal and in a notebook. No text of a user or a model becomes markup. Knows records by their fields only, and loads
what draws a table when one is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from . import texts, words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from .evaluation.result import RankConsistency, Timing
    from .report.data import DatasetInfo, FrontierRow, Headline, MethodRow, TaskRow
    from .schedule import Schedule
    from .searches.run import SearchResult, Trial

EVERYWHERE = ("page", "terminal", "markdown")
_FIGURES = re.compile(r"[-+±\d., \[\]x%]*")  # what Markdown needs no escape for
_PLAIN = str.maketrans({words.TIMES: "x", words.MINUS: "-", words.NOTHING: ""})


class Column(NamedTuple):
    """A header and what a record shows under it; numbers stand at the right.

    ``short`` is the header where there is little room, ``places`` are those that show the column at all.
    """

    header: str
    cell: Callable[[Any], object]
    short: str | None = None
    text: bool = False
    places: Sequence[str] = EVERYWHERE


class Table:
    """A title, columns, a row of cells for each record, and notes; ``strong`` says which rows stand out."""

    def __init__(
        self,
        title: str,
        records: Iterable[Any],
        *columns: Column,
        strong: Callable[[Any], bool] = lambda _: False,
        notes: Iterable[str] = (),
    ) -> None:
        records = list(records)
        self.title, self.columns, self.notes = title, list(columns), [note for note in notes if note]
        self.rows = [[column.cell(record) for column in columns] for record in records]
        self.strong = [strong(record) for record in records]

    def put(self, place: int, cells: Sequence[object], header: str | None = None) -> Table:
        """With other cells in a column, or with another column of text behind the last."""
        if header is not None:
            self.columns.append(Column(header, str, text=True))
        for row, cell in zip(self.rows, cells, strict=True):
            row[place : place + 1] = [cell]
        return self

    def at(self, place: str) -> tuple[list[Column], list[tuple[list[Any], bool]]]:
        """The columns that a place shows, and the cells of each row with whether it stands out."""
        shown = [i for i, column in enumerate(self.columns) if place in column.places]
        rows = zip(self.rows, self.strong, strict=True)
        return [self.columns[i] for i in shown], [([row[i] for i in shown], strong) for row, strong in rows]

    def __rich__(self) -> RenderableType:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table as Drawn

        drawn = Drawn(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        drawn.title, drawn.title_justify, drawn.title_style = line(self.title), "left", "bold"
        columns, rows = self.at("terminal")
        for each in columns:
            header = line(each.header if each.short is None else each.short)
            drawn.add_column(header, justify="left" if each.text else "right", overflow="fold", no_wrap=not each.text)
        for cells, strong in rows:
            drawn.add_row(*map(line, cells), style="bold" if strong else None)
        return Group(drawn, *map(line, self.notes))

    def _repr_html_(self) -> str:
        return fill("table.html.j2", table=self)

    def markdown(self) -> str:
        """The table without its title and notes."""
        columns, rows = self.at("markdown")
        lines = ["".join(f"| {column.header} " for column in columns) + "|", "|" + "---|" * len(columns)]
        for cells, strong in rows:
            shown = [_markdown(*each) for each in zip(cells, columns, strict=True)]
            shown[0] = f"**{shown[0]}**" if strong else shown[0]
            lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in shown))
        return "\n".join(lines)


def plain(figure: object) -> str:
    """A figure as it is typed: 2.63x, -0.5, nothing where there is none."""
    return str(figure).translate(_PLAIN)


def _markdown(cell: object, column: Column) -> str:
    typed = plain(cell)
    return typed if not column.text and _FIGURES.fullmatch(typed) else texts.markdown(cell)


class Shown:
    """What shows itself as tables in a terminal (``rich.print``) and in a notebook."""

    def _tables(self) -> Iterable[Table]:
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*spaced(self._tables()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._tables())


def spaced(parts: Iterable[Any]) -> list[Any]:
    """Parts of a terminal's output with empty lines between them."""
    return [each for part in parts for each in (part, line(""))][:-1]


def line(text: object, style: str = "") -> Text:
    """A text for the terminal, whoever wrote it: no markup, and nothing that moves the cursor."""
    from rich.text import Text

    return Text(texts.terminal(text), style=style)


def fill(template: str, **values: Any) -> str:
    """A template of the report with its values, each escaped unless it is markup already; None is nothing."""
    text: str = _templates().get_template(template).render(values)
    return text


@lru_cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup("" if value is None else texts.html(value))

    loader = PackageLoader("thinsight", "report")
    return Environment(
        loader=loader, autoescape=True, finalize=safe, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


# -- the tables --------------------------------------------------------------------------------------------


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """What is known by name; a fact without a text is left out."""
    known = [fact for fact in facts if fact[1]]
    return Table(title, known, Column("", lambda fact: fact[0], text=True), Column("", lambda fact: fact[1], text=True))


def headline_table(found: Headline, dataset: DatasetInfo | None = None) -> Table:
    """Full, reduced, and their ratio or the drop's interval."""
    full, reduced = ("" if value is None else words.flops(value) for value in (found.flops_full, found.flops))
    drop = f"drop {words.interval(found.drop)} points"
    rows = [
        ("score", words.percent(found.full_score), words.percent(found.score), drop),
        ("mean keep rate", words.percent(1.0), words.percent(found.mean_keep_rate), ""),
        ("decoder FLOPs", full, reduced, words.ratio(found.flops_ratio)),
    ]
    times = (("KV cache of the prompt", found.kv_ratio), ("prefill time", found.prefill_ratio))
    for name, value in (*times, ("whole-answer time", found.answer_ratio)):
        rows += [] if value is None else [(name, "", "", words.ratio(value))]
    return Table(
        "Full against reduced" + (f" on {words.count(dataset.test_size)} test questions" if dataset else ""),
        rows,
        Column("", lambda row: row[0], text=True),
        Column("full", lambda row: row[1]),
        Column("reduced", lambda row: row[2]),
        Column("ratio or drop", lambda row: row[3]),
    )


def methods_table(methods: Sequence[MethodRow]) -> Table:
    """Every method's score, drop and cost; the search's own stands out."""
    return Table(
        "Methods at the same decoder FLOPs" if words.same_cost(tuple(methods)) else "Methods",
        methods,
        Column("Method", lambda row: row.name, "method", text=True),
        Column("Score", lambda row: words.percent(row.score), "score"),
        Column("Drop in points [95 %]", lambda row: words.interval(row.drop), "drop [95 %]"),
        Column("Mean keep rate", lambda row: words.percent(row.mean_keep_rate), "kept"),
        Column("Decoder FLOPs", lambda row: words.flops(row.flops), "FLOPs"),
        Column("Full / this", lambda row: words.ratio(row.flops_ratio), "full / this"),
        strong=lambda row: row.kind == "found",
        notes=[words.ranking(tuple(methods))],
    )


def frontier_table(frontier: Sequence[FrontierRow]) -> Table:
    """One schedule for each cost; the one that was taken stands out."""
    return Table(
        "The frontier, on the calibration set",
        frontier,
        Column("Mean keep rate", lambda row: words.percent(row.mean_keep_rate), "mean keep rate"),
        Column("FLOPs", lambda row: words.ratio(row.flops_ratio), "full / this"),
        Column("Calibration score", lambda row: words.percent(row.score), "score"),
        Column("", lambda row: "taken" if row.chosen else "", text=True),
        strong=lambda row: row.chosen,
    )


def points_table(points: Sequence[SearchResult]) -> Table:
    """What a frontier's searches found, cheapest first."""
    return Table(
        "Points of the frontier, cheapest first",
        points,
        Column("Mean keep rate", lambda point: words.percent(point.schedule.mean_keep_rate), "mean keep rate"),
        Column("Spent", lambda point: words.NOTHING if point.spent is None else f"{point.spent:.4g}", "spent"),
        Column("Calibration score", lambda point: words.percent(point.score), "score"),
        Column("Drop in points", lambda point: words.points(point.drop), "drop"),
    )


def schedule_bars(keep_rates: Sequence[float]) -> Text:
    """For a terminal, a bar for each layer under a line with the schedule's ends and its mean."""
    mean = words.percent(sum(keep_rates) / len(keep_rates))
    text = line("Keep rate by layer", "bold")
    text.append(f"  {words.percent(keep_rates[0])} → {words.percent(keep_rates[-1])}, mean {mean}\n", "not bold")
    return text.append(words.bars(keep_rates), "not bold blue")


def tasks_table(per_task: Sequence[TaskRow]) -> Table:
    """The scores of each task."""
    return Table(
        "Score by task, full against reduced",
        per_task,
        Column("Task", lambda row: row.task, "task", text=True),
        Column("Questions", lambda row: words.count(row.n), "questions"),
        Column("Full", lambda row: words.percent(row.full), "full"),
        Column("Reduced", lambda row: words.percent(row.reduced), "reduced"),
        Column("Drop in points", lambda row: words.points(row.full - row.reduced), "drop"),
    )


def timing_table(timings: Sequence[Timing]) -> Table:
    """Measured times; says that the gain is in prefill."""
    return Table(
        "Measured time (the gain is in prefill)",
        timings,
        Column("Measured", lambda row: row.what, "", text=True),
        Column("Batch", lambda row: words.count(row.batch), "batch"),
        Column("Runs", lambda row: words.count(row.runs), "runs"),
        Column("Full", lambda row: words.milliseconds(row.full_ms), "full"),
        Column("Reduced", lambda row: words.milliseconds(row.reduced_ms), "reduced"),
        Column("Full / reduced", lambda row: words.ratio(row.ratio), "full / reduced"),
    )


def schedule_table(schedule: Schedule, total: int | None = None) -> Table:
    """The keep rate of each layer, and its tokens where a prompt's number of them is known."""
    counts = None if total is None else schedule.counts(total)
    return Table(
        "Keep rate by layer",
        enumerate(schedule.keep_rates),
        Column("Layer", lambda row: row[0], "layer", text=True),
        Column("Keep rate", lambda row: words.percent(row[1]), "keep rate"),
        *([] if counts is None else [Column(f"Tokens of {total}", lambda row: words.count(counts[row[0]]))]),
    )


def consistency_table(found: RankConsistency) -> Table:
    """How alike each layer and the one before rank the vision tokens."""

    def before(values: Any, show: Callable[[float], str]) -> Callable[[int], str]:
        return lambda layer: show(float(values[layer - 1])) if layer else words.NOTHING

    return Table(
        "Rank consistency by layer",
        range(len(found.tied_share)),
        Column("Layer", str, "layer", text=True),
        Column("Tau with the layer before", before(found.tau, words.plain), "tau"),
        Column("", lambda layer: words.bar(found.tau[layer - 1]) if layer else "", text=True, places=("terminal",)),
        Column("Top-token overlap", before(found.topk_overlap, words.percent), "top overlap"),
        Column("Tied tokens", lambda layer: words.percent(float(found.tied_share[layer])), "ties"),
        notes=[found.summary()],
    )


def trials_table(trials: Sequence[Trial]) -> Table:
    """The evaluations of a search: of layers, or of whole schedules with the share of the examples they took."""
    whole = any(trial.layer is None for trial in trials)
    return Table(
        "Trials, on the calibration set",
        enumerate(trials, 1),
        Column("Trial", lambda row: row[0], text=True),
        Column("Candidate" if whole else "Layer", lambda row: _candidate(row[1]), text=whole),
        Column("Keep rate", lambda row: words.percent(row[1].keep_rate)),
        Column("Tokens", lambda row: words.count(row[1].count)),
        Column("Score", lambda row: f"{'' if row[1].complete else '≤ '}{words.percent(row[1].score)}"),
        Column("Examples" if whole else "Verdict", lambda row: _verdict(row[1]), text=not whole),
        Column("Time", lambda row: words.duration(row[1].seconds)),
    )


def _candidate(trial: Trial) -> str:
    return trial.why if trial.layer is None else str(trial.layer)


def _verdict(trial: Trial) -> str:
    if trial.layer is None:
        return words.percent(trial.share)
    return ("accepted" if trial.accepted else "rejected") + ("" if trial.complete else ", stopped early")
