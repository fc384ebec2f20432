"""The notebooks of the docs as they are committed: run from top to bottom, and clean of what is this machine's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
OURS = re.compile(r"/(tmp|home|root|work|Users|usr|opt)/|[A-Z]:\\\\")  # how paths of a machine begin


def code_cells(path: Path) -> list[dict[str, Any]]:
    book = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [each for cell in code_cells(path) for each in cell["outputs"]]


def texts(output: dict[str, Any]) -> str:
    parts = [
        output.get("text", ""),
        *(text for kind, text in output.get("data", {}).items() if "image/png" not in kind),
    ]
    return "\n".join("".join(part) for part in parts)


def test_there_are_three() -> None:
    assert [path.stem for path in PATHS] == ["compare-methods", "first-search", "kept-tokens-and-failures"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert {each["output_type"] for each in outputs(path)} <= {"stream", "display_data", "execute_result"}
    assert {each.get("name", "stdout") for each in outputs(path)} == {"stdout"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_hold_no_progress_and_no_path_of_a_machine(path: Path) -> None:
    for each in outputs(path):
        told = re.sub(r"data:[\w/+-]+;base64,[\w+/=]+", "", texts(each))
        assert "thinsight-progress" not in told
        assert not OURS.search(told), told[:200]


def test_the_first_search_ends_with_a_certificate() -> None:
    told = "\n".join(texts(each) for each in outputs(FOLDER / "first-search.ipynb"))
    assert re.search(r"At most \d+ points of the score are lost on data like these, with 95 % confidence", told)
    assert re.search(r"\d+ loss(es)? and \d+ wins? in \d+ examples about \d+ images, p = 0\.0\d\d", told)
    assert "<svg" in told


def test_failures_are_shown_with_their_kept_tokens() -> None:
    figures = [
        each for each in outputs(FOLDER / "kept-tokens-and-failures.ipynb") if "image/png" in each.get("data", {})
    ]
    assert len(figures) == 4
    sizes = [len("".join(each["data"]["image/png"])) for each in figures]
    assert min(sizes) > 10_000
    assert sum(path.stat().st_size for path in PATHS) < 3_000_000
