"""The suite's results as Markdown: ``python -m conformance.table out/a.xml --write docs/models.md``.

Reads the reports that ``pytest tests/conformance --junitxml`` wrote, and puts a table between the markers of
each file: all cells, or in a README families by what they refuse. Nothing is written where a cell fails. Knows nothing
about models or behaviours but their names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from .families import FAMILIES

PASSES, REFUSED, FAILS, NONE = "yes", "refused", "**fails**", "-"
BEGIN, END = "<!-- conformance:begin -->", "<!-- conformance:end -->"

Cells = dict[tuple[str, str], str]


def read_cells(reports: Iterable[Path]) -> Cells:
    """(family, behaviour) -> what became of all tests of that cell."""
    cells: Cells = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            known = {each.get("name"): each.get("value") for each in case.iter("property")}
            family, behaviour = known.get("family"), known.get("behaviour")
            if family is None or behaviour is None or case.find("skipped") is not None:
                continue
            passed = case.find("failure") is None and case.find("error") is None
            state = FAILS if not passed else REFUSED if known.get("refused") == "true" else PASSES
            key = (family, behaviour)
            cells[key] = FAILS if FAILS in (state, cells.get(key)) else state
    return cells


def table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def names(cells: Cells) -> tuple[list[str], list[str]]:
    """Families in the order of their table, behaviours in that of the tests."""
    found = {family for family, _ in cells}
    families = [family for family in FAMILIES if family in found]
    return families, sorted({behaviour for _, behaviour in cells})


def full(cells: Cells) -> str:
    """Every cell: one line per family, one column per behaviour."""
    families, behaviours = names(cells)
    lines = [["family", "transformers class", *behaviours]]
    for family in families:
        states = (cells.get((family, each), NONE) for each in behaviours)
        lines.append([family, f"`{FAMILIES[family].model_class}`", *states])
    return table(lines)


def compact(cells: Cells) -> str:
    """Families by what they refuse; what all refuse, below."""
    families, behaviours = names(cells)
    by_all = [b for b in behaviours if {s for (_, each), s in cells.items() if each == b} == {REFUSED}]
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in families:
        refused = tuple(b for b in behaviours if b not in by_all and cells.get((family, b)) == REFUSED)
        alike.setdefault(refused, []).append(family)
    lines = [["`generate()` under a reduction", "families"]]
    for refused, members in sorted(alike.items(), key=lambda each: (len(each[0]), each[0])):
        what = f"all but: {', '.join(refused)}" if refused else "all behaviours that the class has"
        lines.append([f"{what} ({len(members)})", ", ".join(members)])
    return table(lines) + (f"\n\nRefused for every family: {', '.join(by_all)}." if by_all else "")


def replace_between_markers(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with what stands between its markers replaced."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no place to write to: put {begin} and {end} into the file")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Print the table, or write it; 1 if a cell fails."""
    parser = argparse.ArgumentParser(prog="conformance.table", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--write", nargs="+", type=Path, default=[])
    given = parser.parse_args(arguments)
    cells = read_cells(given.reports)
    failing = sorted(" x ".join(cell) for cell, state in cells.items() if state == FAILS)
    if failing or not cells:
        print("fails: " + ", ".join(failing) if failing else "no results in these reports", file=sys.stderr)
        return 1
    for path in given.write:
        made = compact(cells) if path.name == "README.md" else full(cells)
        path.write_text(replace_between_markers(path.read_text("utf-8"), made), "utf-8")
    if not given.write:
        print(full(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
