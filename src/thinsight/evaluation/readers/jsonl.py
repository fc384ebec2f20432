"""JSON lines, thinsight's own form: one object a line, images as paths, data addresses or base64. A file that ends in
``.json`` may be one list of such objects.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import BadInput
from .base import READERS, Reader, Source
from .rows import Row
from .stream import objects, read_text

_FIELDS = ("id", "image", "images", "question", "answer", "answers", "metric")
_FORM = 'each line is {"id", "image" or "images", "question", "answer" or "answers", "metric" (optional)}'


class JsonLines(Reader):
    """One object a line."""

    name = "jsonl"
    form = _FORM

    def reads(self, source: Source) -> bool:
        """Whatever nothing else reads."""
        return source.path.is_file()

    def rows(self, source: Source) -> Iterator[Row]:
        """A row for each line that is not empty."""
        path = source.path
        if path.is_dir():
            raise BadInput(f"data {source.told!r} is a folder: give the JSON-lines file in it, {_FORM}")
        if not path.is_file():
            raise BadInput(
                f"data {source.told!r} does not exist: give a file or folder of yours, demo:calibration or demo:test, "
                "hf:ID:SPLIT of the Hub, or lmms-eval:TASK:SPLIT"
            )
        for where, record in _records(path, source.path.suffix == ".json" and source.head(64).lstrip()[:1] == "["):
            yield _row(record, where, source)


def _records(path: Path, listed: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if listed:
        yield from objects(path, _FORM)
        return
    for number, line in enumerate(read_text(path), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, _record(line, where)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError:
        raise BadInput(f"{where} is not JSON (nested too deep): {_FORM}") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
        raise BadInput(f"{where} is not JSON ({reason}): {_FORM}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise BadInput(f"{where} cannot be read ({error}): write the number as a text") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where} is not a JSON object: {_FORM}")
    return record


def _row(record: Mapping[str, Any], where: str, source: Source) -> Row:
    fields = dict(record)
    names: dict[str, str] = {}
    for ours, column in source.columns.items():
        if column not in record:
            raise BadInput(f"{where} has no field {column!r}, which columns names: it has {', '.join(record)}")
        value = fields.pop(column)
        many = isinstance(value, list) and ours in ("image", "answers")
        ours = {"image": "images" if many else "image", "answers": "answers" if many else "answer"}.get(ours, ours)
        fields[ours], names[ours] = value, column
    if fields.get("id") is None and "question_id" in fields:
        fields["id"], names["id"] = fields.pop("question_id"), "question_id"
    missing = [name for name in _FIELDS if fields.get(name) is None]
    for name in fields:  # a misspelt field would silently change what is measured ("anwser" would mean: no labels)
        if name not in _FIELDS and (close := difflib.get_close_matches(name, missing, n=1, cutoff=0.8)):
            raise BadInput(f"{where}: unknown field {name!r}: did you mean {close[0]!r}?")
    return Row(where, fields, source.folder, _FORM, names)


READERS.register(JsonLines())
