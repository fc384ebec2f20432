"""The terminal's tables: they fit 80 columns, hold the numbers, and never read text as markup."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from thinsight import shown
from thinsight.evaluation.result import consistency_table, timing_table
from thinsight.report import tables
from thinsight.report.data import MethodRow


def _printed(item, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(item)
    return console.file.getvalue()


def test_all_tables_fit_eighty_columns(report):
    text = _printed(report)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_no_text_moves_the_cursor(report):
    evil = "a\x1b[2Jb\x9b31m\nc\r\u202ed \ud800"
    tasks = [replace(row, task=evil) for row in report.per_task]
    methods = [replace(row, name=evil) for row in report.methods]
    hostile = replace(report, title=evil, per_task=tasks, methods=methods)
    text = _printed(replace(hostile, consistency=None), width=200)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    assert text.count("a\\x1b[2Jb\\x9b31m c \\u202ed \\ud800") >= 1 + len(tasks) + len(methods)


def test_headline_table(report):
    text = _printed(tables.headline_table(report.headline, report.dataset))
    assert "1,024 test questions" in text
    for cell in (
        "94.1 %",
        "93.8 %",
        "drop 0.3 [\N{MINUS SIGN}0.5, 1.1] points",
        "2.63\N{MULTIPLICATION SIGN}",
        "1.91\N{MULTIPLICATION SIGN}",
        "1.21\N{MULTIPLICATION SIGN}",
        "2.91\N{MULTIPLICATION SIGN}",
    ):
        assert cell in text


def test_headline_table_leaves_out_what_was_not_measured(report):
    text = _printed(tables.headline_table(replace(report.headline, prefill_ratio=None, flops=None)))
    assert "prefill" not in text
    assert "None" not in text


def test_methods_table_has_every_method(report):
    text = _printed(tables.methods_table(report.methods))
    for row in report.methods:
        assert row.name in text
        assert shown.percent(row.score) in text
    assert "at the same decoder FLOPs" in text


def test_methods_of_unlike_cost_are_not_called_equal():
    rows = [MethodRow(str(cost), (), 0.5, None, 1.0, cost, 1.0) for cost in (1e9, 2e9)]
    assert "same decoder FLOPs" not in _printed(tables.methods_table(rows))


def test_timing_says_where_the_gain_is(report):
    text = _printed(timing_table(report.timing))
    assert "the gain is in prefill" in text
    assert "413 ms" in text


def test_tasks_and_consistency(report):
    text = _printed(tables.tasks_table(report.per_task)) + _printed(consistency_table(report.consistency))
    for row in report.per_task:
        assert row.task in text
    for tau in report.consistency.tau:
        assert shown.plain(tau) in text


def test_schedule_bars():
    assert shown.bars([1.0, 0.5, 0.001, 0.0]) == "█▄▁·"
    assert shown.bars([float("nan")]) == "?"
    text = str(shown.schedule_bars((1.0, 0.5)))
    assert "100.0 % → 50.0 %, mean 75.0 %" in text


def test_names_are_not_markup(report):
    rows = [replace(report.methods[1], name="[red]name[/red]")]
    assert "[red]name[/red]" in _printed(tables.methods_table(rows))


@pytest.mark.parametrize("width", [80, 120])
def test_print_report(report, bare_report, width):
    for data in (report, bare_report):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(data)
        assert data.title in console.file.getvalue()
