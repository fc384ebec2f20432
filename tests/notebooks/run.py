"""Runs the notebooks of a folder anew, each in an empty folder: `make notebooks`.

Fails where a cell fails, or where what a cell prints or what its value is as text differs from what is committed, such
as the counts of a certificate; pictures and tables hold times too and are not compared. With ``--write`` the outputs
are written into the notebooks instead, without progress, and refused where they name a path of this machine.
Needs nbclient and ipykernel, so it is no test of the suite.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

SECONDS = 1800  # of a cell
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TEXTS = ("text/plain", "text/html", "image/svg+xml")


def executed(path: Path) -> Any:
    """The notebook with what its cells give now, as it would be committed."""
    book = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        client = NotebookClient(book, timeout=SECONDS, kernel_name=KERNEL["name"], on_cell_executed=tell(path.name))
        client.resources = {"metadata": {"path": folder}}
        client.execute()
        for told in all_texts(book):
            for secret in (folder, str(Path.cwd()), sys.prefix, str(Path.home()) + os.sep):
                if secret in told:
                    sys.exit(f"{path.name}: an output names {secret}")
    book.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("metadata", {}).get("thinsight") != "progress"]
            if any(each.output_type == "stream" and each.name == "stderr" for each in cell.outputs):
                sys.exit(f"{path.name}: a cell writes to standard error: {texts(cell)}")
    return book


def tell(name: str) -> Callable[..., None]:
    """What prints how long each cell took."""
    began = time.monotonic()

    def told(cell: Any, cell_index: int, **_: Any) -> None:
        print(f"{name}: cell {cell_index} done after {time.monotonic() - began:.0f} s", flush=True)

    return told


def texts(cell: Any) -> str:
    """What a cell printed, and its value as text."""
    if cell.cell_type != "code":
        return ""
    found = (each.text if each.output_type == "stream" else each.data.get("text/plain", "") for each in cell.outputs)
    return "\n".join(text.rstrip("\n") for text in found)


def all_texts(book: Any) -> Iterator[str]:
    """Every output of a notebook that is text."""
    for cell in book.cells:
        for each in cell.get("outputs", ()):
            yield str(each.get("text", ""))
            yield from (str(each.get("data", {}).get(kind, "")) for kind in TEXTS)


def differences(path: Path, book: Any) -> list[str]:
    """Lines of a comparison with what is committed."""
    committed = nbformat.read(path, as_version=4)
    lines: list[str] = []
    for place, (old, new) in enumerate(zip(committed.cells, book.cells, strict=True)):
        before, after = (texts(each).splitlines() for each in (old, new))
        lines += difflib.unified_diff(before, after, f"{path.name}, cell {place}: committed", "now", lineterm="")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    paths = sorted(given.folder.glob("*.ipynb"))
    if not paths:
        sys.exit(f"no notebook in {given.folder}")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' own bars, which kernels inherit
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm wants ipywidgets, for bars that are off
    found = []
    for path in paths:
        began = time.monotonic()
        book = executed(path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)
        if given.write:
            nbformat.write(book, path)
        else:
            found += differences(path, book)
    if found:
        print("\n".join([*found, "If that is as it should be: make notebooks WRITE=--write"]))
        sys.exit(1)


if __name__ == "__main__":
    main()
