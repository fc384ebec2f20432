"""Encoded images by key, in main memory up to a bound and beyond it in files.

Files are safetensors in a temporary folder of its own, memory-mapped when they are read, and gone with the
store or with the process. Knows nothing about encoders, prompts or what a key means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ThinsightError
from ..runtime import EncodedImages

__all__ = ["DEFAULT_CACHE_GIB", "FeatureStore"]

DEFAULT_CACHE_GIB = 4.0


@dataclass(frozen=True)
class _Filed:
    """An entry whose tensors are in a file."""

    hollow: EncodedImages  # on the meta device: all but the numbers
    path: Path

    def read(self) -> EncodedImages:
        tensors = load_file(self.path)
        return self.hollow.mapped(lambda name, _: tensors[name])


class FeatureStore:
    """What is put first stays in memory: a search reads everything in turn, so nothing is worth evicting.

    Args:
        cache_gib: how much may stay in main memory, in GiB.

    Raises:
        ThinsightError: ``cache_gib`` is no number of at least 0.
    """

    def __init__(self, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        number = isinstance(cache_gib, (int, float)) and not isinstance(cache_gib, bool)
        if not number or not math.isfinite(cache_gib) or cache_gib < 0:
            raise ThinsightError(f"cache_gib is {cache_gib!r}: it must be a number of at least 0, such as 4")
        self._room = cache_gib * 2**30  # bytes
        self._held: dict[Hashable, EncodedImages] = {}
        self._filed: dict[Hashable, _Filed] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._files = 0

    def get(self, key: Hashable) -> EncodedImages | None:
        """The entry on the CPU, or None."""
        if key in self._filed:
            return self._filed[key].read()
        return self._held.get(key)

    def holds(self, key: Hashable, *, received: bool) -> bool:
        """Whether there is an entry, and if asked for, one with attention; reads no file."""
        entry = self._filed[key].hollow if key in self._filed else self._held.get(key)
        return entry is not None and (entry.received is not None or not received)

    def put(self, key: Hashable, entry: EncodedImages) -> None:
        """Keep an entry on the CPU, in place of an earlier one.

        Raises:
            ThinsightError: it has to go into a file, which cannot be written.
        """
        earlier = self._held.pop(key, None)
        self._filed.pop(key, None)
        self._room += earlier.num_bytes if earlier is not None else 0
        if entry.num_bytes <= self._room:
            self._room -= entry.num_bytes
            self._held[key] = entry
        else:
            self._filed[key] = self._file(entry)

    def _file(self, entry: EncodedImages) -> _Filed:
        tensors: dict[str, Any] = {}
        entry.mapped(lambda name, tensor: tensors.setdefault(name, tensor.contiguous()))
        try:
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix="thinsight-", ignore_cleanup_errors=True)
            # never onto an earlier file, whose tensors may still be in use
            path = Path(self._folder.name) / f"{self._files}.safetensors"
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            raise ThinsightError(
                f"vision features of {entry.num_bytes} bytes cannot be written to a temporary file "
                f"({error}): free some space, set TMPDIR to another folder, or raise cache_gib"
            ) from error
        self._files += 1
        return _Filed(entry.to("meta"), path)
