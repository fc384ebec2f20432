"""Which types of models are not on the list, and why, as Markdown: ``python -m conformance.states docs/models.md``.

They are all that transformers loads as models that answer questions about images, and those that `REFUSED` names.
Writes between the markers of a page. Knows nothing about the suite.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from thinsight.families import FAMILIES, REFUSED
from thinsight.runtime.anatomy import refusal

from .table import replace_between_markers, table

BEGIN, END = "<!-- refused:begin -->", "<!-- refused:end -->"
NOT_TRIED = "not refused for good: nobody has tried it yet, [`thinsight check`](check.md) says whether it runs"


def unlisted() -> list[str]:
    """By name, of those that the installed transformers knows."""
    known = {*CLASSES, *REFUSED} & {*transformers.CONFIG_MAPPING}
    return sorted(known - {*FAMILIES})


def reason(model_type: str) -> str:
    """Why a type is not on the list, as its users are told, without what they might do."""
    message = str(refusal(transformers.CONFIG_MAPPING[model_type]()))
    named, mine, why = message.partition(f"{model_type!r} ")
    return why.rpartition(";")[0] if mine and not named else NOT_TRIED


def states() -> str:
    """One line per reason, with all types for which it holds."""
    by_reason: dict[str, list[str]] = {}
    for model_type in unlisted():
        by_reason.setdefault(reason(model_type), []).append(model_type)
    lines = sorted(
        ([", ".join(f"`{name}`" for name in each), why] for why, each in by_reason.items()),
        key=lambda line: line[1] == NOT_TRIED,
    )
    return table([["model_type", "what holds for it"], *lines])


def main(paths: list[str]) -> None:
    """Write the table into pages."""
    for path in map(Path, paths):
        text = replace_between_markers(path.read_text("utf-8"), states(), BEGIN, END)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
