"""VLMEvalKit's tables: tab-separated, images as base64 or paths, options in columns A, B, C ...; other tables with tabs
or commas too.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...errors import BadInput
from .base import READERS, Reader, Source
from .rows import Row
from .stream import read_text
from .tables import Ask, Columns, row_of

_REFERENCE = 64  # characters: what VLMEvalKit takes for the index of another row, whose image it is
_ASKED = Ask(
    question="Question: {question}",
    hint="Hint: {hint}\n",
    options="\nOptions:\n{options}\nPlease select the correct answer from the options above.",
)


class Table(Reader):
    """One question a line below a line of columns."""

    name = "tsv"
    form = "a table with a line of columns: index, image (base64) or image_path, question, answer, A, B ... (options)"

    def reads(self, source: Source) -> bool:
        """By its name."""
        return source.path.suffix.lower() in (".tsv", ".csv")

    def rows(self, source: Source) -> Iterator[Row]:
        """A row for each line."""
        path = source.check_file()
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # an image is longer than csv's own limit
        mark = "," if path.suffix.lower() == ".csv" else "\t"
        lines = csv.reader(read_text(path, newline=""), delimiter=mark)
        try:
            header = next(lines, [])
            if len(set(header)) < len(header) or not all(header):
                raise BadInput(f"{path}, line 1: columns are {', '.join(header)}: name each, and none twice")
            columns = Columns.among(header, source)
            seen: dict[str, str] = {}
            start = lines.line_num + 1
            for number, cells in enumerate(lines):
                where, start = f"{path}, line {start}", lines.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise BadInput(f"{where} has {len(cells)} cells for {len(header)} columns: mend the line")
                row = row_of(dict(zip(header, cells, strict=True)), number, where, columns, source, _ASKED)
                yield _referring(row, seen)
        except csv.Error as error:
            raise BadInput(f"{path}, line {lines.line_num} cannot be read ({error}): mend the line") from None


def _referring(row: Row, seen: dict[str, str]) -> Row:
    """The row with the image of another one where it names that row's index, as VLMEvalKit's tables do."""
    images: Any = row.fields.get("images")
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], str):
        return row
    identity = str(row.fields["id"])
    if len(images[0]) > _REFERENCE:
        seen[identity] = images[0]
    elif images[0] in seen:
        return replace(row, fields={**row.fields, "images": [seen[images[0]]]})
    return row


READERS.register(Table())
