"""A report's numbers as rich tables for the terminal, each function one table.

Knows nothing about HTML, models or where the numbers come from. Texts of users and models never become
rich markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..texts import terminal
from . import comparison as compared
from . import words
from .data import Consistency, DatasetInfo, FrontierRow, Headline, MethodRow, ReportData, TaskRow, TimingRow

_LEVELS = "·▁▂▃▄▅▆▇█"


def _table(title: str, columns: Sequence[str], text_columns: Sequence[int] = (0,)) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for place, name in enumerate(columns):
        is_text = place in text_columns
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    return table


def _add(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(_text, cells), style=style)


def _text(text: str, style: str = "") -> Text:
    """Whoever wrote it: no markup, and no control of the terminal."""
    return Text(terminal(text), style=style)


def headline_table(headline: Headline, dataset: DatasetInfo | None = None) -> Table:
    """full | reduced | ratio or drop with its interval."""
    where = f" on {words.count(dataset.test_size)} test questions" if dataset is not None else ""
    table = _table(f"Full against reduced{where}", ("", "full", "reduced", "ratio or drop"))
    _add(
        table,
        "score",
        words.percent(headline.full_score),
        words.percent(headline.score),
        f"drop {words.interval(headline.drop)} points",
    )
    _add(table, "mean keep rate", words.percent(1.0), words.percent(headline.mean_keep_rate), "")
    _add(
        table,
        "decoder FLOPs",
        words.flops(headline.flops_full) if headline.flops_full is not None else "",
        words.flops(headline.flops) if headline.flops is not None else "",
        words.ratio(headline.flops_ratio),
    )
    for name, value in (
        ("KV cache of the prompt", headline.kv_ratio),
        ("prefill time", headline.prefill_ratio),
        ("whole-answer time", headline.answer_ratio),
    ):
        if value is not None:
            _add(table, name, "", "", words.ratio(value))
    return table


def methods_table(methods: Sequence[MethodRow]) -> Table:
    """Every method's score, drop and cost; the search's own in bold."""
    title = "Methods at the same decoder FLOPs" if words.same_cost(tuple(methods)) else "Methods"
    table = _table(title, ("method", "score", "drop [95 %]", "kept", "FLOPs", "full / this"))
    for row in methods:
        _add(
            table,
            row.name,
            words.percent(row.score),
            words.interval(row.drop) if row.drop is not None else words.NOTHING,
            words.percent(row.mean_keep_rate),
            words.flops(row.flops),
            words.ratio(row.flops_ratio),
            style="bold" if row.kind == "found" else None,
        )
    return table


def print_comparison(comparison: compared.Comparison, console: Console) -> None:
    """One table per budget, best score first; our search in bold."""
    if comparison.doubt:
        console.print(_text(f"Warning: {comparison.doubt}", "bold red"), soft_wrap=True)
        console.print()
    lines = compared.table(comparison)
    for budget in dict.fromkeys(line.budget for line in lines):
        full = words.percent(comparison.full_score)
        title = f"{compared.budget_title(budget, comparison.unit)}; full model {full}"
        columns = ("method", "score", "drop [95 %]", "ours minus this [95 %]", "full / this")
        table = _table(title, columns)
        for line in (line for line in lines if line.budget == budget and not line.refused):
            _add(
                table,
                line.title,
                words.percent(line.score),
                words.NOTHING if line.drop is None else words.interval(line.drop),
                words.NOTHING if line.behind is None else words.interval(line.behind),
                words.ratio(line.flops_ratio),
                style="bold" if line.method == compared.OURS else None,
            )
        console.print(table)
        for line in (line for line in lines if line.budget == budget and line.refused):
            console.print(_text(f"{line.title}: {line.refused}", "dim"), soft_wrap=True)
        console.print()


def frontier_table(frontier: Sequence[FrontierRow]) -> Table:
    """Every point of the frontier; the one that was taken in bold."""
    table = _table("The frontier, on the calibration set", ("mean keep rate", "score", "full / this"), ())
    for row in frontier:
        cells = (words.percent(row.mean_keep_rate), words.percent(row.score), words.ratio(row.flops_ratio))
        _add(table, *cells, style="bold" if row.chosen else None)
    return table


def tasks_table(per_task: Sequence[TaskRow]) -> Table:
    table = _table("Task by task", ("task", "questions", "full", "reduced", "drop"))
    for row in per_task:
        cells = (words.percent(row.full), words.percent(row.reduced), words.points(row.full - row.reduced))
        _add(table, row.task, words.count(row.n), *cells)
    return table


def timing_table(timing: Sequence[TimingRow]) -> Table:
    """Measured times; says that the gain is in prefill."""
    table = _table("Measured time (the gain is in prefill)", ("", "batch", "runs", "full", "reduced", "full / reduced"))
    for row in timing:
        times = (words.milliseconds(row.full_ms), words.milliseconds(row.reduced_ms), words.ratio(row.ratio))
        _add(table, row.what, words.count(row.batch), words.count(row.runs), *times)
    return table


def bars(values: Sequence[float]) -> str:
    """One block character per value of 0 to 1; a dot is 0, and only 0."""
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[max(1 if v > 0 else 0, min(top, round(v * top)))] if v == v else "?" for v in values)


def schedule_text(keep_rates: Sequence[float]) -> Text:
    """The schedule as a row of bars, one per layer, under a line with its ends and its mean."""
    mean = words.percent(sum(keep_rates) / len(keep_rates))
    first, last = words.percent(keep_rates[0]), words.percent(keep_rates[-1])
    text = Text("Keep rate by layer", style="bold")
    text.append(f"  {first} → {last}, mean {mean}\n", style="not bold")
    text.append(bars(keep_rates), style="not bold blue")
    return text


def consistency_table(consistency: Consistency) -> Table:
    """Kendall's tau of each layer with the one before, with bars."""
    table = _table("Rank consistency with the layer before", ("layer", "tau", "", "top overlap", "ties"), (0, 2))
    for layer in range(len(consistency.tau) + 1):
        tau = consistency.tau[layer - 1] if layer else float("nan")
        overlap = consistency.topk_overlap[layer - 1] if layer and consistency.topk_overlap else None
        tied = consistency.tied_share[layer] if consistency.tied_share else None
        bar = "█" * round(20 * max(tau, 0)) if tau == tau else ""
        first = words.plain(tau) if layer else words.NOTHING
        shared = words.percent(overlap) if layer else words.NOTHING
        _add(table, str(layer), first, bar, shared, words.percent(tied))
    return table


def report_tables(data: ReportData) -> RenderableType:
    """All of a report that a terminal can show, top to bottom."""
    parts: list[RenderableType] = [_text(data.title, "bold")]
    if data.headline is not None:
        parts += [_text(words.headline(data.headline), "bold green"), Text()]
        for doubt in data.doubts:
            parts += [_text(f"Warning: {doubt}", "bold red"), Text()]
        parts += [headline_table(data.headline, data.dataset), Text()]
        parts += [_text(words.meaning(data.headline, data.search)), Text()]
    if data.keep_rates:
        parts += [schedule_text(data.keep_rates), Text()]
    if data.methods:
        parts += [methods_table(data.methods), _text(words.ranking(data.methods)), Text()]
    if data.frontier:
        parts += [frontier_table(data.frontier), Text()]
    if data.per_task:
        parts += [tasks_table(data.per_task), Text()]
    if data.timing:
        parts += [timing_table(data.timing), Text()]
    if data.consistency is not None:
        parts += [consistency_table(data.consistency), _text(data.consistency.words), Text()]
    return Group(*parts)


def print_report(data: ReportData, console: Console | None = None) -> None:
    """Prints `report_tables` to the console (standard output when None is given)."""
    (console or Console()).print(report_tables(data))
