"""The errors that thinsight raises, by what can be done about them.

    ThinsightError
    ├── BadInput         a value, file or option that cannot be right: mend it
    ├── MissingPackage   an optional package is not installed: install it
    ├── Unsupported      this model, attention or cache cannot be run so: choose another way
    ├── Unreachable      no schedule of this shape fits into the budget: allow more, or start earlier
    └── StorageError     a file cannot be read or written, or is damaged: mend the disk, then resume

Code that goes on after a failure catches one of the kinds, never the root: a full disk is not a refusal.
Knows nothing about where the input came from; the command turns any of them into one line and exit code 2.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from .texts import capped, terminal

__all__ = ["BadInput", "MissingPackage", "StorageError", "ThinsightError", "Unreachable", "Unsupported"]


class ThinsightError(ValueError):
    """The root of them. The message is one line that names the field, its value and what to do about it.

    A caller may print it as it is: line breaks inside a quoted value (a file's content, another library's
    message) are folded into spaces, control characters are shown as escapes, and of a message longer than
    1000 characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(capped(terminal(message).strip()))


class BadInput(ThinsightError):
    """A value, a file's content or an option that cannot be right."""


class MissingPackage(ThinsightError):
    """A package that is needed for what was asked for is not installed, or too old."""


class Unsupported(ThinsightError):
    """What was asked for cannot be done with this model, attention implementation, cache or config."""


class Unreachable(ThinsightError):
    """A budget that no schedule of the wanted shape can hold."""


class StorageError(ThinsightError):
    """A file, folder or hub that cannot be read or written, or a file of ours that is damaged."""


def whole(value: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``; raises `BadInput` for anything else."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or int(value) < least or (most is not None and int(value) > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BadInput(f"{name} is {value!r}; it must be a whole number {wanted}")
    return int(value)
