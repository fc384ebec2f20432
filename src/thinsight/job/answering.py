"""Offline answers: every question of a set once, in a file, by one device or many workers; goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, MissingPackage, StorageError
from ..evaluation.answering import Answerer
from ..evaluation.dispatch import Task
from ..evaluation.example import Example
from ..evaluation.examples import load_examples, read_examples
from ..evaluation.prompts import chunks
from ..progress import Watcher
from ..records import append_line, user_path, write_atomically
from ..reduction import Reduction
from ..texts import counted
from .opening import check_writable_file, open_model, reduction_for
from .options import AnswerOptions
from .workers import Workers, anywhere, device_map_of

PARQUET, JSON_LINES = ".parquet", ".jsonl"
_FORMAT = 2
_REMEDY = "free the disk, then run the same command again"


@dataclass(frozen=True)
class Answered:
    """What came of it."""

    path: Path
    count: int
    before: int  # of them, answered by an earlier run
    reduction: str  # where it is from


def answer(options: AnswerOptions, watcher: Watcher | None = None) -> Answered:
    """Answer all questions of a set under a reduction, and write them to one file, each once, in the set's order.

    Answers are kept beside that file as they come, and the same command goes on with those that are missing.

    Raises:
        ThinsightError: bad input, before a model is loaded; a file that exists, or of another run.
    """
    watcher = watcher or Watcher()
    config = options.check()
    out = _checked(options.out)
    found = reduction_for(options.reduction, options.model.model, config)
    watcher.on_stage("Reading the data")
    examples = load_examples(options.data_name, options.limit, progress=watcher.on_progress, **options.reading)
    journal = Journal(out, _about(options, found.reduction), {each.id: _asked(each) for each in examples})
    before = len(journal.lines)
    if before:
        watcher.on_note(f"Goes on: {before:,} of {counted(len(examples), 'question')} answered already")
    work = _Questions(examples, options.batch_size, journal, watcher)
    if not work.finished:
        watcher.on_stage("Answering")
        _do(work, options, found.reduction, watcher)
    watcher.on_stage("Writing")
    rows = [journal.lines[example.id] for example in examples]
    write_atomically(out, _parquet(rows) if out.suffix == PARQUET else _json_lines(rows), _REMEDY)
    journal.remove()
    return Answered(out, len(rows), before, found.where)


def _do(work: _Questions, options: AnswerOptions, reduction: Reduction, watcher: Watcher) -> None:
    make = functools.partial(_Here, anywhere(options), reduction)
    workers = Workers(options, make, watcher)
    try:
        if workers.dispatcher is not None:
            workers.dispatcher.run(work)
            return
        here = make()
        while (task := work.next(0)) is not None:
            work.take(task, here.answer(*task.arguments))
    finally:
        workers.close()


class _Here:
    """What answers, in this process or in a worker's."""

    def __init__(self, options: AnswerOptions, reduction: Reduction) -> None:
        self._examples = read_examples(options.data_name, options.limit, **options.reading)
        opened = open_model(options.model, device_map=device_map_of(options))
        most = options.max_new_tokens
        self._answerer = Answerer(opened.model, opened.processor, reduction, max_new_tokens=most, kept=options.kept)

    def answer(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of the file."""
        answers = self._answerer.answers([self._examples[place] for place in places])
        return [
            {"id": each.id, "answer": each.text, **({} if each.kept is None else {"kept": each.kept})}
            for each in answers
        ]


class _Questions:
    """Batches of a set that are not answered yet. Which questions share one does not depend on what was answered
    before, so that neither do answers."""

    def __init__(self, examples: Sequence[Example], batch_size: int, journal: Journal, watcher: Watcher) -> None:
        self._examples, self._journal, self._watcher = examples, journal, watcher
        batches = chunks(range(len(examples)), batch_size)
        self._left = deque(each for each in batches if any(examples[i].id not in journal.lines for i in each))
        self._waiting = len(self._left)

    @property
    def finished(self) -> bool:
        return not self._waiting

    def next(self, worker: Hashable) -> Task | None:
        if not self._left:
            return None
        batch = self._left.popleft()
        first, last = (self._examples[place].id for place in (batch[0], batch[-1]))
        return Task("answer", (batch,), f"the batch of examples {first!r} to {last!r}")

    def take(self, task: Task, value: Any) -> None:
        self._waiting -= 1
        self._journal.add(value)
        self._watcher.on_progress("answers", len(self._journal.lines), len(self._examples))


class Journal:
    """Answers as they come, beside the file that they are for: JSON lines, the first of which says what they are of.

    Questions may be added to a set and removed from it meanwhile: what was answered stays.

    Args:
        out: the file that they are for.
        about: what has to be the same for answers to be continued.
        asked: a digest of each question, by its id.

    Raises:
        ThinsightError: the journal is of other questions, another model or other settings.
    """

    def __init__(self, out: Path, about: Mapping[str, Any], asked: Mapping[str, str]) -> None:
        self.path = out.with_name(f"{out.name}.part.jsonl")
        self._asked = asked
        self.lines: dict[str, dict[str, Any]] = {}
        head = json.dumps({"thinsight": "answers", "format": _FORMAT, **about}, sort_keys=True)
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{self.path} cannot be read ({error}): remove it, or give another --out") from None
        first, _, rest = text.partition("\n")
        if not rest and first != head:  # none, or cut off in its first line
            if text and not head.startswith(first):
                raise BadInput(self._of_another)
            write_atomically(self.path, head + "\n", _REMEDY)
            return
        if first != head:
            raise BadInput(self._of_another)
        whole, _, half = rest.rpartition("\n")
        if half:  # where a run was killed
            write_atomically(self.path, f"{head}\n{whole}\n" if whole else f"{head}\n", _REMEDY)
        for number, line in enumerate(whole.splitlines(), 2):
            for name, question, row in self._rows(line, number):
                if self._asked.get(name, question) != question:
                    raise BadInput(self._of_another)
                if name in self._asked:
                    self.lines.setdefault(name, row)

    @property
    def _of_another(self) -> str:
        return (
            f"{self.path} holds answers of other data, another model or other settings: give these again, "
            "remove it, or give another --out"
        )

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a batch's answers; they are on disk when this returns. Those that are known stay."""
        append_line(self.path, json.dumps([{**row, "asked": self._asked[row["id"]]} for row in rows]), _REMEDY)
        for row in rows:
            self.lines.setdefault(row["id"], dict(row))

    def remove(self) -> None:
        """Once the file is written."""
        self.path.unlink(missing_ok=True)

    def _rows(self, line: str, number: int) -> list[tuple[str, str, dict[str, Any]]]:
        """Id, digest of the question, and row of each answer of a batch."""
        try:
            return [(row["id"], row.pop("asked"), row) for row in json.loads(line)]
        except (ValueError, TypeError, KeyError):
            raise StorageError(
                f"{self.path}, line {number} is damaged: remove the line to answer its questions again"
            ) from None


def _checked(path: Path) -> Path:
    """Where the answers go."""
    out = user_path(path, "out")
    if out.suffix not in (PARQUET, JSON_LINES):
        raise BadInput(f"out is {str(out)!r}: its name must end in {JSON_LINES} or {PARQUET}")
    if out.suffix == PARQUET:
        _pyarrow()
    check_writable_file(out)
    if out.exists():
        raise BadInput(f"out {out} exists already: remove it, or give another name")
    return out


def _asked(example: Example) -> str:
    """A digest of a question and of its images' names."""
    asked = repr((example.question, [Path(key).name for key in example.image_keys]))
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _about(options: AnswerOptions, reduction: Reduction) -> dict[str, Any]:
    """What has to be the same for answers to be continued. The batch size may change: memory may not hold it."""
    settings = json.dumps(reduction.to_dict(), sort_keys=True)
    return {
        "model": options.model.model,
        "dtype": options.model.dtype,
        "reduction": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "max_new_tokens": options.max_new_tokens,
        "kept": options.kept,
    }


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Columns id and answer, and kept as JSON text where there is one."""
    arrow, parquet = _pyarrow()
    convert: dict[str, Callable[[Any], str]] = {"kept": json.dumps}
    columns = {name: [convert.get(name, str)(row[name]) for row in rows] for name in rows[0]}
    file = io.BytesIO()
    parquet.write_table(arrow.table(columns), file)
    return file.getvalue()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackage(
            "a .parquet file needs the package pyarrow: pip install 'thinsight[parquet]', or name a .jsonl file"
        ) from None
    return pyarrow, pyarrow.parquet
