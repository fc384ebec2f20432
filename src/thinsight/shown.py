"""How things are shown: numbers as text, tables in three places (a page, a terminal, a Markdown text), and `Shown`, by
which the objects that hold numbers show themselves in a terminal and in a notebook.

Each table is defined once, beside its records. No text of a user or a model becomes markup. Scores are fractions coming
in and points of 100 going out; what draws a table is loaded when one is drawn.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import resources
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from . import texts

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import RenderableType
    from rich.text import Text

MISSING = "n/a"
NOTHING = "\N{EN DASH}"  # where there can be no number
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
_LEVELS = "·▁▂▃▄▅▆▇█"


def fixed(value: float, digits: int, unit: str = "") -> str:
    """Fixed decimals with a real minus sign and never a negative zero; what is not known is said to be so."""
    if math.isnan(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return f"{text.lstrip('-') if float(text) == 0 else text.replace('-', MINUS)}{unit}"


def points(value: float) -> str:
    """A score or a drop in points of 100: 0.0034 -> '0.3'."""
    return fixed(100 * value, 1)


def percent(value: float) -> str:
    return fixed(100 * value, 1, " %")


def ratio(value: float) -> str:
    """A ratio: 2.634 -> '2.63x'. Two decimals, so that 1.96 does not read as 2."""
    return fixed(value, 2, TIMES)


def plain(value: float, digits: int = 2) -> str:
    return fixed(value, digits)


def flops(value: float) -> str:
    """FLOPs with their unit: 3.95e12 -> '3.95 TFLOPs'."""
    scale, unit = flops_unit(value)
    return f"{_significant(value / scale)} {unit}"


def flops_unit(largest: float) -> tuple[float, str]:
    """The divisor and the unit in which numbers up to `largest` read well."""
    for scale, unit in ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if largest >= scale:
            return scale, unit
    return 1.0, "FLOPs"


def milliseconds(value: float) -> str:
    return f"{_significant(value / 1000)} s" if value >= 10_000 else f"{_significant(value)} ms"


def duration(seconds: float) -> str:
    """'48 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{_significant(seconds)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clock(seconds: float) -> str:
    """'0:07', '12:31', '1:02:09'."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def count(value: int) -> str:
    return f"{value:,}"


def tokens(value: int) -> str:
    return texts.counted(value, "token")


def parameters(value: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{_significant(value / scale)}{unit}"
    return str(value)


def bars(values: Sequence[float]) -> str:
    """One block character per value of 0 to 1; a dot is 0, and only 0."""
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[max(1 if v > 0 else 0, min(top, round(v * top)))] if v == v else "?" for v in values)


def bar(value: float) -> str:
    """A bar of up to 20 blocks for a value of 0 to 1, none where it is not known."""
    return "█" * round(20 * max(value, 0)) if value == value else ""


def _significant(value: float) -> str:
    """Three significant digits, without exponent."""
    size = abs(value)
    return fixed(value, 0 if size >= 100 else 1 if size >= 10 else 2)


# -- tables ------------------------------------------------------------------------------------------------

EVERYWHERE = ("page", "terminal", "markdown")
_FIGURES = re.compile(r"[-+±\d., \[\]x%]*")  # what Markdown needs no escape for
_PLAIN = str.maketrans({TIMES: "x", MINUS: "-", NOTHING: ""})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_UNITS = {" %": " in %", "x": ""}  # that a column of figures has in its header and not in each cell
MOST_ROWS = 12  # of a table that a notebook shows unfolded
_SHEETS = ("plots", "style", "notebook")
_COLORS = re.compile(r":root \{(.*?)\}", re.DOTALL)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes texts that begin so


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
        self._plain = [list(row) for row in self.rows]  # without what is markup, for CSV

    def put(self, place: int, cells: Sequence[object], header: str | None = None) -> Table:
        """With other cells in a column, or with another column of text behind the last."""
        if header is not None:
            self.columns.append(Column(header, str, text=True))
        for row, plain, cell in zip(self.rows, self._plain, cells, strict=True):
            row[place : place + 1] = [cell]
            if not hasattr(cell, "__html__"):
                plain[place : place + 1] = [cell]
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

    def csv(self) -> str:
        """The table as CSV without its title and notes: figures as they are typed, their unit in the header."""
        width = min(map(len, self._plain), default=len(self.columns))
        columns = [_csv_column(each, [row[i] for row in self._plain]) for i, each in enumerate(self.columns[:width])]
        out = io.StringIO()
        csv.writer(out).writerows(zip(*columns, strict=True))
        return out.getvalue()

    def markdown(self) -> str:
        """The table without its title and notes."""
        columns, rows = self.at("markdown")
        lines = ["".join(f"| {column.header} " for column in columns) + "|", "|" + "---|" * len(columns)]
        for cells, strong in rows:
            shown = [_markdown(*each) for each in zip(cells, columns, strict=True)]
            shown[0] = f"**{shown[0]}**" if strong else shown[0]
            lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in shown))
        return "\n".join(lines)


def typed(figure: object) -> str:
    """A figure as it is typed: 2.63x, -0.5, nothing where there is none."""
    return str(figure).translate(_PLAIN)


def _csv_column(column: Column, cells: Sequence[object]) -> list[str]:
    """The header and the cells of a column."""
    if column.text:
        made = [texts.terminal(cell) for cell in cells]
        return [column.header, *(f"'{text}" if text.startswith(_FORMULA) else text for text in made)]
    figures = [_THOUSANDS.sub("", typed("" if cell is None else cell)) for cell in cells]
    for unit, told in _UNITS.items():
        if any(figures) and all(figure.endswith(unit) for figure in figures if figure):
            return [column.header + told, *(figure.removesuffix(unit) for figure in figures)]
    return [column.header, *figures]


def _markdown(cell: object, column: Column) -> str:
    text = str(cell) if column.text else typed(cell)
    return text if not column.text and _FIGURES.fullmatch(text) else texts.markdown(text)


class Shown:
    """What shows itself as tables in a terminal (``rich.print``) and in a notebook, there with sentences above them and
    with drawings."""

    __slots__ = ()

    def _tables(self) -> Iterable[Table]:
        raise NotImplementedError

    def _sentences(self) -> Iterable[str]:
        """What a notebook shows above all else."""
        return ()

    def _drawings(self) -> Iterable[Markup]:
        """What a notebook shows above the tables."""
        return ()

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*spaced(self._tables()))

    def _repr_html_(self) -> str:
        return fill(
            "notebook.html.j2",
            style=notebook_style(),
            sentences=self._sentences(),
            drawings=self._drawings(),
            tables=list(self._tables()),
            most=MOST_ROWS,
        )


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
def notebook_style() -> Markup:
    """The style sheet of what stands in a notebook: that of the plots with a few rules of its own, held to our element.

    A notebook says in ways of its own whether it is dark, and else the browser does.
    """
    from markupsafe import Markup

    sheets = [resources.files("thinsight.report").joinpath(f"{name}.css").read_text("utf-8") for name in _SHEETS]
    light, dark = (" ".join(found.split()) for found in _COLORS.findall("".join(sheets))[:2])
    plots, _, own = sheets
    rules = _COLORS.sub("", plots)
    return Markup(own.replace("/*light*/", light).replace("/*dark*/", dark).replace("/*plots*/", rules.strip()))


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


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """What is known by name; a fact without a text is left out."""
    name, text = (Column("", itemgetter(place), text=True) for place in range(2))
    return Table(title, [fact for fact in facts if fact[1]], name, text)


def schedule_bars(keep_rates: Sequence[float]) -> Text:
    """For a terminal, a bar for each layer under a line with the schedule's ends and its mean."""
    mean = percent(sum(keep_rates) / len(keep_rates))
    text = line("Keep rate by layer", "bold")
    text.append(f"  {percent(keep_rates[0])} → {percent(keep_rates[-1])}, mean {mean}\n", "not bold")
    return text.append(bars(keep_rates), "not bold blue")
