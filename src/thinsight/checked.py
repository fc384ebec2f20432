"""What `thinsight check` found, as a record: shown, stored, and looked up again for models whose type is not listed.

A stored result names what it holds for, an `Identity`; nothing else about the model decides whether it may run. Knows
nothing about torch, nor how anything is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import StorageError
from .records import decode, encode, read_sealed, seal, user_path, write_atomically
from .shown import NOTHING, Column, Shown, Table, facts_table
from .texts import brief

CACHE_VARIABLE = "THINSIGHT_CACHE"
_VERSION = 1
_REMEDY = "run `thinsight check` again"
PASSES, FAILS, NOT_CHECKED = "passes", "fails", "not checked"


@dataclass(frozen=True)
class Identity:
    """What a result holds for. Sizes and weights are not among it: they change no rule of a pass."""

    model_class: str  # with its module
    code: str  # a hash of that module's text where it is not one of transformers', "" where it is
    model_type: str
    layers: tuple[str, ...]  # kinds of decoder layers, such as "full_attention"
    attention: str  # its implementation
    transformers: str
    thinsight: str

    @property
    def file_name(self) -> str:
        """Under which the cache folder keeps the result."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.model_class.rpartition('.')[2]}-{digest}.json"

    def differs(self, other: Identity) -> str:
        """The first thing in which two differ, in words; "" where they are the same."""
        ours, theirs = asdict(self), asdict(other)
        found = next((name for name in ours if ours[name] != theirs[name]), None)
        return "" if found is None else f"its {found} is {theirs[found]!r}, not {ours[found]!r}"


@dataclass(frozen=True)
class CheckLine:
    """One thing that was checked. Differences are of logits: the length of the difference by the length of the vector,
    the largest over prompts and tokens; None where what is checked is no such number."""

    name: str
    state: str  # PASSES, FAILS or NOT_CHECKED
    note: str = ""
    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class CheckResult(Shown):
    """What `thinsight.check` found."""

    identity: Identity
    dtype: str
    device: str
    inputs: str  # how its prompts were made
    noise: float | None  # difference of the stock model from itself: batched with a cache, and alone without one
    lines: tuple[CheckLine, ...]

    def __repr__(self) -> str:
        model, failed = self.identity.model_class.rpartition(".")[2], len(self.failures)
        said = "passes" if self.passed else f"{failed} of {len(self.lines)} lines fail"
        return brief(f"CheckResult({model}, {self.dtype} on {self.device}: {said})")

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return bool(self.lines) and all(line.state != FAILS for line in self.lines)

    @property
    def failures(self) -> tuple[CheckLine, ...]:
        """What failed."""
        return tuple(line for line in self.lines if line.state == FAILS)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result as a JSON file.

        Raises:
            ThinsightError: the file cannot be written.
        """
        file = user_path(path, "out")
        write_atomically(file, json.dumps(seal({"version": _VERSION, **self.as_json()}), indent=1, allow_nan=False))
        return file

    def store(self) -> Path:
        """Write the result where `thinsight.apply` finds it: `cache_folder`.

        Raises:
            ThinsightError: the file cannot be written.
        """
        return self.save(cache_folder() / self.identity.file_name)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"passed": self.passed, **encode(self)}

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CheckResult:
        """Read a result that `save` wrote.

        Raises:
            ThinsightError: no such file, or not one of a check, or changed since.
        """
        file = user_path(path, "check result")
        record = read_sealed(file, _REMEDY)
        if record.pop("version", None) != _VERSION:
            raise StorageError(f"{file} is no check result of this thinsight; {_REMEDY}")
        passed = record.pop("passed", None)
        result: CheckResult = decode(CheckResult, record, str(file), _REMEDY)
        if result.passed is not passed:
            raise StorageError(f"{file} says passed is {passed!r}, which its lines do not; {_REMEDY}")
        return result

    def _tables(self) -> Iterator[Table]:
        yield Table(
            f"{self.identity.model_class.rpartition('.')[2]}: {'passes' if self.passed else 'fails'}",
            self.lines,
            Column("What is checked", lambda line: line.name, text=True),
            Column("", lambda line: line.state, text=True),
            Column("Difference", lambda line: _number(line.difference)),
            Column("Allowed", lambda line: _number(line.tolerance)),
            Column("", lambda line: line.note, text=True),
            strong=lambda line: line.state == FAILS,
        )
        about = self.identity
        yield facts_table(
            "On",
            [
                ("model_type", about.model_type),
                ("decoder layers", ", ".join(about.layers)),
                ("attention", about.attention),
                ("dtype, device", f"{self.dtype}, {self.device}"),
                ("inputs", self.inputs),
                ("stock model from itself", _number(self.noise)),
                ("transformers, thinsight", f"{about.transformers}, {about.thinsight}"),
            ],
        )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def cache_folder() -> Path:
    """Where results of checks are stored: the folder ``checks`` in $THINSIGHT_CACHE, or else in ~/.cache/thinsight."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get(CACHE_VARIABLE) or f"{base}/thinsight", CACHE_VARIABLE) / "checks"


def stored(identity: Identity) -> CheckResult | None:
    """The result that the cache folder has for this very identity; None where it has none.

    Raises:
        ThinsightError: it has one that is damaged.
    """
    path = cache_folder() / identity.file_name
    if not path.is_file():
        return None
    result = CheckResult.load(path)
    return result if not result.identity.differs(identity) else None


def stored_for(model_class: str) -> list[Path]:
    """The files of results that the cache folder has for classes of this name."""
    return sorted(cache_folder().glob(f"{model_class}-*.json"))
