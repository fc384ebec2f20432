"""Ways in which files break: a changed byte, a full disk or Ctrl-C at any moment, and what must come of it.

Knows nothing about which files there are. Shared by the tests of everything that is kept on disk.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from thinsight import records
from thinsight.errors import ThinsightError

DIGITS = b"0123456789"


def changes(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The content with one byte changed, ``count`` times: digits into other digits, for those pass any
    parser, and now and then any byte into any other."""
    draw = random.Random(f"{seed} {len(content)}")
    digits = [place for place, byte in enumerate(content) if byte in DIGITS]
    for number in range(count):
        anywhere = number % 3 == 2 or not digits
        place = draw.randrange(len(content)) if anywhere else draw.choice(digits)
        others = range(256) if anywhere else DIGITS
        byte = draw.choice([other for other in others if other != content[place]])
        yield content[:place] + bytes([byte]) + content[place + 1 :]


def refused_or_same(run: Callable[[], Any], expected: Any, damaged: Path) -> bool:
    """Run what reads a damaged file: an error of one line that names the file, or the undamaged result.

    Returns whether it was refused.
    """
    try:
        found = run()
    except ThinsightError as error:
        said = str(error)
    else:
        assert found == expected
        return False
    assert damaged.name in said
    return True


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def failing_writes(call: int, error: BaseException) -> Iterator[list[str]]:
    """Within this, the step of that number in which a file of ours is written fails, and all others do not.

    Steps are opening a file, writing one half of it and then the other, waiting for the disk, and putting it
    in its place. A write fails when it is done, the others before. Yields the names of the steps that failed.
    """
    failed: list[str] = []
    steps = iter(range(10**9))

    def step(name: str) -> None:
        if next(steps) == call:
            failed.append(name)
            raise error

    class File:
        def __init__(self, file: Any) -> None:
            self._file = file
            self._share = 2

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            written: int = self._file.write(data[: -(-len(data) // self._share)])
            self._share = 1
            step("write")
            return written

    def opened(*arguments: Any, **options: Any) -> Any:
        step("open")
        return File(open(*arguments, **options))

    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        step("fsync")
        fsync(descriptor)

    def replaced(*paths: Any) -> None:
        step("replace")
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "open", opened, raising=False)
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)
        yield failed
