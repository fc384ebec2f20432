"""Objects that show themselves: the same table on a page, in a terminal and in Markdown, whatever is written in it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from report.conftest import make_report
from rich.console import Console

import thinsight as ts
from thinsight.evaluation.result import Measurement, RankConsistency, Timing
from thinsight.report.comparison import Comparison, Run
from thinsight.searches.run import SearchResult, Trial
from thinsight.shown import Column, Table, typed

EVIL = "[red]<b>\x1b[2Jx</b> | y"
STEP = ts.Schedule((1.0, 0.5, 0.25))
REDUCTION = ts.Reduction(STEP, {"name": "random", "seed": 3}, model_type="llava")
TIMING = Timing("prefill", (40.0, 50.0, 60.0), (20.0, 25.0, 30.0), 8)
FOUND = SearchResult(
    STEP,
    REDUCTION,
    (Trial(1, 0.5, 8, 0.875, True, True, STEP, seconds=1.5), Trial(2, 0.25, 4, 0.75, False, False, STEP, seconds=2.5)),
    "gsearch",
    0.01,
    0.9,
    0.875,
    0,
)
RUN = Run(0.5, "fastv", "FastV", None, (1.0, 0.0), {"name": "uniform"}, 0.5, 2.0, 0.5, (1.0, 0.0))
COMPARISON = Comparison("m", "t", "h", "keep", 20, (0,), 1.0, 4.0, (1.0, 1.0), ("a", "b"), (RUN,), {})

OBJECTS: dict[str, tuple[Any, list[str]]] = {
    "evaluation": (ts.Evaluation(0.875, np.ones(8), full_score=0.9), ["0.8750", "0.9000", "0.0250", "8"]),
    "timing": (TIMING, ["prefill", "50.0 ms", "25.0 ms", "2.00\N{MULTIPLICATION SIGN}"]),
    "measurement": (
        Measurement(
            (TIMING, Timing("whole answer", (9.0,), (9.0,), 8)), 4_000_000, 2_000_000, 8, 16, "cpu", "float32", 2
        ),
        [
            "whole answer (16 tokens)",
            "4.00 MB full, 2.00 MB reduced, 2.00\N{MULTIPLICATION SIGN}",
            "cpu, float32, 2 CPU threads",
        ],
    ),
    "consistency": (
        RankConsistency(np.array([0.5, 0.75]), np.eye(3), np.array([0.6, 0.7]), np.zeros(3), 0.25, 3),
        ["0.75", "60.0 %", "The layers agree on which vision tokens matter"],
    ),
    "search": (FOUND, ["gsearch", "accepted", "rejected, stopped early", "≤ 75.0 %", "2.50 s"]),
    "frontier": (ts.Frontier((FOUND,), 0.9, 2.0), ["58.3 %", "87.5 %", "2.5"]),
    "reduction": (REDUCTION, ["random, seed 3", "llava", "50.0 %", "always"]),
    "comparison": (COMPARISON, ["50 % of the vision tokens", "FastV", "50.0", "2.00\N{MULTIPLICATION SIGN}"]),
    "report": (make_report(pictures=0), ["Full against reduced", "FastV-like", "handwriting", "Rank consistency"]),
}


def printed(item: Any) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(item)
    return console.file.getvalue()


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_shows_its_numbers_in_a_terminal_and_in_a_notebook(name: str) -> None:
    item, wanted = OBJECTS[name]
    page = re.sub("<[^>]*>", " ", item._repr_html_())
    for text in wanted:
        assert text in re.sub(r"\s+", " ", printed(item)), text
        assert text in re.sub(r"\s+", " ", page), text


def test_no_text_becomes_markup_anywhere() -> None:
    table = Table(EVIL, [EVIL], Column(EVIL, str, text=True), notes=[EVIL])
    assert printed(table).count("[red]<b>\\x1b[2Jx</b> | y") == 4
    assert table._repr_html_().count("[red]&lt;b&gt;\\x1b[2Jx&lt;/b&gt; | y") == 4
    assert table.markdown().splitlines()[-1] == r"| \[red\]\<b\>\\x1b\[2Jx\</b\> \| y |"


def test_a_column_is_shown_where_it_belongs_and_a_row_stands_out() -> None:
    rows = [("a", 0.5, 2.5), ("b", -0.25, 3.0)]
    table = Table(
        "t",
        rows,
        Column("Name", lambda row: row[0], "name", text=True),
        Column("Share", lambda row: f"{row[1]:.2f}".replace("-", "\N{MINUS SIGN}")),
        Column("Page", lambda row: row[2], places=("page",)),
        strong=lambda row: row[0] == "b",
    )
    assert table.markdown().splitlines() == ["| Name | Share |", "|---|---|", "| a | 0.50 |", "| **b** | -0.25 |"]
    assert "Page" not in printed(table)
    assert "name" in printed(table)
    page = table._repr_html_()
    assert (
        '<tr class="found"><th scope="row">b</th><td class="n">\N{MINUS SIGN}0.25</td><td class="n">3.0</td></tr>'
        in page
    )


def test_a_figure_as_it_is_typed() -> None:
    assert typed("2.63\N{MULTIPLICATION SIGN}, \N{MINUS SIGN}0.5") == "2.63x, -0.5"
    assert typed("\N{EN DASH}") == ""


def test_what_draws_a_table_is_loaded_when_one_is_drawn() -> None:
    code = (
        "import sys, thinsight.searches.run, thinsight.evaluation.result\n"
        "print({'jinja2', 'rich', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
