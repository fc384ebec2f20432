"""Rows of measurements: kept as JSON and as a Markdown table, row by row, and shown.

Knows nothing about what is measured.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from thinsight.records import write_atomically

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

RESULTS = Path(__file__).parent / "results"
TABLE_WIDTH = 200  # rich would cut columns to a narrow terminal's width; this wraps there
MIB = 2.0**-20


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what rows are measured."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "device": gpu or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """The processor's name, or else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Results:
    """The rows of one benchmark, written as JSON and as Markdown whenever one is added."""

    def __init__(self, path: Path, where: Mapping[str, Any], columns: Columns, resume: bool) -> None:
        self.path, self.where, self.columns = path, dict(where), columns
        self.rows: list[Row] = []
        if resume and path.exists():
            self._read()

    def _read(self) -> None:
        found = json.loads(self.path.read_text())
        self.rows = found.pop("rows")
        found.pop("date")
        if found != self.where:
            raise SystemExit(f"{self.path} was measured on {found}, this is {self.where}: leave out --resume")

    def has(self, settings: Row) -> bool:
        """Whether a row of these settings is there."""
        return any(all(row.get(name) == value for name, value in settings.items()) for row in self.rows)

    def add(self, *rows: Row) -> None:
        """Keep rows that belong together."""
        self.rows += rows
        date = datetime.now(timezone.utc).date().isoformat()
        record = {**self.where, "date": date, "rows": self.rows}
        write_atomically(self.path, json.dumps(record, indent=2) + "\n")
        write_atomically(self.path.with_suffix(".md"), self._markdown(date))

    def _markdown(self, date: str) -> str:
        head = [list(self.columns), ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in [*head, *map(self._cells, self.rows)]]
        device = "" if self.where["device"] == "cpu" else f"{self.where['device']}; "
        more = "".join(f", {name} {self.where[name]}" for name in ("vllm",) if name in self.where)
        note = f"; {self.where['note']}" if "note" in self.where else ""
        return "\n".join(lines) + (
            f"\n\n{device}{self.where['machine']}, {self.where['threads']} threads; {date}; "
            f"torch {self.where['torch']}, transformers {self.where['transformers']}{more}{note}.\n"
        )

    def print(self, title: str) -> None:
        """The table on the terminal."""
        table = Table(title=title)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*self._cells(row))
        Console(width=TABLE_WIDTH).print(table)

    def _cells(self, row: Row) -> list[str]:
        return [cell(row) for cell in self.columns.values()]


def setting(name: str) -> Callable[[Row], str]:
    """A cell that shows one of the row's settings."""
    return lambda row: str(row[name])


def number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A cell that shows a number; a dash where it was not measured."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return "-" if value is None else form.format(scale * value)

    return cell
