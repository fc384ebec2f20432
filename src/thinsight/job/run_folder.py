"""The folder of one run: which settings it was made with, and the result of every stage that is done.

Knows JSON files and nothing about what the stages compute. Each result appears whole or not at all, so
whatever was finished before an interruption is there to be continued; a folder made with other settings is
refused.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInput, StorageError
from ..report.codec import decode, encode

__all__ = ["RunFolder", "check_writable_file"]

T = TypeVar("T")

_RUN_FILE = "run.json"
_STAGES = "stages"
_VERSION = 1


def check_writable_file(path: Path) -> None:
    """Refuse now a file that could not be written later; its folder is made where needed.

    Raises:
        ThinsightError: the path is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise BadInput(f"out {path} is a folder: give the name of a file")
    try:
        _probe(path.parent)
    except OSError as error:
        raise StorageError(
            f"out {path} cannot be written ({error.strerror or error}): give a file in a folder you may write"
        ) from None


def _probe(folder: Path) -> None:
    probe = folder / f".probe-{secrets.token_hex(4)}"
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()


class RunFolder:
    """A run's folder, open for writing.

    Args:
        path: the folder; it is made where needed.
        resume: continue a run that is there already.

    Raises:
        ThinsightError: the folder cannot be written, is a file, or holds a run although ``resume`` is False.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = Path(path)
        self.resume = resume
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"out {self.path} is a file: give a folder")
        if (self.path / _RUN_FILE).exists() and not resume:
            raise BadInput(
                f"out {self.path} holds a search already: continue it with --resume, or give another --out"
            )
        self._check_writable()

    def bind(self, settings: dict[str, Any]) -> None:
        """Say what the run is made of (JSON values), or check that it is the run that was begun.

        Raises:
            ThinsightError: the folder's run has other settings; the message names the first that differs.
        """
        wanted = json.loads(json.dumps({"version": _VERSION, **settings}))
        path = self.path / _RUN_FILE
        if not path.exists():
            self._write(path, wanted)
            return
        found = self._read(path)
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
        path = self._stage_path(stage)
        if path.exists():
            result: T = decode(kind, self._read(path), str(path))
            return result
        result = compute()
        self._write(path, encode(result))
        return result

    def save_json(self, name: str, value: Any) -> Path:
        """Write a dataclass as a JSON file of the folder, whole or not at all.

        Raises:
            ThinsightError: it cannot be written.
        """
        self._write(self.path / name, encode(value))
        return self.path / name

    def _stage_path(self, stage: str) -> Path:
        return self.path / _STAGES / f"{stage}.json"

    def _check_writable(self) -> None:
        try:
            _probe(self.path / _STAGES)
        except OSError as error:
            raise StorageError(
                f"out {self.path} cannot be written ({error.strerror or error}): give a folder you may write"
            ) from None

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror or error}): check the file") from None
        except ValueError as error:
            raise StorageError(f"{path} is not valid JSON ({error}): remove it, then resume") from None

    def _write(self, path: Path, value: Any) -> None:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "x", encoding="utf-8") as file:
                json.dump(value, file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written ({error.strerror or error}): free the disk, then resume"
            ) from None
        finally:
            part.unlink(missing_ok=True)
