"""Study: evaluates candidates once, and keeps every evaluation in a journal that a later run continues.

The journal is a text file of JSON lines, each with a checksum, only ever appended to and flushed to disk after each
evaluation: one header with what was searched, then one line per evaluation. A resumed search proposes the same
candidates again and finds their scores here.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput, StorageError
from ..evaluation.base import SearchEvaluator, as_evaluator
from ..evaluation.result import Evaluation
from ..records import append_line, decode, encode, parse_json, probe, seal, unseal, user_path, write_atomically
from ..reduction import Reduction
from ..schedule import Adaptive, Schedule

JOURNAL_VERSION = 2
_VERSION_KEY = "thinsight_study"
_BEGINNING = f'{{"{_VERSION_KEY}": '.encode()
_REMEDY = "free the disk, then resume"


@dataclass(frozen=True)
class Record:
    """What came of one evaluation.

    ``seconds`` is by how much it made the search longer: of several at the same time, the one that finished
    first has its wall time, and each other one what it took beyond the one before it.
    """

    score: float
    complete: bool
    cost: float | None
    seconds: float
    agreement: float | None = None
    share: float = 1.0  # of the examples


@dataclass(frozen=True)
class _Line:
    """One evaluation as it is written: what was asked, and what came of it."""

    keep_rates: tuple[float, ...]
    exact: bool
    score: float
    complete: bool
    cost: float | None
    seconds: float
    agreement: float | None
    ranker: dict[str, Any] | None  # None: the evaluator's own, as older journals say
    adaptive: dict[str, Any] | None
    share: float  # of the examples, as it was asked for
    share_run: float  # and as it was run


@dataclass(frozen=True)
class _Asked:
    """What was evaluated, and how."""

    reduction: Reduction
    exact: bool  # not stopped early
    share: float = 1.0  # of the examples


class Study:
    """Evaluations by schedule, in memory and (when ``path`` is given) in a journal.

    Args:
        evaluator: see `thinsight.searches.SearchEvaluator`.
        settings: what defines the search (JSON values); a journal of other settings is refused.
        path: the journal file, or None to keep nothing.
        resume: continue an existing journal; a missing one is started.
        confidence: let an evaluator that can stop below a floor with this confidence; None: only when it is
            certain.
        seed: of what such an evaluator draws.

    Raises:
        ThinsightError: the full score is 0 or not finite; the journal exists and ``resume`` is False, is
            damaged, belongs to another search, or cannot be written.

    Warns:
        UserWarning: the evaluator doubts its full score.
    """

    def __init__(
        self,
        evaluator: Any,
        settings: dict[str, Any],
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        confidence: float | None = None,
        seed: int = 0,
    ) -> None:
        self._evaluator = evaluator = as_evaluator(evaluator)
        self._early: dict[str, Any] = {} if confidence is None else {"confidence": confidence, "seed": seed}
        self._records: dict[_Asked, Record] = {}
        self._path = None if path is None else user_path(path, "study")
        if self._path is not None:
            self._open(self._path, settings, resume)
        self.recorded = len(self._records)
        self.full_score = searchable_score(evaluator)
        if evaluator.doubt:
            warnings.warn(evaluator.doubt, stacklevel=2)

    def evaluate(self, candidate: Schedule | Reduction, floor: float | None = None, *, share: float = 1.0) -> Record:
        """The evaluation of a candidate: the known one, or a new one that is on disk when this returns.

        Args:
            candidate: a schedule is with the evaluator's own ranker.
            floor: when given, an evaluator that can may stop early below this score.
            share: of the examples, for an evaluator that can; others run them all.
        """
        asked = self._asked(candidate, floor is None, share)
        known = self._find(asked)
        if known is not None:
            return known
        started, wanted = time.perf_counter(), self._plain(asked.reduction)
        if asked.share < 1:
            evaluation = self._evaluator.sample(wanted, asked.share)
        elif floor is None:
            evaluation = self._evaluator(wanted)
        else:
            evaluation = self._evaluator.at_least(wanted, floor, **self._early)
        return self._keep(asked, evaluation, time.perf_counter() - started)

    def find(self, candidate: Schedule | Reduction) -> Record | None:
        """What is known of a candidate on all examples, stopped early or not."""
        return self._find(_Asked(self._evaluator.bind(candidate), exact=False))

    def ahead(
        self,
        candidates: Sequence[Schedule | Reduction],
        floor: Callable[[int], float | None] | None = None,
        share: float = 1.0,
    ) -> None:
        """Evaluate several candidates at the same time, which the search will ask for one after the other, so that they
        are known then. Each is on disk as soon as it is finished.

        ``floor`` is as for `evaluate`, of each place when all before it are known.
        """
        asked: dict[_Asked, int] = {}
        for place, each in enumerate(candidates):
            asked.setdefault(self._asked(each, floor is None, share), place)
        missing = {each: place for each, place in asked.items() if self._find(each) is None}
        at = list(missing.values())
        more = {"share": share} if share < 1 else {}
        self._several(list(missing), None if floor is None else lambda place: floor(at[place]), **more)

    def evaluate_all(self, candidates: Sequence[Schedule | Reduction], floor: float | None = None) -> list[Record]:
        """The evaluations of several candidates in their order, those not known at the same time where the
        evaluator can.

        Each is on disk as soon as it is finished, also where another one fails. ``floor`` is as for `evaluate`.
        """
        asked = dict.fromkeys(_Asked(self._evaluator.bind(each), floor is None) for each in candidates)
        missing = [each for each in asked if self._find(each) is None]
        if len(missing) > 1:
            self._several(missing, floor, **self._early)
        return [self.evaluate(each, floor) for each in candidates]

    def _several(self, missing: Sequence[_Asked], floor: Any, **more: Any) -> None:
        """Evaluate what is not known, and keep each as soon as it is finished."""
        before = time.perf_counter()

        def done(place: int, evaluation: Evaluation) -> None:
            nonlocal before
            now = time.perf_counter()
            self._keep(missing[place], evaluation, now - before)
            before = now

        self._evaluator.several([self._plain(each.reduction) for each in missing], floor, done, **more)

    def _asked(self, candidate: Schedule | Reduction, exact: bool, share: float) -> _Asked:
        return _Asked(self._evaluator.bind(candidate), exact, share if self._evaluator.samples else 1.0)

    def _find(self, asked: _Asked) -> Record | None:
        same = self._records.get(asked)
        other = self._records.get(replace(asked, exact=not asked.exact))
        return same or (other if other is not None and other.complete else None)

    def _plain(self, reduction: Reduction) -> Schedule | Reduction:
        """As the evaluator is asked: a schedule where the reduction says no more, for those that take nothing
        else."""
        own = self._evaluator.reduction(reduction.schedule)
        return reduction.schedule if reduction == own else reduction

    def _keep(self, asked: _Asked, evaluation: Evaluation, seconds: float) -> Record:
        record = Record(
            evaluation.score, evaluation.complete, evaluation.cost, seconds, evaluation.agreement, evaluation.share
        )
        if self._path is not None:
            reduction = asked.reduction
            family = None if reduction.adaptive is None else reduction.adaptive.to_dict()
            line = _Line(
                keep_rates=reduction.schedule.keep_rates,
                exact=asked.exact,
                ranker=dict(reduction.ranker),
                adaptive=family,
                **{**vars(record), "share": asked.share, "share_run": record.share},
            )
            append_line(self._path, _text(encode(line)), _REMEDY)
        self._records[asked] = record
        return record

    def _parse(self, where: str, text: bytes) -> None:
        """Know what a line of the journal says."""
        remedy, (least, most) = "remove the line, then resume", self._evaluator.score_range
        try:
            line: _Line = decode(_Line, unseal(parse_json(text)), where, remedy)
            if not least <= line.score <= most:
                raise BadInput(f"score is {line.score}, not from {least:g} to {most:g}")
            own = self._evaluator.reduction(Schedule(line.keep_rates))
            family = None if line.adaptive is None else Adaptive.from_dict(line.adaptive)
            ranker = own.ranker if line.ranker is None else line.ranker
            asked = _Asked(replace(own, ranker=ranker, adaptive=family), line.exact, line.share)
        except StorageError:
            raise
        except ValueError as error:
            raise StorageError(f"{where} is damaged ({error}); {remedy}") from None
        record = (line.score, line.complete, line.cost, line.seconds, line.agreement, line.share_run)
        self._records[asked] = Record(*record)

    def _open(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        # the evaluator is asked last: its full score may take a run over all examples
        with _storage(path, "read", "pass another path"):
            content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]  # what follows the last line break was cut off by a crash
        if not lines and (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
            with _storage(path, "written", "pass a path in a writable folder"):
                probe(path.parent)
            header = {_VERSION_KEY: JOURNAL_VERSION, "settings": settings, "evaluator": self._facts()}
            write_atomically(path, _text(header) + "\n", _REMEDY)
        elif not resume:
            raise BadInput(
                f"study {path} exists already; resume it (resume=True, --resume) or remove it to begin again"
            )
        else:
            found = _checked_header(path, lines[0] if lines else content)
            _check_part(path, "settings", found, settings)
            for number, line in enumerate(lines[1:], start=2):
                self._parse(f"study {path}, line {number}", line)
            _check_part(path, "evaluator", found, self._facts())
            with _storage(path, "written", "make it writable"):
                os.truncate(path, content.rfind(b"\n") + 1)  # so that the next line starts clean

    def _facts(self) -> dict[str, Any]:
        """What a journal keeps of the evaluator."""
        each = self._evaluator
        sizes = {"num_layers": int(each.num_layers), "num_vision_tokens": int(each.num_vision_tokens)}
        return {"fingerprint": each.fingerprint, **sizes, "full_score": searchable_score(each)}


def searchable_score(evaluator: SearchEvaluator) -> float:
    """The full model's score.

    Raises:
        ThinsightError: it is not finite, or 0, so that no schedule could lose anything.
    """
    score = float(evaluator.full_score)
    if not math.isfinite(score):
        raise BadInput(f"evaluator.full_score is {score}; a search needs a finite number")
    if score == 0:
        nothing = "evaluator.full_score is 0: no schedule could lose anything; check labels and metric"
        raise BadInput(evaluator.doubt or nothing)
    return score


def _text(value: dict[str, Any]) -> str:
    return json.dumps(seal(value), allow_nan=False)


@contextmanager
def _storage(path: Path, done: str, remedy: str) -> Iterator[None]:
    """Say of a file what could not be done with it, and what to do about that."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"study {path} cannot be {done} ({error.strerror}); {remedy}") from None


def _checked_header(path: Path, line: bytes) -> dict[str, Any]:
    remedy = "remove it and search again, or pass another path"
    try:
        found = parse_json(line)
        version = found[_VERSION_KEY]
    except (ValueError, TypeError, KeyError, IndexError):
        raise StorageError(f"study {path}, line 1 is not a search journal's; {remedy}") from None
    if version != JOURNAL_VERSION:
        raise StorageError(
            f"study {path} is a journal of version {str(version)[:20]}, and this thinsight reads "
            f"{JOURNAL_VERSION}; {remedy}"
        )
    try:
        header = unseal(found)
    except ValueError as error:
        raise StorageError(f"study {path}, line 1 is damaged ({error}); {remedy}") from None
    for part in ("settings", "evaluator"):
        if not isinstance(header.get(part), dict):
            raise StorageError(f"study {path} has no {part} in its header; {remedy}")
    return header


def _check_part(path: Path, part: str, header: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, expected = header[part], json.loads(json.dumps(wanted))
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise BadInput(
                f"study {path} was made with {key} {found.get(key)!r}, this search "
                f"has {expected.get(key)!r}; "
                "resume with the same model, data and settings, or pass another path"
            )
