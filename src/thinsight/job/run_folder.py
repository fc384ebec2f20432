"""The folder of one run: which settings it was made with, and the result of every stage that is done.

Knows JSON files and nothing about what the stages compute. Each result appears whole or not at all and has a
checksum, so whatever was finished before an interruption is there to be continued; a folder made with other
settings, or a result that was changed, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInput, StorageError
from ..records import decode, encode, probe, read_sealed, seal, sweep, user_path, write_atomically

T = TypeVar("T")

_RUN_FILE = "run.json"
_STAGES = "stages"
_VERSION = 3
_REMEDY = "free the disk, then resume"


def check_writable_file(path: Path) -> None:
    """Refuse now a file that could not be written later; its folder is made where needed.

    Raises:
        ThinsightError: the path is a folder, or its folder cannot be written.
    """
    path = user_path(path, "out")
    if path.is_dir():
        raise BadInput(f"out {path} is a folder: give the name of a file")
    try:
        probe(path.parent)
    except OSError as error:
        raise StorageError(
            f"out {path} cannot be written ({error.strerror or error}): give a file in a folder you may write"
        ) from None


class RunFolder:
    """A run's folder, open for writing.

    Args:
        path: the folder; it is made where needed.
        resume: continue a run that is there already.

    Raises:
        ThinsightError: the folder cannot be written, is a file, or holds a run although ``resume`` is False.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = user_path(path, "out")
        self.resume = resume
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"out {self.path} is a file: give a folder")
        if (self.path / _RUN_FILE).exists() and not resume:
            raise BadInput(f"out {self.path} holds a search already: continue it with --resume, or give another --out")
        self._check_writable()
        sweep(self.path)

    def bind(self, settings: dict[str, Any]) -> None:
        """Say what the run is made of (JSON values), or check that it is the run that was begun.

        Raises:
            ThinsightError: the folder's run has other settings; the message names the first that differs.
        """
        wanted = json.loads(json.dumps({"version": _VERSION, **settings}))
        path = self.path / _RUN_FILE
        if not path.exists():
            if any((self.path / _STAGES).glob("*.json")):
                raise StorageError(
                    f"out {self.path} holds results but no {_RUN_FILE}, which says of what: restore it, or "
                    "give another --out"
                )
            self._write(path, wanted)
            return
        found = read_sealed(path, "restore it, or give another --out")
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise BadInput(
                    f"out {self.path} was made with {key} {found.get(key)!r}, this run "
                    f"has {wanted.get(key)!r}: resume with the same settings and data, or give another --out"
                )

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return (self.path / _RUN_FILE).exists()

    def has(self, stage: str) -> bool:
        """Whether the stage is done."""
        return self._stage_path(stage).exists()

    def once(self, stage: str, kind: type[T], compute: Callable[[], T]) -> T:
        """A stage's result, a plain dataclass of type ``kind``: read if it is done, else computed and kept.

        Raises:
            ThinsightError: the kept result is damaged, or cannot be written.
        """
        path, remedy = self._stage_path(stage), "remove it, then resume"
        if path.exists():
            result: T = decode(kind, read_sealed(path, remedy), str(path), remedy)
            return result
        result = compute()
        self._write(path, encode(result))
        return result

    def save_json(self, name: str, value: Any) -> Path:
        """Write a dataclass as a JSON file of the folder, whole or not at all.

        Raises:
            ThinsightError: it cannot be written.
        """
        path = self.path / name
        write_atomically(path, json.dumps(encode(value), indent=1, allow_nan=False), _REMEDY)
        return path

    def _stage_path(self, stage: str) -> Path:
        return self.path / _STAGES / f"{stage}.json"

    def _check_writable(self) -> None:
        try:
            probe(self.path / _STAGES)
        except OSError as error:
            raise StorageError(
                f"out {self.path} cannot be written ({error.strerror or error}): give a folder you may write"
            ) from None

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(seal(value), indent=1, allow_nan=False), _REMEDY)
