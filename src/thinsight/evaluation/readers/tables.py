"""Rows of a table with columns of a user's own names: which column is which field, and how options are asked."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .base import Source
from .rows import Row

NAMES = {
    "id": ("id", "question_id", "questionid", "index", "idx", "qid", "pid", "uid"),
    "image": ("image", "images", "image_path", "img", "picture", "decoded_image"),
    "question": ("question", "query", "prompt", "problem", "text", "instruction"),
    "answers": ("answers", "answer", "label", "labels", "ground_truth"),
    "options": ("options", "choices"),
    "hint": ("hint",),
    "metric": ("metric",),
    "task": ("task", "category"),
}
"""What tables call the fields, in small letters, the first one that is there."""

_NUMBERED = re.compile(r"image_?\d+", re.IGNORECASE)
_LETTER = re.compile(r"[A-J]")
_LONGEST_EXTRA = 2000  # characters of a further column that is kept


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        of: the columns of a field, by our name; an image has several where they are numbered.
        letters: the columns that are named A, B, C ..., each an option.
    """

    of: Mapping[str, tuple[str, ...]]
    letters: tuple[str, ...]

    @classmethod
    def among(cls, columns: Sequence[str], source: Source) -> Columns:
        """Those that the user names, else those of usual names.

        Raises:
            BadInput: a column that the user names is not there, or none is an image or a question.
        """
        has = f"it has the columns {', '.join(columns)}"
        usual = {column.lower(): column for column in reversed(columns)}
        exact = {column: column for column in columns}
        found: dict[str, tuple[str, ...]] = {}
        for name, names in NAMES.items():
            if name in source.columns:
                if source.columns[name] not in columns:
                    wanted = source.columns[name]
                    raise BadInput(f"data {source.told!r} has no column {wanted!r}, which columns names: {has}")
                found[name] = (source.columns[name],)
                continue
            there = [exact[each] for each in source.prefers.get(name, ()) if each in exact]
            there += [usual[each] for each in names if each in usual and usual[each] not in there]
            if there:
                found[name] = tuple(there)
        numbered = tuple(column for column in columns if _NUMBERED.fullmatch(column))
        if "image" not in found and numbered:
            found["image"] = numbered
        for name in ("image", "question"):
            if name not in found:
                raise BadInput(
                    f"data {source.told!r} has no column that is called {name} or the like: say which one is, with "
                    f"--columns {name}=NAME; {has}"
                )
        letters = [column for column in columns if _LETTER.fullmatch(column)]
        expected = [chr(ord("A") + place) for place in range(len(letters))]
        return cls(found, tuple(letters) if "options" not in found and letters == expected and letters[1:] else ())

    @property
    def taken(self) -> set[str]:
        """All of them that hold a field."""
        return {column for columns in self.of.values() for column in columns} | set(self.letters)


def row_of(record: Mapping[str, Any], number: int, where: str, columns: Columns, source: Source, asked: Ask) -> Row:
    """The row of a table's record; ``number`` is its id where it has none."""
    names: dict[str, str] = {}
    fields: dict[str, Any] = {}

    def first(name: str) -> Any:
        """The value of a field in the first of its columns that has one."""
        for column in columns.of.get(name, ()):
            value = _known(record.get(column))
            if value is not None:
                names[name] = column
                return value
        names.setdefault(name, next(iter(columns.of.get(name, ())), name))
        return None

    images = _images(record, columns, first)
    answers = _answers(first("answers"))
    options = _options(record, columns, first)
    if options and len(answers) == 1 and isinstance(answers[0], int) and 0 <= answers[0] < len(options):
        answers = [chr(ord("A") + answers[0])]
    question, hint = first("question"), first("hint")
    if isinstance(question, str) and not source.plain:
        question = asked.text(question, options, hint)
    task = first("task")
    identity = first("id")
    fields = {
        **_extra(record, columns.taken),
        "id": number if identity is None else identity,
        "images": images or None,
        "question": question,
        "answers": answers or None,
        "metric": first("metric") or ("multiple_choice" if options and answers else None),
    }
    if isinstance(task, (str, int)):
        fields["task"] = str(task)
    if options:
        fields["options"] = options
    if source.plain and isinstance(hint, str):
        fields["hint"] = hint
    names |= {"images": names["image"], "answer": names["answers"]}
    return Row(
        where, fields, source.folder, f"say which column is which with --columns ({source.told})", names, "column"
    )


@dataclass(frozen=True)
class Ask:
    """How a question with options is written. VLMEvalKit's form, where its tables are read; else LLaVA's."""

    question: str = "{question}"
    hint: str = "{hint}\n"
    options: str = "\n{options}\nAnswer with the option's letter from the given choices directly."

    def text(self, question: str, options: Sequence[str], hint: Any = None) -> str:
        """The question with its hint and its options."""
        text = self.question.format(question=question) if options else question
        if isinstance(hint, str) and hint.strip():
            text = self.hint.format(hint=hint) + text
        if not options:
            return text
        return text + self.options.format(options=lettered(options))


def lettered(options: Iterable[str]) -> str:
    """Options, one a line: "A. red"."""
    return "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))


def listed(value: Any) -> Any:
    """A list that a table holds as text, ``['red', 'blue']``, as one; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return found if isinstance(found, list) else value
    return value


def _known(value: Any) -> Any:
    """None for what stands for nothing in tables."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return None if isinstance(value, (str, list)) and not value else value


def _images(record: Mapping[str, Any], columns: Columns, first: Any) -> list[Any]:
    called = columns.of["image"]
    if all(_NUMBERED.fullmatch(column) for column in called):
        first("image")
        return [value for column in called if (value := _known(record.get(column))) is not None]
    value = listed(first("image"))
    return value if isinstance(value, list) else [] if value is None else [value]


def _answers(value: Any) -> list[Any]:
    """As `datasets` has those of VQA: each a record with its text."""
    value = listed(value)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [each["answer"] if isinstance(each, Mapping) and "answer" in each else each for each in values]


def _options(record: Mapping[str, Any], columns: Columns, first: Any) -> list[str]:
    if columns.letters:
        found = []
        for column in columns.letters:
            value = _known(record.get(column))
            if value is None or (isinstance(value, str) and value.strip().lower() == "nan"):
                break
            found.append(str(value))
        return found if found[1:] else []
    value = listed(first("options"))
    return [str(each) for each in value] if isinstance(value, list) and value[1:] else []


def _extra(record: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    """The further columns that hold plain values."""
    found = {}
    for column, value in record.items():
        plain = isinstance(value, (int, float, bool)) or (isinstance(value, str) and len(value) <= _LONGEST_EXTRA)
        if column not in taken and plain and _known(value) is not None:
            found[column] = value
    return found
