"""Study: evaluates candidates once, and keeps every evaluation in a journal that a later run continues.

Knows nothing about which candidates a search proposes or why. The journal is a text file of JSON lines, each
with a checksum, only ever appended to and flushed to disk after each evaluation: one header with what was
searched, then one line per evaluation. A resumed search proposes the same candidates again and finds their
scores here.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..adaptive import Adaptive
from ..errors import BadInput, StorageError
from ..evaluation.result import Evaluation
from ..records import append_line, decode, encode, parse_json, probe, seal, unseal, user_path, write_atomically
from ..reduction import Reduction
from ..schedule import Schedule

JOURNAL_VERSION = 2
_VERSION_KEY = "thinsight_study"
_BEGINNING = f'{{"{_VERSION_KEY}": '.encode()
_REMEDY = "free the disk, then resume"


class SearchEvaluator(Protocol):
    """The only thing a search sees: schedules in, scores out.

    An evaluator may also have ``at_least(schedule, floor) -> Evaluation``, which may stop as soon as the
    score provably cannot reach ``floor``, and where it takes ``confidence=`` and ``seed=``, as soon as it
    does not with that confidence; ``fingerprint``, a string that names model, data, metric and
    ranker; ``reduction(schedule) -> Reduction``, which binds the ranker and the model family;
    ``sample(schedule, share) -> Evaluation``, the score on about that share of the examples, the same ones
    every time; ``first_layer``, the first layer at which its ranker can rank; ``full_cost``, the cost of
    one full evaluation in the unit of `Evaluation.cost`; ``score_range``, the least and the highest score
    that there can be, beyond which a journal's are damaged; ``doubt``, a sentence that says why the full
    score is too low to search with, empty where it is not; and ``share(schedule, layer)``, which is told from
    which layer on the candidates to come differ from a schedule, 0 when there are none. Where a search
    chooses the ranker too, it passes reductions in place of schedules.

    One that can score several schedules at the same time, such as `thinsight.EvaluatorPool`, says how many it
    is best asked for with ``at_once``, and has ``several(schedules, floor, done, **early)``. That scores each
    as ``at_least(schedule, floor, **early)`` does, or as a call where ``floor`` is None, and calls
    ``done(place, evaluation)`` in the calling thread as soon as one is finished, in any order. Where one
    fails or the calling thread is interrupted, it says so of all that did finish, leaves nothing running, and
    raises. Without ``at_once`` a search asks for one at a time.
    """

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""

    @property
    def num_vision_tokens(self) -> int:
        """The reference N in which a search counts tokens."""

    @property
    def full_score(self) -> float:
        """Score of the full model on the same examples. A search refuses 0: nothing could be lost."""

    def __call__(self, schedule: Schedule, /) -> Evaluation:
        """Score of the model under ``schedule``."""


@dataclass(frozen=True)
class Record:
    """One evaluation as the journal keeps it.

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
    ranker: dict[str, Any] | None
    adaptive: dict[str, Any] | None
    share: float  # of the examples, as it was asked for
    share_run: float  # and as it was run

    @classmethod
    def of(cls, asked: _Asked, record: Record) -> _Line:
        return cls(
            asked.schedule.keep_rates,
            asked.exact,
            record.score,
            record.complete,
            record.cost,
            record.seconds,
            record.agreement,
            None if asked.ranker is None else json.loads(asked.ranker),
            None if asked.adaptive is None else asked.adaptive.to_dict(),
            asked.share,
            record.share,
        )

    @property
    def asked(self) -> _Asked:
        named = None if self.ranker is None else json.dumps(self.ranker, sort_keys=True)
        family = None if self.adaptive is None else Adaptive.from_dict(self.adaptive)
        return _Asked(Schedule(self.keep_rates), self.exact, named, self.share, family)

    @property
    def record(self) -> Record:
        return Record(self.score, self.complete, self.cost, self.seconds, self.agreement, self.share_run)


@dataclass(frozen=True)
class _Asked:
    """What was evaluated, and how."""

    schedule: Schedule
    exact: bool  # not stopped early
    ranker: str | None = None  # as JSON; None: the evaluator's own
    share: float = 1.0
    adaptive: Adaptive | None = None


def share_prefix(evaluator: SearchEvaluator, schedule: Schedule, layer: int) -> None:
    """Tell an evaluator that wants to know that the candidates to come differ from ``layer`` on only.

    Layer 0: there are none.
    """
    share = getattr(evaluator, "share", None)
    if share is not None:
        share(schedule, layer)


class Study:
    """Evaluations by schedule, in memory and (when ``path`` is given) in a journal.

    Args:
        evaluator: see `SearchEvaluator`.
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
        evaluator: SearchEvaluator,
        settings: dict[str, Any],
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        confidence: float | None = None,
        seed: int = 0,
    ) -> None:
        self._evaluator = evaluator
        self._early: dict[str, Any] = {}
        if confidence is not None and _takes(getattr(evaluator, "at_least", None), "confidence", "seed"):
            self._early = {"confidence": confidence, "seed": seed}
        self._records: dict[_Asked, Record] = {}
        self._path = None if path is None else user_path(path, "study")
        if self._path is not None:
            self._open(self._path, settings, resume)
        self.recorded = len(self._records)
        self.full_score = searchable_score(evaluator)
        if doubt := getattr(evaluator, "doubt", ""):
            warnings.warn(doubt, stacklevel=2)

    def evaluate(
        self,
        schedule: Schedule,
        floor: float | None = None,
        *,
        ranker: Mapping[str, Any] | None = None,
        share: float = 1.0,
        adaptive: Adaptive | None = None,
    ) -> Record:
        """The evaluation of ``schedule``: the known one, or a new one that is on disk when this returns.

        Args:
            schedule: the candidate.
            floor: when given, an evaluator that can may stop early below this score.
            ranker: in place of the evaluator's own.
            share: of the examples, for an evaluator that can; others run them all.
            adaptive: schedules of which each prompt gets its own; ``schedule`` is their mean.
        """
        named = None if ranker is None else json.dumps(ranker, sort_keys=True)
        share = share if hasattr(self._evaluator, "sample") else 1.0
        asked = _Asked(schedule, floor is None, named, share, adaptive)
        known = self._known(asked)
        if known is not None:
            return known
        record = self._run(asked, ranker, floor)
        self._keep(asked, record)
        return record

    def evaluate_all(self, schedules: Sequence[Schedule], floor: float | None = None) -> list[Record]:
        """The evaluations of several schedules in their order, those not known at the same time where the
        evaluator can.

        Each is on disk as soon as it is finished, also where another one fails.

        Args:
            schedules: the candidates.
            floor: as for `evaluate`.
        """
        asked = dict.fromkeys(_Asked(schedule, floor is None) for schedule in schedules)
        missing = [each for each in asked if self._known(each) is None]
        if len(missing) > 1 and hasattr(self._evaluator, "several"):
            self._run_all(missing, floor)
        return [self.evaluate(schedule, floor) for schedule in schedules]

    def _run_all(self, asked: list[_Asked], floor: float | None) -> None:
        before = time.perf_counter()

        def done(place: int, evaluation: Evaluation) -> None:
            nonlocal before
            now = time.perf_counter()
            self._keep(asked[place], _record(evaluation, now - before))
            before = now

        schedules = [each.schedule for each in asked]
        self._evaluator.several(schedules, floor, done, **self._early)  # type: ignore[attr-defined]

    def _keep(self, asked: _Asked, record: Record) -> None:
        if self._path is not None:
            append_line(self._path, _text(encode(_Line.of(asked, record))), _REMEDY)
        self._records[asked] = record

    def _known(self, asked: _Asked) -> Record | None:
        same = self._records.get(asked)
        other = self._records.get(replace(asked, exact=not asked.exact))
        return same or (other if other is not None and other.complete else None)

    def _run(self, asked: _Asked, ranker: Mapping[str, Any] | None, floor: float | None) -> Record:
        started = time.perf_counter()
        wanted: Any = asked.schedule
        if ranker is not None or asked.adaptive is not None:
            bound = getattr(self._evaluator, "reduction", Reduction)(wanted)
            wanted = replace(bound, ranker=ranker or bound.ranker, adaptive=asked.adaptive)
        at_least = getattr(self._evaluator, "at_least", None)
        if asked.share < 1:
            evaluation = self._evaluator.sample(wanted, asked.share)  # type: ignore[attr-defined]
        elif floor is None or at_least is None:
            evaluation = self._evaluator(wanted)
        else:
            evaluation = at_least(wanted, floor, **self._early)
        return _record(evaluation, time.perf_counter() - started)

    def _open(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        # the evaluator is asked last: its full score may take a run over all examples
        content = _read(path)
        lines = content.split(b"\n")[:-1]  # what follows the last line break was cut off by a crash
        if not lines and (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
            _probe(path)
            write_atomically(path, _text(_header(self._evaluator, settings)) + "\n", _REMEDY)
        elif not resume:
            raise BadInput(
                f"study {path} exists already; resume it (resume=True, --resume) or remove it to begin again"
            )
        else:
            found = _checked_header(path, lines[0] if lines else content)
            _check_part(path, "settings", found, settings)
            score_range = getattr(self._evaluator, "score_range", (-math.inf, math.inf))
            for number, line in enumerate(lines[1:], start=2):
                asked, record = _parse(path, number, line, score_range)
                self._records[asked] = record
            _check_part(path, "evaluator", found, _evaluator_facts(self._evaluator))
            _truncate(path, content.rfind(b"\n") + 1)  # so that the next line starts clean


def _takes(function: Callable[..., Any] | None, *names: str) -> bool:
    """Whether a function takes all of these keywords."""
    if function is None:
        return False
    parameters = inspect.signature(function).parameters
    return any(each.kind is each.VAR_KEYWORD for each in parameters.values()) or {*names} <= {*parameters}


def _header(evaluator: SearchEvaluator, settings: dict[str, Any]) -> dict[str, Any]:
    return {_VERSION_KEY: JOURNAL_VERSION, "settings": settings, "evaluator": _evaluator_facts(evaluator)}


def _evaluator_facts(evaluator: SearchEvaluator) -> dict[str, Any]:
    return {
        "fingerprint": getattr(evaluator, "fingerprint", None),
        "num_layers": int(evaluator.num_layers),
        "num_vision_tokens": int(evaluator.num_vision_tokens),
        "full_score": searchable_score(evaluator),
    }


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
        raise BadInput(getattr(evaluator, "doubt", "") or nothing)
    return score


def _record(evaluation: Evaluation, seconds: float) -> Record:
    return Record(
        evaluation.score, evaluation.complete, evaluation.cost, seconds, evaluation.agreement, evaluation.share
    )


def _text(value: dict[str, Any]) -> str:
    return json.dumps(seal(value), allow_nan=False)


def _read(path: Path) -> bytes:
    """The journal; empty when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(f"study {path} cannot be read ({error.strerror}); pass another path") from None


def _probe(path: Path) -> None:
    try:
        probe(path.parent)
    except OSError as error:
        raise StorageError(
            f"study {path} cannot be written ({error.strerror}); pass a path in a writable folder"
        ) from None


def _truncate(path: Path, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError as error:
        raise StorageError(f"study {path} cannot be written ({error.strerror}); make it writable") from None


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


def _parse(path: Path, number: int, text: bytes, score_range: tuple[float, float]) -> tuple[_Asked, Record]:
    where, remedy = f"study {path}, line {number}", "remove the line, then resume"
    try:
        line: _Line = decode(_Line, unseal(parse_json(text)), where, remedy)
        if not score_range[0] <= line.score <= score_range[1]:
            raise BadInput(f"score is {line.score}, not from {score_range[0]:g} to {score_range[1]:g}")
        return line.asked, line.record
    except StorageError:
        raise
    except ValueError as error:
        raise StorageError(f"{where} is damaged ({error}); {remedy}") from None
